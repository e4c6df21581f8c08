"""Train a run on several processes, with the arguments of `hsivi train`:

deepspeed launch/train.py cifar10 --outdir runs/a train.steps=1000
"""

from hsivi_fast.cli import launched

launched("train")
