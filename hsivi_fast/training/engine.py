"""What trains one network in one process: backward, clipping, optimizer step, EMA, and its state.

`zero.py` has the same for several processes. Both engines have these methods, and the trainer does not know which it
has:

    network        the module itself; `predict` is it as a function (x, t) -> noise, as the run executes calls
    frozen()       the network as `nets.prepared.Prepared`, for callers that want no parameter gradients of it
    graphed(f)     f, a whole update, from a CUDA graph where `records`: the run asks for it, and the engine's steps can
                   be recorded
    backward       cotangents in, parameter gradients out; `accumulation` times for one step, each for a micro-batch
    step(lr)       clip, optimizer, EMA: prepare_step(lr) is what the host does of it, apply_step() the device
    restart()      forget moments and average: what follows is another training of the same weights
    averaged()     {name: tensor}, the EMA
    state, load    the whole state by parameter, whatever the processes and the ZeRO stage: any engine loads what
                   another one saved
"""

import torch

from .. import ops
from ..checkpoints.tensor_files import refuse_strange_tensors
from ..execution import EAGER
from ..nets.prepared import Prepared
from .optim import SLOTS, FusedStep, PlainStep


class PlainEngine:
    """One network in one process.

    network: the module; clip: the largest gradient norm; ema: the decay of the average (see `EMA`).
    execution: how the network is called; accumulation: the number of `backward`s before a `step`; beta1, own_rates: of
    `adam`.
    """

    def __init__(self, network, clip, ema, execution=EAGER, accumulation=1, beta1=0.9, own_rates=None):
        self.network, self.execution = network, execution
        self.predict = execution.compiled(network)
        self.accumulation = accumulation
        self.names, self.parameters = zip(*network.named_parameters())
        device = self.parameters[0].device
        settings = (network.named_parameters(), clip, ema, beta1, own_rates)
        if ops.running_backend(device) == "triton":
            self.optimizer = FusedStep(*settings)
        else:
            self.optimizer = PlainStep(*settings, device if execution.cuda_graphs else None)
        self.ema = self.optimizer.ema

    def frozen(self):
        """The network for calls that want no parameter gradients."""
        return Prepared(self.network)

    @property
    def records(self):
        """Whether `graphed` records."""
        return self.execution.cuda_graphs

    def graphed(self, function):
        """`function` of tensors, replayed from a graph where the run asks for that: steps of this engine can be."""
        return self.execution.graphed(function)

    def backward(self, outputs, gradients):
        """Accumulate parameter gradients from the cotangents `gradients` of `outputs` (two lists of tensors)."""
        if self.accumulation > 1:
            gradients = [gradient / self.accumulation for gradient in gradients]
        torch.autograd.backward(outputs, gradients)

    def step(self, lr):
        """Clip, update the parameters at this learning rate, clear the gradients, move the EMA."""
        self.prepare_step(lr)
        self.apply_step()

    def prepare_step(self, lr):
        """What the host does of a step: the learning rate and the counters."""
        self.optimizer.prepare(lr)

    def apply_step(self):
        """What the device does of a step, which can be recorded and replayed."""
        self.optimizer.apply()

    def restart(self):
        """Forget the moments and the average: the next step is the first one, from the present parameters."""
        self.optimizer.restart()

    def averaged(self):
        """{name: tensor}: the averaged parameters."""
        return self.ema.parameters

    def state(self, name):
        """What a checkpoint needs: ({file stem: {name: tensor}}, {key: number}), with stems that start with `name`."""
        tensors = {
            name: dict(zip(self.names, self.parameters)),
            f"{name}_ema": self.averaged(),
            f"{name}_optimizer": self.optimizer.moments(),
        }
        return tensors, {f"{name}_updates": self.ema.updates}

    def load(self, name, read, numbers):
        """The inverse of `state`: read(stem) gives {name: tensor}.

        Raises ValueError for a checkpoint of another network.
        """
        weights, average, optimizer = read_state(name, read, dict(zip(self.names, self.parameters)))
        with torch.no_grad():
            for parameter_name, parameter in zip(self.names, self.parameters):
                parameter.copy_(weights[parameter_name])
            self.optimizer.load_moments(optimizer)
        self.ema.load(average, numbers[f"{name}_updates"])


def read_state(name, read, expected):
    """(weights, average, optimizer state) of a checkpoint.

    Raises ValueError where a tensor of `expected` {name: tensor} is missing, of another shape or of another kind, and
    where the optimizer's state is not that of all of them, or of none before the first update. Whether they are finite
    is the guard's matter, which names the step.
    """
    weights, average, optimizer = read(name), read(f"{name}_ema"), read(f"{name}_optimizer")
    moments = {f"{slot}.{key}": tensor.shape for slot in SLOTS for key, tensor in expected.items()}
    counters = {f"step.{key}": torch.Size() for key in expected}
    shapes = {key: tensor.shape for key, tensor in expected.items()}
    for stem, values, wanted in (
        (name, weights, shapes),
        (f"{name}_ema", average, shapes),
        (f"{name}_optimizer", optimizer, {**moments, **counters} if optimizer else {}),
    ):
        for key, shape in wanted.items():
            if key not in values or values[key].shape not in (shape, shape or (1,)):  # a counter may be [] or [1]
                found = f"of shape {list(values[key].shape)}" if key in values else "missing"
                raise ValueError(
                    f"checkpoint: {stem} is of another network, first at {key}: {found}, expected {list(shape)}"
                )
        refuse_strange_tensors(values, f"checkpoint: {stem}", finite=False)
    return weights, average, optimizer
