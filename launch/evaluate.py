"""Measure a run's sampler on several processes, with the arguments of `hsivi eval`:

deepspeed launch/evaluate.py runs/a --num-samples 50000
"""

from hsivi_fast.cli import launched

launched("eval")
