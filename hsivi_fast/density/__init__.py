"""Target densities, given by a log density of any user or shipped here, and reference draws of them.

May import torch and numpy; nothing of ours. scikit-learn and Pyro are imported where data or draws are asked for.
"""
