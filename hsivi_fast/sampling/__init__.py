"""From noise to images: the distilled sampler, and the solvers that a user would pick instead.

May import `build.py` and what is below it; measures nothing and trains nothing.
"""
