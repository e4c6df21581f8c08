"""Densities of one's own in the place of a teacher: targets, the bridges to them, and reference draws.

May import `method` and `ops`; scikit-learn, scipy and Pyro are imported where data or draws are asked for. A new
shipped target touches `examples.py` alone.
"""
