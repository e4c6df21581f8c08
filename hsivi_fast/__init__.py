"""hsivi_fast: few-step samplers from diffusion models (HSIVI-SM, Yu et al., NeurIPS 2023, arXiv 2310.17153)."""

from importlib import import_module

from .config import load_config

_LATE = {"train": "trainer", "sample": "sampler", "evaluate": "evaluation"}  # these import torch: only when they are asked for

__all__ = ["evaluate", "load_config", "sample", "train"]


def __getattr__(name):
    if name in _LATE:
        return getattr(import_module(f".{_LATE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
