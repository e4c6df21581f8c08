"""Optimizer, learning-rate rules and the exponential moving average of weights."""

import math

import torch


def learning_rate(rule, base, step, warmup, total):
    """The rate of step 1, 2, ...: linear warm-up over `warmup` steps, then by rule.

    `decay`: base 0.9^(step // 3000). `cosine`: from base to base 0.9^(total // 3000) over step / total. `linear`: to
    zero at `total`. `constant`: base.
    """
    if step <= warmup:
        return base * step / warmup
    if rule == "decay":
        return base * 0.9 ** (step // 3000)
    if rule == "cosine":
        floor = base * 0.9 ** (total // 3000)
        return floor + (base - floor) * (1 + math.cos(math.pi * step / total)) / 2
    if rule == "linear":
        return base * (total - step) / max(total - warmup, 1)
    if rule == "constant":
        return base
    raise ValueError(f"train.lr_rule: {rule!r} is unknown; choose decay, cosine, linear or constant")


def adam(named_parameters, beta1=0.9, own_rates=None, recorded_on=None):
    """Adam(beta1, 0.999) with amsgrad, in torch's fused form; `set_rate` is called before every step.

    named_parameters: (name, tensor) pairs. own_rates: {name: factor}, parameters that are stepped at that multiple of
    the rate. recorded_on: the device of steps that are recorded and replayed, which read the rate from a tensor.
    """
    by_factor = {}
    for name, parameter in named_parameters:
        by_factor.setdefault((own_rates or {}).get(name, 1.0), []).append(parameter)
    groups = []
    for factor, parameters in by_factor.items():
        lr = 0.0 if recorded_on is None else torch.zeros((), device=recorded_on)
        groups.append({"params": parameters, "factor": factor, "lr": lr})
    capturable = recorded_on is not None and recorded_on.type == "cuda"
    return torch.optim.Adam(groups, betas=(beta1, 0.999), eps=1e-8, amsgrad=True, fused=True, capturable=capturable)


def set_rate(optimizer, lr):
    """The learning rate of the next step of an `adam`; where it lies in a tensor, that is filled."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr * group["factor"])
        else:
            group["lr"] = lr * group["factor"]


def forget_moments(optimizer):
    """Put an optimizer back to before its first step, in place: what is recorded reads the same tensors."""
    for state in optimizer.state.values():
        for value in state.values():
            if torch.is_tensor(value):
                value.zero_()


class EMA:
    """Exponential moving average of parameters, with the ramp min(decay, (1 + n) / (10 + n)) over updates n.

    named_parameters: (name, tensor) pairs, a network's or one rank's shards of them.
    weight: a tensor [] that holds 1 - decay for the update, where that is recorded and replayed (see execution.py).
    """

    def __init__(self, named_parameters, decay, weight=None):
        self.decay, self.weight = decay, weight
        self.updates = 0
        self.parameters = {name: parameter.detach().clone() for name, parameter in named_parameters}

    def count(self):
        """What the host does of an update: one more."""
        self.updates += 1
        if self.weight is not None:
            self.weight.fill_(self._weight())

    @torch.no_grad()
    def update(self, parameters):
        """What the device does: move towards the present parameters, in the order that this was made with."""
        averages, present = list(self.parameters.values()), [parameter.detach() for parameter in parameters]
        if self.weight is None:
            torch._foreach_lerp_(averages, present, self._weight())
        else:  # there is no lerp by a tensor [] of one pass
            difference = torch._foreach_sub(present, averages)
            torch._foreach_mul_(difference, self.weight)
            torch._foreach_add_(averages, difference)

    def _weight(self):
        return 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def restart(self, parameters):
        """Begin again at these parameters, in the order that this was made with."""
        torch._foreach_copy_(list(self.parameters.values()), [parameter.detach() for parameter in parameters])
        self.updates = 0

    def load(self, parameters, updates):
        """Take over averaged parameters {name: tensor} and the number of updates behind them."""
        for name, parameter in self.parameters.items():
            parameter.copy_(parameters[name])
        self.updates = updates
