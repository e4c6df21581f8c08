"""What a bridge is for training and sampling: the auxiliary scores as a teacher, and the way back to the target."""

import torch
from torch import nn
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import StackTransform

from .examples import EXAMPLES
from .target import load_target


class BridgeTeacher(nn.Module):
    """Minus the score of the auxiliary density p_k, in the coordinates of the base: u [B, d], k [B] int -> [B, d].

    target: `Target`; bridge: `Bridge`. Differentiable in u where it requires a gradient. One call is one gradient
    evaluation of the target a row.
    """

    classes = None

    def __init__(self, target, bridge):
        super().__init__()
        self.target, self.event_shape = target, (target.dim,)
        for name in ("mean", "factor"):
            self.register_buffer(name, getattr(bridge, name).clone(), persistent=False)
        self.register_buffer("levels", torch.from_numpy(bridge.levels).to(torch.float32), persistent=False)

    def forward(self, u, k):
        level = self.levels[k][:, None]
        score = self.target.score(self.mean + u @ self.factor.T) @ self.factor
        return (1 - level) * u - level * score


class ToTarget(nn.Module):
    """The target's parameters at coordinates u [B, d]: x = mean + factor u, through the constraints' transform.

    mean [d], factor [d, d]: of the base; constraints: as of a run's `target`. It needs no code of the target's.
    """

    def __init__(self, mean, factor, constraints=None):
        super().__init__()
        self.register_buffer("mean", mean.clone(), persistent=False)
        self.register_buffer("factor", factor.clone(), persistent=False)
        self.transform = transform_of(constraints)

    def unconstrained(self, u):
        """x [B, d] of coordinates u [B, d]."""
        return self.mean + u @ self.factor.T

    def forward(self, u, on_batch=None):
        x = self.unconstrained(u)
        return x if self.transform is None else self.transform(x).reshape(len(x), -1)

    def image_shape(self, event_shape):
        """(D,), how many parameters there are for coordinates of a shape."""
        return tuple(self(torch.zeros(2, *event_shape, device=self.mean.device)).shape[1:])


def transform_of(names):
    """The transform from unconstrained coordinates to parameters, None for none.

    names: of constraints in torch.distributions, one for each coordinate or one for all. Raises ValueError for another.
    """
    if names is None or names == "real":
        return None
    if isinstance(names, str):
        return _to_constraint(names)
    transforms = [_to_constraint(name) for name in names]
    for name, transform in zip(names, transforms):
        if transform.domain.event_dim or transform.codomain.event_dim:
            raise ValueError(f"target.constraints: {name!r} is of several coordinates; give it alone, for all of them")
    return StackTransform(transforms, dim=-1)


def _to_constraint(name):
    """The transform from real numbers to what the constraint of a name allows."""
    found = getattr(constraints, name, None)
    if not isinstance(found, constraints.Constraint):
        known = "real, positive, nonnegative, unit_interval, simplex, corr_cholesky"
        raise ValueError(f"target.constraints: {name!r} is no constraint of torch.distributions, as {known}")
    try:
        return biject_to(found)
    except NotImplementedError:
        raise ValueError(f"target.constraints: {name!r} has no transform from real numbers") from None


def target_of(settings, device):
    """The `Target` of a run's `target`, see `load_target`."""
    transform = transform_of(settings.constraints)
    if settings.constraints is not None and settings.log_density in EXAMPLES:
        raise ValueError(f"target.constraints: {settings.log_density} is shipped and takes none")
    target = load_target(settings.log_density, settings.dim, settings.score, transform, device)
    if settings.parameters is not None:
        target.name_parameters(settings.parameters)
    return target
