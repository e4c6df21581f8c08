"""Draw images from a run on several processes, with the arguments of `hsivi sample`:

deepspeed launch/sample.py runs/a --seeds 0-4095 --outdir pictures
"""

from hsivi_fast.cli import launched

launched("sample")
