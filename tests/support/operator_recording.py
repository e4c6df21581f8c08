"""A stand-in for a CUDA graph that runs anywhere: a call's operators are recorded, and replayed on the same tensors.

It is as strict as capture. What would make the host wait for a device (`.item()`, `nonzero`, a condition on a tensor)
is an error, the function's Python runs once, numbers are frozen, and a result goes where it was when it was recorded.
In one thing it differs: recording does the work as well, so it is undone for what was changed in place.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

HOST = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::item",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
)


class OperatorRecording(TorchDispatchMode):
    """The methods of `hsivi_fast.execution.CudaRecording`."""

    def __init__(self, device="cpu"):
        super().__init__()
        self.steps, self.before, self.replays = [], {}, 0

    def warm_up(self, function):
        return function()

    def record(self, function):
        with self:
            result = function()
        for tensor, value in self.before.values():
            tensor.detach().copy_(value)
        return result

    def replay(self):
        self.replays += 1
        with torch.no_grad():
            for operator, arguments, keywords, results in self.steps:
                for own, new in zip(results, tree_leaves(operator(*arguments, **keywords))):
                    if (
                        isinstance(own, torch.Tensor)
                        and new is not own
                        and (new.data_ptr() != own.data_ptr() or new.stride() != own.stride())
                    ):
                        own.copy_(new)

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        keywords = keywords or {}
        assert operator._schema.name not in HOST, f"{operator._schema.name} makes the host wait: it cannot be captured"
        masked = operator._schema.name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in arguments[1]
        )
        assert not masked, f"{operator._schema.name} by a mask makes the host wait: it cannot be captured"
        for given, declared in zip(arguments, operator._schema.arguments):
            if declared.is_write:
                for tensor in tree_leaves(given):
                    self.before.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        results = operator(*arguments, **keywords)
        leaves, layout = tree_flatten((arguments, keywords))
        frozen_arguments, frozen_keywords = tree_unflatten(_detached(leaves), layout)
        self.steps.append((operator, frozen_arguments, frozen_keywords, _detached(tree_leaves(results))))
        return results


def _detached(values):
    """Detached aliases of tensors: what is recorded must not keep, or grow, a graph of gradients."""
    return [value.detach() if isinstance(value, torch.Tensor) else value for value in values]


class RunAgain:
    """The methods of `CudaRecording`, for functions of one result: a replay runs the function's Python again.

    For what `OperatorRecording` is too strict for, as a function that looks at where its tensors lie.
    """

    def __init__(self, device="cpu"):
        self.device = device

    def warm_up(self, function):
        return function()

    def record(self, function):
        self.function, self.result = function, function()
        return self.result

    def replay(self):
        self.result.copy_(self.function())
