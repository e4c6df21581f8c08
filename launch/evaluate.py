"""Measure a run's sampler on several processes: `deepspeed launch/evaluate.py runs/a --num-samples 50000`, with the arguments of `hsivi eval`."""

from hsivi_fast.cli import launched

launched("eval")
