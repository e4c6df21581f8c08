"""A GPU that is not there: tensors without numbers on `cuda`, and an error where the host would have to wait for it."""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextlib.contextmanager
def pretended_gpu():
    """Within it tensors can be made on `cuda`.

    AssertionError for an operator that takes a tensor to the device or back: the host would wait, and a graph could not
    be recorded. Operators of ours answer with shapes alone, so what is inside them has to be called by itself.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _Crossings():
        yield


class _Crossings(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        results = operator(*arguments, **(keywords or {}))
        leaves = tree_leaves((arguments, keywords, results))
        places = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
        assert places <= {"cuda"} or "cuda" not in places, f"{operator} joins host and device: the host would wait"
        return results
