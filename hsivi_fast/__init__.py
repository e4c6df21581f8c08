"""hsivi_fast: few-step samplers from diffusion models (HSIVI-SM, Yu et al., NeurIPS 2023, arXiv 2310.17153)."""

from importlib import import_module

from .config import load_config

# These modules import torch, which takes more than a second: they are loaded when they are asked for.
_LATE = {"train": "training.trainer", "sample": "sampling.sampler", "evaluate": "metrics.evaluation"}

__all__ = ["evaluate", "load_config", "sample", "train"]


def __getattr__(name):
    if name in _LATE:
        return getattr(import_module(f".{_LATE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
