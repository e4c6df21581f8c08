"""What a user's log density becomes: scores, transforms, counts; and that each bad one is a line with its key."""

import itertools
import math
import sys

import pytest
import torch
from torch.distributions import Beta, Dirichlet, LogNormal, Normal, constraints, transforms

from hsivi_fast.density.target import Target, check_target, load_target

COVARIANCE = torch.tensor([[2.0, 0.6], [0.6, 1.0]])


def gaussian(x):
    return -((x @ torch.linalg.inv(COVARIANCE).to(x)) * x).sum(1) / 2


def gaussian_score(x):
    return -x @ torch.linalg.inv(COVARIANCE).to(x)


def _points(dim=2, n=6, dtype=torch.float32):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(4), dtype=dtype)


@pytest.mark.parametrize("score", [None, gaussian_score])
def test_scores_with_and_without_gradients_and_how_many_were_taken(score):
    target = load_target(gaussian, 2, score=score)
    check_target(target)
    assert target.evaluations == 0 and target.name == "gaussian" and target.parameters == ["x1", "x2"]
    x = _points()
    assert torch.allclose(target.score(x), gaussian_score(x), atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(target.score(x), gaussian_score(x), atol=1e-6)
    with torch.inference_mode():
        assert torch.allclose(target.score(x + 0), gaussian_score(x), atol=1e-6)
    value, values_score = target.value_and_score(x)
    assert torch.allclose(value, gaussian(x)) and torch.allclose(values_score, gaussian_score(x), atol=1e-6)
    assert target.evaluations == 4 * len(x)
    assert not target.score(x).requires_grad
    # The derivative of |score|^2 / 2 is P P x.
    x.requires_grad_()
    (pulled,) = torch.autograd.grad(target.score(x).square().sum() / 2, x)
    precision = torch.linalg.inv(COVARIANCE)
    assert torch.allclose(pulled, x @ precision @ precision, atol=1e-6)


@pytest.mark.parametrize("transform", [None, transforms.AffineTransform(0.0, 2.0)])
def test_values_and_scores_in_float64_become_the_type_of_the_points(transform):
    target = load_target(
        lambda x: gaussian(x).double(), 2, score=lambda x: gaussian_score(x).double(), transform=transform
    )
    check_target(target)
    assert target.log_density(_points()).dtype == target.score(_points()).dtype == torch.float32


def test_a_score_that_is_constant_has_the_derivative_0():
    target = Target(lambda x: x.sum(1), 2)
    x = _points().requires_grad_()
    (pulled,) = torch.autograd.grad(target.score(x).sum(), x)
    assert torch.equal(pulled, torch.zeros_like(x))


def test_the_score_works_while_gradients_are_off_for_a_tensor_that_wants_them():
    with torch.no_grad():
        assert not load_target(gaussian, 2).score(_points().requires_grad_()).requires_grad


def lognormal(parameters):
    return LogNormal(0.0, 1.0).log_prob(parameters).sum(1)


def lognormal_score(parameters):
    return -(1 + parameters.log()) / parameters


@pytest.mark.parametrize("score", [None, lognormal_score])
@pytest.mark.parametrize("transform", [constraints.positive, transforms.ExpTransform()])
def test_the_log_of_a_lognormal_is_a_normal(transform, score):
    target = load_target(lognormal, 3, score=score, transform=transform)
    check_target(target)
    x = _points(3)
    assert torch.allclose(target.log_density(x), Normal(0.0, 1.0).log_prob(x).sum(1), atol=1e-5)
    assert torch.allclose(target.score(x), -x, atol=1e-5) and torch.allclose(target.constrained(x), x.exp())
    x.requires_grad_()
    (pulled,) = torch.autograd.grad(target.score(x).square().sum() / 2, x)
    assert torch.allclose(pulled, x, atol=1e-4)


def test_a_linear_transform_and_an_own_score():
    shift = transforms.AffineTransform(1.0, 2.0)
    target = load_target(gaussian, 2, score=gaussian_score, transform=shift)
    check_target(target)
    x = _points()
    assert torch.allclose(target.log_density(x), gaussian(1 + 2 * x) + 2 * math.log(2))
    assert torch.allclose(target.score(x), 2 * gaussian_score(1 + 2 * x), atol=1e-5)


def test_densities_on_an_interval_and_on_the_simplex_integrate_to_one():
    beta = load_target(lambda x: Beta(2.0, 3.0).log_prob(x).sum(1), 1, transform=constraints.unit_interval)
    grid = torch.linspace(-30, 30, 4001, dtype=torch.float64)
    assert float(beta.log_density(grid[:, None]).exp().sum() * (grid[1] - grid[0])) == pytest.approx(1, abs=1e-6)
    simplex = load_target(Dirichlet(torch.tensor([2.0, 3.0, 2.5])).log_prob, 2, transform=constraints.simplex)
    check_target(simplex)
    assert simplex.parameters == ["x1", "x2", "x3"]
    grid = torch.linspace(-12, 12, 241)
    masses = simplex.log_density(torch.cartesian_prod(grid, grid)).exp() * (grid[1] - grid[0]) ** 2
    assert float(masses.sum()) == pytest.approx(1, abs=1e-3)


def test_parts_with_transforms_of_their_own():
    parts = constraints.cat([constraints.positive, constraints.real], dim=1, lengths=[1, 2])

    def log_density(parameters):
        return LogNormal(0.0, 1.0).log_prob(parameters[:, 0]) + Normal(0.0, 1.0).log_prob(parameters[:, 1:]).sum(1)

    log_density.parameters = ["scale", "a", "b"]
    target = load_target(log_density, 3, transform=parts)
    check_target(target)
    x = _points(3)
    assert torch.allclose(target.log_density(x), Normal(0.0, 1.0).log_prob(x).sum(1), atol=1e-5)
    assert target.parameters == target.summary_names == ["scale", "a", "b"]
    assert torch.equal(target.summary(x), target.constrained(x))


def test_matrices_are_parameters_row_by_row():
    target = load_target(torch.distributions.LKJCholesky(3, 2.0).log_prob, 3, transform=constraints.corr_cholesky)
    check_target(target)
    factors = target.constrained(_points(3)).reshape(-1, 3, 3)
    assert torch.allclose((factors @ factors.mT).diagonal(dim1=1, dim2=2), torch.ones(6, 3), atol=1e-6)


FILE = """
import dataclasses
import torch
from torch.distributions import constraints

counter = []

@dataclasses.dataclass
class Scale:
    value: "float" = 2.0

def log_density(x):
    return -(x / Scale().value).square().sum(1) / 2

def score(x):
    counter.append(1)
    return -x / Scale().value ** 2

support = constraints.real
"""


def test_a_file_is_run_once_under_a_name_of_its_own(tmp_path):
    file = tmp_path / "own target.py"
    file.write_text(FILE)
    path = list(sys.path)
    target = load_target(f"{file}:log_density", 3, score=f"{file}:score", transform=f"{file}:support")
    check_target(target)
    assert target.name == "log_density" and sys.path == path and "own target" not in sys.modules
    x = _points(3)
    assert torch.allclose(target.score(x), -x / 4)
    assert load_target(f"{file}:log_density", 3)._log_density is not target._log_density  # run again: another module


DATA = torch.linspace(-1, 1, 100)


def _minibatch(x):
    return -(x[:, :1] - DATA[torch.randint(100, (10,))]).square().sum(1) * 10


TURNS = itertools.cycle([0, 1])


def _in_turns(x):
    return gaussian(x) + next(TURNS)


def _raises(x):
    raise RuntimeError("no such thing\nas that")


def _nan_gradient(x):
    return torch.where(x > 0, x.sqrt(), torch.zeros_like(x)).sum(1) - x.square().sum(1)


def _away(x):
    return torch.where(x[:, 0] > 2, torch.nan, gaussian(x))


BAD = {  # name: (log density, score, the words of the line)
    "not_a_tensor": (lambda x: 1.0, None, "target.log_density: it returns 'float'; expected a float tensor"),
    "column": (lambda x: gaussian(x)[:, None], None, "target.log_density: it returns [48, 1] of type float32"),
    "number": (lambda x: gaussian(x).sum(), None, "target.log_density: it returns [] of type float32"),
    "integers": (lambda x: x.sum(1).long(), None, "target.log_density: it returns [48] of type int64"),
    "raises": (_raises, None, "target.log_density: it raises RuntimeError: no such thing as that"),
    "leaves": (lambda x: sys.exit(3), None, "target.log_density: it raises SystemExit: 3"),
    "two_arguments": (lambda x, y: 0, None, "target.log_density: it raises TypeError"),
    "nan_somewhere": (_away, None, "target.log_density: nan at ["),
    "infinite": (lambda x: gaussian(x) + torch.inf, None, "target.log_density: inf at ["),
    "bounded": (
        lambda x: torch.where(x[:, 0] > 0, gaussian(x), -torch.inf),
        None,
        "; a bounded support needs a transform",
    ),
    "minibatch": (_minibatch, None, "a random or minibatch log density has a noisy score"),
    "in_turns": (_in_turns, None, "a random or minibatch log density has a noisy score"),
    "centred": (lambda x: gaussian(x - x.mean(0)), None, "each row must be worked out by itself"),
    "mean_of_the_batch": (lambda x: gaussian(x).mean().expand(len(x)), None, "each row must be worked out by itself"),
    "numpy": (lambda x: gaussian(torch.from_numpy(x.numpy())), None, "target.log_density: it raises RuntimeError"),
    "detached": (lambda x: gaussian(x.detach()), None, "target.log_density: autograd cannot differentiate it"),
    "nan_gradient": (_nan_gradient, None, "target.log_density: its gradient is nan in coordinate"),
    "other_score": (gaussian, lambda x: -x, "where autograd has"),
    "score_of_half": (gaussian, lambda x: gaussian_score(x) / 2, "target.score: "),
    "score_per_row": (gaussian, lambda x: gaussian_score(x).sum(1), "target.score: it returns [48] of type float32"),
    "score_raises": (gaussian, _raises, "target.score: it raises RuntimeError: no such thing as that"),
    "score_nan": (gaussian, lambda x: x * torch.nan, "target.score: nan in coordinate 1 at ["),
    "score_detached": (gaussian, lambda x: gaussian_score(x.detach()), "target.score: autograd cannot differentiate"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_target_is_refused_in_a_line_with_its_key(name):
    log_density, score, words = BAD[name]
    target = load_target(log_density, 2, score=score)
    with pytest.raises(ValueError) as refused:
        check_target(target)
    text = str(refused.value)
    assert text.startswith(("target.log_density: ", "target.score: ")) and words in text and "\n" not in text
    assert target.evaluations == 0 and len(text) < 300


def test_where_and_by_how_much_a_score_is_wrong():
    def wrong(x):
        return gaussian_score(x) + torch.tensor([0.0, 0.5])

    with pytest.raises(ValueError, match=r"^target.score: .* in coordinate 2 at \[.*\], where autograd .*: 0.5 apart$"):
        check_target(load_target(gaussian, 2, score=wrong))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"log_density": "bananas", "dim": 2}, "target.log_density: 'bananas'; expected one of banana, "),
        ({"log_density": "FOLDER/none.py:f", "dim": 2}, "target.log_density: there is no file "),
        ({"log_density": "FOLDER/file.py:none", "dim": 2}, "has no 'none'"),
        ({"log_density": "FOLDER/file.py:number", "dim": 2}, "target.log_density: 3 is not callable"),
        ({"log_density": "FOLDER/broken.py:f", "dim": 2}, "raises when it is run: ZeroDivisionError: division by zero"),
        ({"log_density": "FOLDER/syntax.py:f", "dim": 2}, "raises when it is run: SyntaxError"),
        ({"log_density": "FOLDER/leaves.py:f", "dim": 2}, "raises when it is run: SystemExit: 1"),
        ({"log_density": "FOLDER/file.txt:f", "dim": 2}, "expected one of banana, "),
        ({"log_density": 3, "dim": 2}, "target.log_density: 3 is not callable"),
        ({"log_density": None, "dim": 2}, "target.log_density: None is not callable"),
        ({"log_density": gaussian}, "target.dim: None; expected the number of coordinates"),
        ({"log_density": gaussian, "dim": 0}, "target.dim: 0; "),
        ({"log_density": gaussian, "dim": 2.0}, "target.dim: 2.0; "),
        ({"log_density": "banana", "dim": 3}, "target.dim: 3, but banana has 2 dimensions"),
        ({"log_density": "banana", "score": gaussian_score}, "target.score: banana is shipped and takes none"),
        ({"log_density": gaussian, "dim": 2, "score": "FOLDER/none.py:f"}, "target.score: there is no file "),
        ({"log_density": gaussian, "dim": 2, "score": 4}, "target.score: 4 is not callable"),
        ({"log_density": gaussian, "dim": 2, "transform": "exp"}, "target.transform: 'exp'; expected path"),
        ({"log_density": gaussian, "dim": 2, "transform": torch.exp}, "is neither a transform nor a constraint"),
        ({"log_density": gaussian, "dim": 2, "transform": constraints.corr_cholesky}, "target.transform: it raises"),
        ({"log_density": gaussian, "dim": 2, "transform": constraints.boolean}, "target.transform: it raises"),
    ],
)
def test_what_cannot_be_loaded_is_a_line_with_its_key(tmp_path, arguments, words):
    (tmp_path / "file.py").write_text("number = 3\ndef f(x): return x\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "syntax.py").write_text("def f(:\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(1)\n")
    (tmp_path / "file.txt").write_text("def f(x): return x\n")
    arguments = {
        key: value.replace("FOLDER", str(tmp_path)) if isinstance(value, str) else value
        for key, value in arguments.items()
    }
    with pytest.raises(ValueError) as refused:
        load_target(**arguments)
    text = str(refused.value)
    assert words in text and text.startswith("target.") and "\n" not in text


def test_names_of_another_number_than_the_parameters():
    def log_density(x):
        return gaussian(x)

    log_density.parameters = ["a", "b", "c"]
    with pytest.raises(ValueError, match="^target.log_density: its `parameters` are 3 names for 2 parameters"):
        load_target(log_density, 2)
