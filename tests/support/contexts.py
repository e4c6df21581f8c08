"""Contexts for tests: on the CPU, in one process."""

import dataclasses

from hsivi_fast.build import build_context
from hsivi_fast.parallel.world import ALONE


def context_of(config, teacher=None):
    """The `Context` of a configuration with the teacher given, or without one."""
    context = build_context(dataclasses.replace(config, device="cpu"), ALONE)
    return context if teacher is None else context.with_teacher(teacher)


def context_with_teacher(config):
    """The `Context` of a configuration with its own teacher."""
    return context_of(config).with_teacher()
