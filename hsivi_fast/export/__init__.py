"""A run's sampler in forms that others can use: safetensors, a diffusers pipeline, one compiled file.

May import everything but training/ and report/. Nothing in the package but `cli.py` and `diffusers.py` imports it.
"""

from .write import FORMATS, export_run, load_exported

__all__ = ["FORMATS", "export_run", "load_exported"]
