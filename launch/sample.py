"""Draw images from a run on several processes: `deepspeed launch/sample.py runs/a --seeds 0-4095 --outdir pictures`, with the arguments of `hsivi sample`."""

from hsivi_fast.cli import launched

launched("sample")
