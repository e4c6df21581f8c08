"""A run's sampler in forms that others can use: safetensors, a diffusers pipeline, one compiled file.

May import everything but training/ and report/; in the package only `cli.py` and `diffusers.py` import it.
"""

from .safetensors_format import load_exported
from .write import FORMATS, export_run

__all__ = ["FORMATS", "export_run", "load_exported"]
