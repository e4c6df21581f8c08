"""Train a run on several processes: `deepspeed launch/train.py cifar10 --outdir runs/a train.steps=1000`, with the arguments of `hsivi train`."""

from hsivi_fast.cli import launched

launched("train")
