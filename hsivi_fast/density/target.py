"""A target: what a log density, given by a user or shipped, becomes for training and measuring, and its checks.

Mistakes are a ValueError of one line that begins with the key of a run's settings: `target.log_density`,
`target.score`, `target.transform` or `target.dim`.
"""

import importlib.util
import itertools
import sys
from pathlib import Path

import torch
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from .examples import EXAMPLES

SCALES, POINTS_A_SCALE, CHECK_SEED = (0.1, 1.0, 3.0), 16, 0  # of the points that a target is checked at
REPEATS = 3  # how many times a log density is asked again for the same points
# Allowed differences relative to 1 + |value|, and for rows and scores to the largest value of the batch: float32
# rounds sums over some hundred data by 1e-5 of their terms, and a batch may be summed in another order than a row.
REPEAT_TOLERANCE, ROW_TOLERANCE, SCORE_TOLERANCE = 1e-6, 1e-4, 1e-3
_numbers = itertools.count(1)


class Target:
    """A density known up to a constant, in unconstrained coordinates x [B, dim].

    log_density: a batched function of the parameters, [B, ...] -> [B]. score: its gradient in the parameters, of their
    shape, or None for autograd's. transform: a `Transform` T from x to the parameters, or None where they are x. With
    it the density of x is log_density(T(x)) + log|det J|, and the score is that of this density in x.
    parameters: names, one per coordinate of `constrained`; x1, x2 ... by default. example: a shipped target, or None.

    Attributes: `name`, `dim`, `parameters`, `transform`, `example`, `device`, `own_score` (whether the user gave one)
    and `evaluations`, the number of gradient evaluations so far: one per row of each call.
    """

    def __init__(
        self, log_density, dim, name="target", score=None, transform=None, parameters=None, example=None, device="cpu"
    ):
        self.name, self.dim, self.transform, self.example = name, dim, transform, example
        self.device = torch.device(device)
        self._log_density, self._score, self.own_score = log_density, score, score is not None
        self.evaluations = 0
        self._names = list(parameters) if parameters is not None else None

    @property
    def parameters(self):
        """Names of the parameters as the user knows them, one per column of `constrained`."""
        if self._names is None:
            columns = self.constrained(torch.zeros(1, self.dim, device=self.device)).shape[1]
            self._names = [f"x{number}" for number in range(1, columns + 1)]
        return self._names

    def name_parameters(self, names):
        """Give the parameters other names. Raises ValueError where they are not as many."""
        if len(names) != len(self.parameters):
            raise ValueError(f"target.parameters: {len(names)} names for {len(self.parameters)} parameters")
        self._names = list(names)

    def log_density(self, x):
        """Log density of unconstrained x [B, dim], up to a constant: [B], of the type of x."""
        parameters, correction = self._transformed(x)
        value = self._log_density(parameters)
        return (value if correction is None else value + correction).to(x.dtype)

    def score(self, x):
        """Gradient of the log density at x [B, dim]: [B, dim].

        It can be differentiated again where x requires a gradient and gradients are on. It works under
        `torch.no_grad` and `torch.inference_mode` too. Where a compiler reads it, the gradient is that of `torch.func`,
        which becomes a part of what is compiled.
        """
        if torch.compiler.is_compiling():
            return self._compiled_score(x)
        if x.requires_grad and torch.is_grad_enabled():
            return self._gradient(x, create_graph=True)[1]
        with torch.inference_mode(False), torch.enable_grad():
            # A tensor of the inference mode takes part in no graph, but its copy does.
            x = x.clone() if x.is_inference() else x.detach()
            return self._gradient(x.requires_grad_(), create_graph=False)[1].detach()

    def _compiled_score(self, x):
        if self.own_score and self.transform is None:
            return self._score(x)
        return torch.func.grad(lambda points: self.log_density(points).sum())(x)

    def value_and_score(self, x):
        """(log density [B], score [B, dim]) at x [B, dim] for one gradient evaluation a row, without a graph."""
        with torch.enable_grad():
            value, score = self._gradient(x.detach().requires_grad_(), create_graph=False, with_value=True)
        return value.detach(), score.detach()

    def constrained(self, x):
        """The parameters as the user knows them, of unconstrained x [B, dim]: [B, D], matrices row by row."""
        return self._transformed(x)[0].reshape(len(x), -1)

    def summary(self, x):
        """What draws x [N, dim] are compared on: `constrained`, or what the shipped target has in its place."""
        return self.constrained(x) if self.example is None else self.example.summary(x)

    @property
    def summary_names(self):
        """Names of the columns of `summary`."""
        return self.parameters if self.example is None else self.example.summary_names

    def _transformed(self, x):
        """(parameters [B, ...], log|det J| [B] or None) of x [B, dim]."""
        if self.transform is None:
            return x, None
        parameters = self.transform(x)
        # One term per coordinate, or one per row where the coordinates depend on each other.
        return parameters, self.transform.log_abs_det_jacobian(x, parameters).reshape(len(x), -1).sum(1)

    def _gradient(self, x, create_graph, with_value=False):
        """(log density or None, score) at x, which requires a gradient; the value is computed only if it is needed."""
        self.evaluations += len(x)
        parameters, correction = self._transformed(x)
        value = None
        if with_value or not self.own_score:
            value = self._log_density(parameters)
            value = (value if correction is None else value + correction).to(x.dtype)
        if not self.own_score:
            (score,) = torch.autograd.grad(value.sum(), x, create_graph=create_graph)
        elif self.transform is None:
            score = self._score(x).to(x.dtype)
        else:
            # Chain rule: the user's score pulled back through T, and the gradient of log|det J|.
            outputs, weights = [parameters], [self._score(parameters).to(parameters.dtype)]
            if correction.requires_grad:  # a linear T has a constant one
                outputs, weights = [*outputs, correction], [*weights, torch.ones_like(correction)]
            (score,) = torch.autograd.grad(outputs, x, weights, create_graph=create_graph)
        if create_graph and not score.requires_grad:
            score = score + 0 * x  # a constant score: its derivative is 0, and asking for it is no error
        return value, score


def load_target(log_density, dim=None, score=None, transform=None, device="cpu"):
    """A `Target` of what a run's settings, or a call from Python, say.

    log_density: a shipped name, "path/to/file.py:function", or a callable: parameters [B, dim] -> [B]. The file is
    Python code that its user names: it is run, with all that it does, under a module name of its own; `sys.path` stays
    as it is. dim: the number of unconstrained coordinates; may be None for a shipped name.
    score: the gradient of the log density in its parameters, [B, dim] -> [B, dim], as a file's function or a callable;
    None for autograd. transform: a `torch.distributions.transforms.Transform` from unconstrained coordinates to the
    parameters, or a constraint, whose transform `biject_to` knows; the object, or "path/to/file.py:name".
    A list `parameters` that the log density has as an attribute names its parameters.

    Raises ValueError, in one line that begins with the key, where a file or what it should hold is not there, the file
    raises when it is run, or the arguments do not fit each other. What a function returns is `check_target`'s matter.
    """
    modules = {}  # a file that is named twice is run once
    if isinstance(log_density, str) and log_density in EXAMPLES:
        return _shipped(log_density, dim, score, transform, device)
    function = log_density
    if isinstance(log_density, str):
        function = _from_file("target.log_density", log_density, modules)
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
        raise ValueError(f"target.dim: {_brief(dim)}; expected the number of coordinates, at least 1")
    if isinstance(score, str):
        score = _from_file("target.score", score, modules)
    if isinstance(transform, str):
        transform = _from_file("target.transform", transform, modules)
    for key, value in (("target.log_density", function), ("target.score", score)):
        if not callable(value) and (value is not None or key == "target.log_density"):
            raise ValueError(f"{key}: {_brief(value)} is not callable; expected a function of a tensor [B, dim]")
    transform = _checked_transform(transform, dim, device)
    name = log_density.rpartition(":")[2] if isinstance(log_density, str) else None
    name = name or getattr(function, "__name__", type(function).__name__)
    target = Target(function, dim, name, score, transform, device=device)
    names = getattr(function, "parameters", None)
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
        if len(names) != len(target.parameters):
            raise ValueError(
                f"target.log_density: its `parameters` are {len(names)} names for {len(target.parameters)} parameters"
            )
        target = Target(function, dim, target.name, score, transform, names, device=device)
    return target


def check_target(target):
    """Refuse a target that training would fail on, or would be wrong on without a sign.

    It is asked for a few points, normal with deviations 0.1, 1 and 3, the same ones each time. Raises ValueError, in
    one line that begins with the key, where a function raises, returns no float tensor [B] (a score: [B, dim]), or what
    is no number at some point; where the log density is not differentiable, or the score is not that of autograd; where
    the rows of a batch influence each other; and where asking again for the same points gives other values. So log
    densities over random minibatches are refused: the losses square the score, so that noise in it would not average
    out but bias what is learned. Few points are no proof: what fails elsewhere is found by training. It leaves
    `evaluations` as it was.
    """
    evaluations = target.evaluations
    try:
        _check(target)
    finally:
        target.evaluations = evaluations


def _check(target):
    random = torch.Generator().manual_seed(CHECK_SEED)
    scales = torch.tensor(SCALES).repeat_interleave(POINTS_A_SCALE)[:, None]
    x = (scales * torch.randn(len(scales), target.dim, generator=random)).to(target.device)
    key = "target.log_density"

    def log_density(points):  # one call of the user's function each time: every second call would hide turns
        parameters, correction = _asked("target.transform", lambda: target._transformed(points))
        value = _asked(key, lambda: target._log_density(parameters))
        _check_output(key, value, (len(points),))
        return (value if correction is None else value + correction).detach().to(points.dtype)

    values = log_density(x)
    for value, point in zip(values.tolist(), x):
        if not abs(value) < float("inf"):  # NaN is among them
            hint = "; a bounded support needs a transform" if value == -float("inf") else ""
            raise ValueError(f"{key}: {value} at {_point(point)}; expected a finite number{hint}")
    for _ in range(REPEATS):
        again = log_density(x)
        row = _different(again, values, REPEAT_TOLERANCE * (1 + values.abs()))
        if row is not None:
            raise ValueError(
                f"{key}: {values[row]:.7g}, then {again[row]:.7g} at the same point {_point(x[row])}; a random or "
                "minibatch log density has a noisy score, which biases the losses: it must use all data each time"
            )
    alone = torch.cat([log_density(row[None]) for row in x])
    row = _different(alone, values, ROW_TOLERANCE * (1 + values.abs().max()))
    if row is not None:
        raise ValueError(
            f"{key}: {alone[row]:.7g} at {_point(x[row])} alone, but {values[row]:.7g} in a batch; each row must be "
            "worked out by itself"
        )
    _check_scores(target, x)


def _check_scores(target, x):
    """The part of `check_target` about gradients, at points x [B, dim] whose log density is in order."""
    # Autograd's score, whether the user gave one or not.
    plain = Target(target._log_density, target.dim, transform=target.transform, device=target.device)
    with torch.enable_grad():
        probe = x.clone().requires_grad_()
        value = _asked("target.log_density", lambda: plain.log_density(probe))
        if not value.requires_grad:
            raise ValueError(
                "target.log_density: autograd cannot differentiate it; expected torch operations on its argument alone"
            )
    exact = _asked("target.log_density", lambda: plain.score(x))
    _check_finite("target.log_density", "its gradient is ", exact, x)
    key = "target.log_density"
    if target.own_score:
        key = "target.score"
        own = _asked(key, lambda: target._score(target._transformed(x)[0].detach()))
        _check_output(key, own, tuple(target._transformed(x)[0].shape))
        own = target.score(x)
        _check_finite(key, "", own, x)
        difference = (own - exact).abs().amax(1)
        row = _different(own, exact, SCORE_TOLERANCE * (1 + exact.abs().amax(1, keepdim=True)))
        if row is not None:
            column = int((own - exact)[row].abs().argmax())
            raise ValueError(
                f"{key}: {own[row, column]:.6g} in coordinate {column + 1} at {_point(x[row])}, where autograd has "
                f"{exact[row, column]:.6g}: {difference[row]:.3g} apart"
            )
    with torch.enable_grad():  # training pulls its loss back through the score
        probe = x.clone().requires_grad_()
        parameters = target._transformed(probe)[0]
        if target.own_score and not target._score(parameters).requires_grad and not _constant(own):
            raise ValueError(
                f"{key}: autograd cannot differentiate it; expected torch operations on its argument alone"
            )
        _asked(key, lambda: torch.autograd.grad(target.score(probe).sum(), probe, allow_unused=True))


def _shipped(name, dim, score, transform, device):
    example = EXAMPLES[name]()
    for key, value in (("score", score), ("transform", transform)):
        if value is not None:
            raise ValueError(f"target.{key}: {name} is shipped and takes none")
    if dim is not None and dim != example.dim:
        raise ValueError(f"target.dim: {_brief(dim)}, but {name} has {example.dim} dimensions")
    return Target(example.log_density, example.dim, name, parameters=example.parameters, example=example, device=device)


def _from_file(key, text, modules):
    """What "path/to/file.py:name" names; `modules` keeps the files that were run, by their paths."""
    file, colon, name = text.rpartition(":")
    if not colon or not file.endswith(".py"):
        shipped = f"one of {', '.join(EXAMPLES)}, or " if key == "target.log_density" else ""
        raise ValueError(f"{key}: {_brief(text)}; expected {shipped}path/to/file.py:function")
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"{key}: there is no file {_brief(str(path))}")
    path = path.resolve()
    if path not in modules:
        module_name = f"hsivi_target_{next(_numbers)}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses and pickle look their module up by its name
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise ValueError(f"{key}: {_brief(file)} raises when it is run: {_described(error)}") from None
        modules[path] = module
    if not hasattr(modules[path], name):
        raise ValueError(f"{key}: {_brief(file)} has no {_brief(name)}")
    return getattr(modules[path], name)


def _checked_transform(transform, dim, device):
    """A transform, that of a constraint, or None. Raises ValueError where it does not fit [B, dim]."""
    key = "target.transform"
    if transform is None:
        return None
    if isinstance(transform, Constraint):
        transform = _asked(key, lambda: biject_to(transform))
    if not isinstance(transform, Transform):
        raise ValueError(f"{key}: {_brief(transform)} is neither a transform nor a constraint of torch.distributions")
    x = torch.zeros(2, dim, device=device)
    parameters = _asked(key, lambda: transform(x))
    change = _asked(key, lambda: transform.log_abs_det_jacobian(x, parameters))
    if not torch.is_tensor(parameters) or parameters.ndim < 2 or len(parameters) != 2 or len(change) != 2:
        raise ValueError(f"{key}: it does not map [B, {dim}] to parameters, row by row")
    return transform


def _asked(key, function):
    """What a user's function returns; what it raises becomes a ValueError of one line."""
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{key}: it raises {_described(error)}") from None


def _check_output(key, value, shape):
    expected = f"expected a float tensor [{', '.join(map(str, shape))}] for a batch of {shape[0]}"
    if not torch.is_tensor(value):
        raise ValueError(f"{key}: it returns {_brief(type(value).__name__)}; {expected}")
    if tuple(value.shape) != shape or not value.is_floating_point():
        raise ValueError(f"{key}: it returns {list(value.shape)} of type {str(value.dtype)[6:]}; {expected}")


def _check_finite(key, words, scores, x):
    strange = torch.nonzero(~torch.isfinite(scores))
    if len(strange):
        row, column = strange[0].tolist()
        raise ValueError(f"{key}: {words}{scores[row, column]:g} in coordinate {column + 1} at {_point(x[row])}")


def _different(values, expected, allowed):
    """The first row where values [B, ...] are further from expected than allowed, or where they are NaN; or None."""
    wrong = ~((values - expected).abs() <= allowed)
    rows = torch.nonzero(wrong.reshape(len(wrong), -1).any(1))
    return int(rows[0]) if len(rows) else None


def _constant(scores):
    return bool((scores == scores[0]).all())


def _point(x):
    shown = ", ".join(f"{value:.4g}" for value in x[:6].tolist())
    return f"[{shown}{', ...' if len(x) > 6 else ''}]"


def _described(error):
    return f"{type(error).__name__}: {_brief(error)}" if str(error) else type(error).__name__


def _brief(value, limit=160):
    """A text or the repr of a value, in one line that is not long."""
    text = " ".join((str(value) if isinstance(value, BaseException) else repr(value)).split())
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."
