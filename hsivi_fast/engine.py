"""What trains one network: backward, clipping, optimizer step, EMA, and its state. The trainer does not know more than this."""

import torch

from .frozen import EAGER
from .optim import EMA, adam


class PlainEngine:
    """One network in one process.

    network: the module; clip: the largest gradient norm; ema: the decay of the average (see `EMA`); execution: how the network is called. `predict`
    is the network as a function (x, t) -> noise.
    """

    def __init__(self, network, clip, ema, execution=EAGER):
        self.network = network
        self.predict = execution.compiled(network)
        self.clip = clip
        self.names, self.parameters = zip(*network.named_parameters())
        # What the host sets before a step is a number, or where the step is recorded and replayed, a tensor that it fills.
        recorded = execution.cuda_graphs
        device = self.parameters[0].device
        self.lr, weight = (torch.zeros((), device=device) if recorded else None for _ in range(2))
        self.optimizer = adam(self.parameters, self.lr if recorded else 0.0, capturable=recorded and device.type == "cuda")
        self.ema = EMA(network, ema, weight)

    def backward(self, outputs, gradients):
        """Accumulate parameter gradients from the cotangents `gradients` of `outputs` (two lists of tensors)."""
        torch.autograd.backward(outputs, gradients)

    def step(self, lr):
        """Clip, update the parameters at this learning rate, clear the gradients, move the EMA."""
        self.prepare_step(lr)
        self.apply_step()

    def prepare_step(self, lr):
        """The host's part of a step: the learning rate and the counters."""
        if self.lr is not None:
            self.lr.fill_(lr)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        self.ema.count()

    def apply_step(self):
        """The device's part of a step, which can be recorded and replayed."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.network)

    def state(self, name):
        """What a checkpoint needs: ({file stem: {name: tensor}}, {key: number}), with stems that start with `name`."""
        optimizer = {f"{slot}.{parameter_name}": values[slot]
                     for parameter_name, parameter in zip(self.names, self.parameters)
                     for values in [self.optimizer.state.get(parameter, {})]
                     for slot in values}
        tensors = {name: dict(zip(self.names, self.parameters)), f"{name}_ema": self.ema.state_dict(), f"{name}_optimizer": optimizer}
        return tensors, {f"{name}_updates": self.ema.updates}

    def load(self, name, read, numbers):
        """The inverse of `state`: read(stem) gives {name: tensor}. Raises ValueError for a checkpoint of another network."""
        weights, average, optimizer = read(name), read(f"{name}_ema"), read(f"{name}_optimizer")
        for stem, values in ((name, weights), (f"{name}_ema", average)):
            different = [key for key, own in zip(self.names, self.parameters) if key not in values or values[key].shape != own.shape]
            if different:
                raise ValueError(f"checkpoint: {stem} is of another network, first at {different[0]}")
        with torch.no_grad():
            for key, parameter in zip(self.names, self.parameters):
                parameter.copy_(weights[key])
                slots = {}
                for slot in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                    if (value := optimizer.get(f"{slot}.{key}")) is not None:
                        # Adam's own layout: the moments lie in memory as the parameter does.
                        slots[slot] = torch.zeros_like(parameter, memory_format=torch.preserve_format).copy_(value) if slot != "step" else value.to(parameter.device)
                if slots:
                    self.optimizer.state[parameter] = slots
        self.ema.load_state_dict(average, numbers[f"{name}_updates"])
