"""How good samples are: distances, the feature networks behind them, tables, and image files for other tools.

May import `sampling/` and what is below it; draws no pictures and trains nothing.
"""
