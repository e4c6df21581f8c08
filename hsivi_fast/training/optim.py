"""Optimizer, learning-rate rules and the exponential moving average of weights.

`PlainStep` and `FusedStep` are what one process does of a step after the backward: clipping, Adam, average. The first
is torch's own operators, the second one kernel. Both have these methods:

    prepare(lr)       what the host does of it: the learning rate and the counters
    apply()           what the device does, which can be recorded and replayed; the gradients are gone after it
    restart()         forget moments and average
    moments(), load_moments   {"slot.parameter": tensor}, empty before the first step; the same for both
"""

import math

import torch

from .. import ops

# Adam's moments with amsgrad, in torch's names; "step" is its counter.
SLOTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
BETA2, EPS = 0.999, 1e-8


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
    return torch.optim.Adam(groups, betas=(beta1, BETA2), eps=EPS, amsgrad=True, fused=True, capturable=capturable)


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


class PlainStep:
    """Clipping, Adam and average by torch's operators.

    named_parameters: (name, tensor) pairs; clip: the largest gradient norm; decay: of the average (see `EMA`).
    beta1, own_rates, recorded_on: of `adam`.
    """

    def __init__(self, named_parameters, clip, decay, beta1=0.9, own_rates=None, recorded_on=None):
        self.parameters, self.clip = dict(named_parameters), clip
        self.optimizer = adam(self.parameters.items(), beta1, own_rates, recorded_on)
        # What the host sets before a step is a number. Where the step is recorded, it is a tensor that the host fills.
        weight = None if recorded_on is None else torch.zeros((), device=recorded_on)
        self.ema = EMA(self.parameters.items(), decay, weight)

    def prepare(self, lr):
        """The learning rate and the counters."""
        set_rate(self.optimizer, lr)
        self.ema.count()

    def apply(self):
        """Clip, update, clear the gradients, move the average."""
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.parameters.values())

    def restart(self):
        """The next step is the first one, from the present parameters."""
        forget_moments(self.optimizer)
        self.ema.restart(self.parameters.values())

    def moments(self):
        """Adam's state, by parameter."""
        state = self.optimizer.state
        return {
            f"{slot}.{name}": value
            for name, parameter in self.parameters.items()
            for slot, value in state.get(parameter, {}).items()
        }

    def load_moments(self, values):
        """Take Adam's state over."""
        for name, parameter in self.parameters.items():
            slots = {slot: values.get(f"{slot}.{name}") for slot in ("step", *SLOTS)}
            if all(value is not None for value in slots.values()):
                moments = {slot: laid_out_as(parameter, slots[slot]) for slot in SLOTS}
                self.optimizer.state[parameter] = {"step": slots["step"].to(parameter.device), **moments}


class FusedStep:
    """The same by one kernel, where the Triton backend runs. Arguments are those of `PlainStep`.

    A parameter without a gradient is stepped with zeros, which leave it where it is as long as it never has one.
    """

    def __init__(self, named_parameters, clip, decay, beta1=0.9, own_rates=None):
        self.parameters, self.betas, self.steps = dict(named_parameters), (beta1, BETA2), 0
        parameters = list(self.parameters.values())
        # What the host sets before a step, as of `ops.AdamStep`.
        self.numbers = torch.zeros(3, device=parameters[0].device)
        self.rate, self.correction, weight = self.numbers.unbind()
        self.ema = EMA(self.parameters.items(), decay, weight)
        self.slots = {slot: [torch.zeros_like(p, requires_grad=False) for p in parameters] for slot in SLOTS}
        factors = [(own_rates or {}).get(name, 1.0) for name in self.parameters]
        averages = list(self.ema.parameters.values())
        self.kernel = ops.AdamStep(parameters, *self.slots.values(), averages, factors, clip, self.betas, EPS)

    def prepare(self, lr):
        """The learning rate and the counters."""
        self.steps += 1
        first, second = (1 - beta**self.steps for beta in self.betas)
        self.rate.fill_(lr / first)
        self.correction.fill_(math.sqrt(second))
        self.ema.count()

    @torch.no_grad()
    def apply(self):
        """Clip, update, clear the gradients, move the average."""
        parameters = self.parameters.values()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.kernel(gradients, torch.nn.utils.get_total_norm(gradients, foreach=True), self.numbers)
        for parameter in parameters:
            parameter.grad = None

    def restart(self):
        """The next step is the first one, from the present parameters."""
        self._forget()
        self.ema.restart(self.parameters.values())

    def _forget(self):
        self.steps = 0
        for moments in self.slots.values():
            torch._foreach_zero_(moments)

    def moments(self):
        """Adam's state, by parameter."""
        if not self.steps:
            return {}
        counters = {f"step.{name}": torch.tensor(float(self.steps)) for name in self.parameters}
        for slot, moments in self.slots.items():
            counters |= {f"{slot}.{name}": moment for name, moment in zip(self.parameters, moments)}
        return counters

    def load_moments(self, values):
        """Take Adam's state over, in place: the kernel knows where it is."""
        if not values:
            return self._forget()
        self.steps = int(values[f"step.{next(iter(self.parameters))}"])
        for slot, moments in self.slots.items():
            for name, moment in zip(self.parameters, moments):
                moment.copy_(values[f"{slot}.{name}"])


def laid_out_as(parameter, moment):
    """A copy of a moment that lies in memory as its parameter does, which is Adam's own layout."""
    return torch.zeros_like(parameter, memory_format=torch.preserve_format).copy_(moment)
