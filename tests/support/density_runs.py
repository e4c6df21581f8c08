"""Small runs with a target: a correlated Gaussian in the plane, in a file as a user writes one."""

import torch

from hsivi_fast.config import load_config

MEAN = (1.0, -1.0)
COVARIANCE = ((1.0, 0.6), (0.6, 0.8))
SOURCE = """
import torch

MEAN = torch.tensor([1.0, -1.0])
PRECISION = torch.linalg.inv(torch.tensor([[1.0, 0.6], [0.6, 0.8]]))


def log_density(x):
    difference = x - MEAN.to(x)
    return -((difference @ PRECISION.to(x)) * difference).sum(1) / 2


def score(x):
    return -(x - MEAN.to(x)) @ PRECISION.to(x)
"""
# A start of 6 updates, a head start of 3, and 9 steps with 3 updates of the student, in two seconds.
SHORT = [
    *("nfe=2", "network.channels=16", "device=cpu", "bridge.chains=40", "bridge.moves=10", "bridge.mean=[0]"),
    *("bridge.scale=[2]", "start.updates=6", "start.trajectories=32", "start.substeps=2", "start.batch_size=16"),
    *("start.score_net_updates=3", "train.steps=9", "train.batch_size=16", "train.f_learning_times=3", "log_every=1"),
    *("train.log_gamma_lr=0.01", "train.student_lr=0.001", "eval.num_samples=0"),
]


def write_target(folder, source=SOURCE):
    """The file of the target, in a folder."""
    file = folder / "gaussian.py"
    file.write_text(source)
    return file


def density_config(file, *overrides):
    """The configuration of a short run on the target in a file."""
    return load_config("density", [f"target.log_density={file}:log_density", "target.dim=2", *SHORT, *overrides])


def exact_draws(count, seed=0):
    """Draws [count, 2] of the target, float64."""
    factor = torch.linalg.cholesky(torch.tensor(COVARIANCE, dtype=torch.float64))
    normal = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.tensor(MEAN, dtype=torch.float64) + normal @ factor.T
