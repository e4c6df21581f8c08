"""Six operations of bench/ops.py in pytest-benchmark, which the extra [dev] brings.

    pytest -n 0 bench/test_ops.py --benchmark-only

In one process (-n 0): beside a second one nothing can be timed, and pytest-benchmark refuses. A plain `pytest` does not
collect this file, since its tests time and assert nothing but the operation's own check.
"""

import itertools

import pytest
import torch

from bench.ops import all_cases
from hsivi_fast.build import choose_device

DEVICE = choose_device("auto")


@pytest.mark.parametrize("side", ["ours", "eager", "compiled"])
@pytest.mark.parametrize("index", range(6))
def test_operation(benchmark, index, side):
    """The first six cases of the device: the draw, the step, its backward and the losses."""
    case = next(itertools.islice(all_cases(DEVICE), index, None))
    case.check()
    sides = {"ours": case.ours, "eager": case.plain, "compiled": torch.compile(case.plain, dynamic=False)}
    function = sides[side]
    benchmark.group = case.name
    function()

    def run():
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
