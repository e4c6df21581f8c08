"""Launching a compiled kernel again without Triton's own way: with the same arguments, and never another kernel."""

import pytest
import torch

from hsivi_fast.kernels import launch as launching


class Compiled:
    """What Triton gives for a launch; `launched` is what it was started with again."""

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launched.append((grid, arguments))


class Kernel:
    """A jitted function of two tensors, a number and two constants; `compiled` is what Triton's way gave."""

    arg_names = ["x_ptr", "add_ptr", "stride", "TILE", "SILU"]

    def __init__(self):
        self.compiled = []

    def __getitem__(self, grid):
        def by_triton(*arguments, **constants):
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return by_triton


@pytest.fixture
def compiling(monkeypatch):
    """As where kernels are compiled and not interpreted."""
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(launching, "_compiled", {})


CONSTANTS = {"SILU": True, "TILE": 8, "num_warps": 4}  # not in the order of the signature


def test_a_second_launch_starts_the_compiled_kernel_with_all_arguments_in_order(compiling):
    kernel, x = Kernel(), torch.zeros(4)
    launching.launch(kernel, (3,), (x, None), (5,), CONSTANTS)
    assert kernel.compiled[0].launched == []  # Triton's way launched it
    other = torch.ones(8)  # of another size, batch or address
    launching.launch(kernel, (6,), (other, None), (5,), CONSTANTS)
    [(grid, arguments)] = kernel.compiled[0].launched
    assert len(kernel.compiled) == 1 and grid[:3] == (6, 1, 1)
    assert arguments[0] is other and arguments[1:] == (None, 5, 8, True)


@pytest.mark.parametrize(
    "tensors, numbers, constants",
    [
        ((torch.zeros(4, dtype=torch.bfloat16), None), (5,), {}),
        ((torch.zeros(5)[1:], None), (5,), {}),  # begins between 16 bytes
        ((torch.zeros(4), torch.zeros(4)), (5,), {}),
        ((torch.zeros(4), None), (16,), {}),
        ((torch.zeros(4), None), (5,), {"TILE": 16}),
        ((torch.zeros(4), None), (5,), {"num_warps": 8}),
    ],
    ids=["type", "alignment", "present", "number", "constant", "option"],
)
def test_what_a_kernel_is_compiled_for_is_looked_at(compiling, tensors, numbers, constants):
    kernel = Kernel()
    launching.launch(kernel, (3,), (torch.zeros(4), None), (5,), CONSTANTS)
    launching.launch(kernel, (3,), tensors, numbers, {**CONSTANTS, **constants})
    assert len(kernel.compiled) == 2 and not any(compiled.launched for compiled in kernel.compiled)


def test_two_kernels_are_never_one(compiling):
    kernels = [Kernel(), Kernel()]
    for kernel in kernels:
        launching.launch(kernel, (3,), (torch.zeros(4), None), (5,), CONSTANTS)
    assert [len(kernel.compiled) for kernel in kernels] == [1, 1]


class Recorded(Kernel):
    """One whose launches somebody records, and does not do."""

    def __getitem__(self, grid):
        return lambda *arguments, **constants: None


def test_a_launch_that_was_recorded_and_not_done_is_not_kept(compiling):
    launching.launch(Recorded(), (3,), (torch.zeros(4), None), (5,), CONSTANTS)
    assert not launching._compiled
