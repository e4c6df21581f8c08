"""Bridges: a Gaussian and a mixture in closed form, how paths are paired, what is refused; the auxiliary score."""

import functools
import math

import pytest
import torch
from torch.distributions import Beta, LogNormal, constraints

from hsivi_fast.config import BridgeConfig
from hsivi_fast.density.annealing import Bridge, find_bridge
from hsivi_fast.density.target import load_target
from hsivi_fast.density.teacher import BridgeTeacher, ToTarget, target_of, transform_of

MEAN = torch.tensor([1.0, -2.0, 0.5])
FACTOR = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.6, 0.0], [-0.3, 0.2, 0.4]])
PRECISION = torch.linalg.inv(FACTOR @ FACTOR.T)


def gaussian(x):
    difference = x - MEAN.to(x)
    return -((difference @ PRECISION.to(x)) * difference).sum(1) / 2


def mixture(x):
    """0.7 N((-4, 0), 1) + 0.3 N((4, 0), 1): as good as apart."""
    squares = torch.stack([(x - torch.tensor([place, 0.0]).to(x)).square().sum(1) for place in (-4.0, 4.0)], 1)
    return torch.logsumexp(torch.tensor([0.7, 0.3]).to(x).log() - squares / 2, 1)


def _found(log_density, dim, nfe=3, particles=200, moves=3, seed=0, **settings):
    """A bridge that is found in a moment, unless settings say otherwise."""
    settings = BridgeConfig(**{"chains": 100, "moves": 40, **settings})
    return find_bridge(load_target(log_density, dim), nfe, settings, particles, moves, seed)


@functools.cache
def _of_gaussian():
    return find_bridge(load_target(gaussian, 3), 4, BridgeConfig(chains=2000, moves=100), 1000, 10, 0)


def _whitened(points, mean, factor):
    return torch.linalg.solve_triangular(factor, (points - mean).T, upper=False).T


def _errors(points):
    """(of the mean, of the covariance) of draws of the Gaussian, in coordinates in which it is N(0, I)."""
    white = _whitened(points, MEAN, FACTOR)
    return float(white.mean(0).abs().max()), float((torch.cov(white.T) - torch.eye(3)).abs().max())


def test_the_base_of_a_gaussian_is_that_gaussian():
    """Within 4 standard errors of 2000 chains: 4 / sqrt(2000), and the root of 2 of that for variances."""
    bridge = _of_gaussian()
    assert torch.equal(bridge.factor, bridge.factor.tril()) and bool((bridge.factor.diagonal() > 0).all())
    relative = torch.linalg.solve_triangular(FACTOR, bridge.factor, upper=False)
    assert float(_whitened(bridge.mean[None], MEAN, FACTOR).abs().max()) < 0.09
    assert float((relative @ relative.T - torch.eye(3)).abs().max()) < 0.13


def test_levels_fall_from_one_to_zero_and_scales_are_those_of_the_densities():
    bridge = _of_gaussian()
    assert bridge.levels[0] == 1 and bridge.levels[-1] == 0 and bool((bridge.levels[1:] < bridge.levels[:-1]).all())
    assert bridge.levels.shape == bridge.scales.shape == (5,)
    assert bridge.above.shape == bridge.below.shape == (4, 1000, 3)
    # In the coordinates of the base every density is N(0, I): the squared score is chi^2 with 3 degrees.
    assert bridge.scales == pytest.approx([min(1, math.sqrt(3 / 2.366))] * 5, abs=0.05)
    assert bridge.evaluations > 2000 * 100


def test_particles_have_the_moments_of_their_densities():
    """At the target those of it, and at the base those of N(0, I): within 4 standard errors, and what a step adds."""
    bridge = _of_gaussian()
    of_mean, of_covariance = _errors(bridge.to_target(bridge.below[0]))
    assert of_mean < 0.1 and of_covariance < 0.2
    at_base = bridge.above[-1]
    assert float(at_base.mean(0).abs().max()) < 0.13
    assert float((torch.cov(at_base.T) - torch.eye(3)).abs().max()) < 0.18


def test_the_densities_between_have_their_own_moments():
    """Between N(0, 1) and N(m, s^2), log densities in lambda: a Gaussian of precision (1 - lambda) + lambda / s^2."""
    mean, deviation = 3.0, 0.5
    bridge = _found(
        lambda x: -((x - mean) / deviation).square().sum(1) / 2,
        1,
        nfe=4,
        particles=2000,
        moves=10,
        mean=(0.0,),
        scale=(1.0,),
        schedule="linear",
    )
    assert bridge.levels.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    for k, level in enumerate(bridge.levels[1:-1], start=1):
        precision = 1 - level + level / deviation**2
        exact = level * mean / deviation**2 / precision
        states = bridge.above[k - 1]
        assert float(states.mean()) == pytest.approx(exact, abs=4 / math.sqrt(2000 * precision)), k
        assert float(states.std()) == pytest.approx(precision**-0.5, rel=0.08), k
        assert bridge.scales[k] == pytest.approx(math.sqrt(1 / 0.455 / precision), rel=0.15), k


@pytest.mark.parametrize("schedule", ["adaptive", "cosine"])
def test_a_mixture_keeps_its_weights(schedule):
    """0.7 within 0.06: 4 standard errors of 1000 particles that were resampled a few times."""
    settings = BridgeConfig(spread=4.0, chains=300, moves=100, schedule=schedule)
    bridge = find_bridge(load_target(mixture, 2), 3, settings, 1000, 5, 1)
    points = bridge.to_target(bridge.below[0])
    left = points[:, 0] < 0
    assert float(left.float().mean()) == pytest.approx(0.7, abs=0.06)
    for side, place in ((left, -4.0), (~left, 4.0)):
        assert points[side].mean(0).tolist() == pytest.approx([place, 0], abs=0.25)
        assert points[side].std(0).tolist() == pytest.approx([1, 1], abs=0.2)


STILL = {"noise": 1e-12, "schedule": "linear"}  # the last step of a path as good as stands


def _close_rows(own, other):
    """For each of own [N, d] how far the nearest of the others is."""
    return torch.cdist(own.double(), other.double()).amin(1)


def test_transport_pairs_the_states_of_two_knots_by_the_least_distance():
    """In one dimension that keeps the order; each state of the lower knot is used once."""
    bridge = _found(lambda x: -(x - 2).square().sum(1) * 2, 1, mean=(0.0,), scale=(1.0,), coupling="transport", **STILL)
    for k in (2, 3):
        below, states = bridge.below[k - 1, :, 0], bridge.above[k - 2, :, 0]
        torch.testing.assert_close(below.sort().values, states.sort().values, rtol=1e-4, atol=1e-4)
        order = bridge.above[k - 1, :, 0].argsort()
        assert bool((below[order].diff() > -1e-4).all())


def test_descent_pairs_states_with_those_of_the_same_knot_that_the_weights_keep():
    bridge = _found(lambda x: -(x - 2).square().sum(1) * 2, 1, mean=(0.0,), scale=(1.0,), coupling="descent", **STILL)
    for k in (1, 2, 3):
        below, above = bridge.below[k - 1], bridge.above[k - 1]
        assert float(_close_rows(below, above).max()) < 1e-4
        assert len(set(below.mul(1e3).round()[:, 0].tolist())) < 0.95 * len(below)  # some are kept twice
        assert float(below.mean()) > float(above.mean())  # towards the target, by their weights
        assert bool((below[above[:, 0].argsort(), 0].diff() > -1e-4).all())


@pytest.mark.parametrize("dim, own_knot", [(3, False), (4, True)])
def test_the_coupling_is_transport_up_to_three_dimensions(dim, own_knot):
    bridge = _found(lambda x: -(x - 1).square().sum(1) * 2, dim, mean=(0.0,), scale=(1.0,), particles=60, **STILL)
    same, next_knot = (
        float(_close_rows(bridge.below[1], states).max()) for states in (bridge.above[1], bridge.above[0])
    )
    assert (same < 1e-3) == own_knot and (next_knot < 1e-3) == (not own_knot)


def test_a_path_s_last_step_has_the_noise_that_is_asked_for():
    """Four Langevin steps of N(0, 1) from x: together a deviation near root(noise) x scale."""
    settings = {"mean": (0.0,), "scale": (1.0,), "noise": 0.5}
    bridge = _found(lambda x: -x.square().sum(1) / 2, 1, particles=1500, moves=1, nfe=1, **settings)
    differences = bridge.below[0] - bridge.above[0]  # transport of N(0, 1) to itself moves little
    assert float(differences.std()) == pytest.approx(math.sqrt(0.5), rel=0.1)


def test_the_same_seed_is_the_same_bridge_bit_for_bit():
    first, again, other = (_found(mixture, 2, seed=seed).tensors() for seed in (3, 3, 4))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["above"], other["above"]) and not torch.equal(first["mean"], other["mean"])


def test_a_given_base_is_used():
    bridge = _found(gaussian, 3, mean=(0.0, -1.0, 1.0), scale=(2.0,))
    assert bridge.mean.tolist() == [0, -1, 1] and torch.equal(bridge.factor, 2 * torch.eye(3))
    told = []
    settings = BridgeConfig(mean=(0.0,), scale=(1.0, 2.0, 3.0))
    again = find_bridge(load_target(gaussian, 3), 2, settings, 50, 2, 0, on_progress=told.append)
    assert torch.equal(again.factor, torch.diag(torch.tensor([1.0, 2.0, 3.0]))) and again.mean.tolist() == [0] * 3
    assert sum(told) == again.evaluations and again.evaluations % 50 == 0


def test_every_gradient_evaluation_is_counted():
    target = load_target(gaussian, 3)
    bridge = find_bridge(target, 2, BridgeConfig(chains=20, moves=10), 50, 2, 0)
    assert bridge.evaluations == target.evaluations


IMPROPER = {
    "constant": lambda x: 0 * x.sum(1),
    "growing": lambda x: x.square().sum(1),
    "linear": lambda x: x.sum(1),
    "flat in one direction": lambda x: -x[:, 0].square(),
}


@pytest.mark.parametrize("given", [{}, {"mean": (0.0,), "scale": (1.0,)}], ids=["fitted", "given"])
@pytest.mark.parametrize("name", IMPROPER)
def test_an_improper_target_is_one_line(name, given):
    if given and name == "flat in one direction":
        pytest.skip("the identity of the other direction is half of the whole")
    with pytest.raises(ValueError) as refused:
        _found(IMPROPER[name], 2, particles=50, **given)
    message = str(refused.value)
    assert message.startswith("target.log_density: its chains do not settle: it has no finite integral")
    assert "\n" not in message and "bridge.spread = 2.0" in message


def test_heavy_tails_and_narrow_and_far_targets_are_no_improper_ones():
    heavy = _found(lambda x: -3 * torch.log1p(x.square() / 5).sum(1), 1, chains=500)  # Student's t with 5 degrees
    assert float(heavy.to_target(heavy.below[0]).median()) == pytest.approx(0, abs=0.3)
    target = load_target(lambda x: -((x - 100) / 0.01).square().sum(1) / 2, 2)
    far = find_bridge(target, 3, BridgeConfig(chains=100, moves=400), 50, 2, 0)
    assert far.mean.tolist() == pytest.approx([100, 100], abs=0.01)
    assert far.factor.diagonal().tolist() == pytest.approx([0.01, 0.01], rel=0.4)


def test_a_target_that_is_nowhere_finite_at_a_given_base_is_one_line():
    with pytest.raises(ValueError, match="^target.log_density: it is finite at none of the particles"):
        _found(lambda x: torch.where(x[:, 0] > 50, -x.square().sum(1), -torch.inf), 1, mean=(0.0,), scale=(1.0,))


def test_what_is_no_number_far_out_is_never_a_particle():
    bridge = _found(lambda x: -x.square().sum(1) / 2 + torch.where(x[:, 0] > 2, torch.nan, 0.0), 1, noise=1e-6)
    points = bridge.to_target(bridge.below[0])
    assert bool(torch.isfinite(points).all()) and float(points.max()) < 2.01


# As a file.


def test_a_bridge_comes_back_from_its_tensors():
    bridge = _found(gaussian, 3)
    again = Bridge.of_tensors(bridge.tensors())
    for name, value in bridge.tensors().items():
        assert torch.equal(value, again.tensors()[name]), name
    assert again.evaluations == bridge.evaluations and again.levels.dtype == bridge.levels.dtype


DAMAGES = {
    "missing": (lambda tensors: tensors.pop("below"), "below is missing"),
    "mean": (lambda tensors: tensors.update(mean=torch.zeros(2)), r"factor is of shape \[3, 3\]"),
    "factor": (lambda tensors: tensors.update(factor=torch.eye(2)), r"factor is of shape \[2, 2\]"),
    "levels": (lambda tensors: tensors.update(levels=torch.zeros(3).double()), r"scales is of shape \[4\]"),
    "scales": (lambda tensors: tensors["scales"].fill_(math.nan), r"scales is of shape \[4\] or not finite"),
    "above": (lambda tensors: tensors.update(above=tensors["above"][0]), r"above is of shape \[200, 3\]"),
    "below": (lambda tensors: tensors.update(below=tensors["below"][:, :7]), r"below is of shape \[3, 7, 3\]"),
    "below_inf": (lambda tensors: tensors["below"].mul_(math.inf), "below is of shape .* or not finite"),
    "evaluations": (lambda tensors: tensors.update(evaluations=torch.zeros(2)), r"evaluations is of shape \[2\]"),
    "bfloat16": (lambda tensors: tensors.update(levels=tensors["levels"].bfloat16()), "levels is of type bfloat16"),
    "integers": (lambda tensors: tensors.update(mean=tensors["mean"].long()), "mean is of type int64"),
    "rising": (lambda tensors: tensors.update(levels=tensors["levels"].flip(0)), "levels do not fall from 1 to 0"),
    "scale": (lambda tensors: tensors["scales"].zero_(), "scales are not positive"),
    "singular": (lambda tensors: tensors["factor"].zero_(), "factor is not lower triangular with a positive diagonal"),
    "upper": (lambda tensors: tensors.update(factor=torch.ones(3, 3)), "factor is not lower triangular"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_of_its_tensors_is_one_line(damage):
    tensors = {name: value.clone() for name, value in _small().tensors().items()}
    change, message = DAMAGES[damage]
    change(tensors)
    with pytest.raises(ValueError, match=message) as refused:
        Bridge.of_tensors(tensors)
    assert "\n" not in str(refused.value)


@functools.cache
def _small():
    return _found(gaussian, 3)


# For training and sampling.


def test_the_teacher_of_a_gaussian_is_minus_the_score_of_its_geometric_mean():
    """log p_k is quadratic: its score is -(1 - l) u - l F^T P (mean + F u - m)."""
    bridge = _found(gaussian, 3, mean=(0.0, -1.0, 1.0), scale=(2.0, 1.0, 0.5))
    teacher = BridgeTeacher(load_target(gaussian, 3), bridge)
    u = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    factor, mean = torch.diag(torch.tensor([2.0, 1.0, 0.5])), torch.tensor([0.0, -1.0, 1.0])
    pulled = (mean + u @ factor.T - MEAN) @ PRECISION @ factor
    for k, level in enumerate(bridge.levels.tolist()):
        got = teacher(u, torch.full((8,), k))
        torch.testing.assert_close(got, (1 - level) * u + level * pulled, rtol=1e-5, atol=1e-5)
    mixed = teacher(u, torch.arange(8) % 4)  # each row has its own knot
    torch.testing.assert_close(mixed[5], teacher(u[5:6], torch.tensor([1]))[0])
    torch.testing.assert_close(teacher(u, torch.full((8,), 3)), u)  # the base's own
    assert not any(True for _ in teacher.parameters()) and not teacher.state_dict()


def test_the_teacher_is_differentiable_twice():
    bridge = _found(lambda x: -x.pow(4).sum(1) - (x[:, 0] * x[:, 1]).square(), 2)
    teacher = BridgeTeacher(load_target(lambda x: -x.pow(4).sum(1) - (x[:, 0] * x[:, 1]).square(), 2), bridge).double()
    u = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    k = torch.tensor([0, 1, 2, 3])
    assert torch.autograd.gradcheck(lambda points: teacher(points, k), u)
    assert torch.autograd.gradgradcheck(lambda points: teacher(points, k), u)
    jacobian = torch.autograd.functional.jacobian(lambda points: teacher(points, k).sum(0), u.detach())
    torch.testing.assert_close(jacobian[0, :, 1], jacobian[1, :, 0])  # of a gradient field: symmetric
    assert not teacher(u.detach(), k).requires_grad


def test_draws_with_constraints_have_the_distribution_of_torch():
    """A log-normal and a beta density: a normal bridge in the unconstrained coordinates, and back."""
    exact = (LogNormal(0.3, 0.4), Beta(4.0, 2.0))

    def log_density(parameters):
        return exact[0].log_prob(parameters[:, 0]) + exact[1].log_prob(parameters[:, 1])

    names = ("positive", "unit_interval")
    target = load_target(log_density, 2, transform=transform_of(names))
    bridge = find_bridge(target, 2, BridgeConfig(chains=300, moves=60), 2000, 10, 0)
    draws = ToTarget(bridge.mean, bridge.factor, names)(bridge.below[0])
    for column, distribution in enumerate(exact):
        values, deviation = draws[:, column], float(distribution.stddev)
        assert bool(distribution.support.check(values).all())
        assert float(values.mean()) == pytest.approx(float(distribution.mean), abs=0.12 * deviation)
        assert float(values.std()) == pytest.approx(deviation, rel=0.12)


def test_to_target_is_the_transform_of_torch():
    bridge = _found(gaussian, 3)
    u = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    x = bridge.mean + u @ bridge.factor.T
    plain = ToTarget(bridge.mean, bridge.factor)
    assert torch.equal(plain(u), plain.unconstrained(u)) and plain.image_shape((3,)) == (3,)
    torch.testing.assert_close(plain(u), x)
    torch.testing.assert_close(ToTarget(bridge.mean, bridge.factor, "real")(u), x)
    torch.testing.assert_close(ToTarget(bridge.mean, bridge.factor, "positive")(u), x.exp())
    mixed = ToTarget(bridge.mean, bridge.factor, ("positive", "unit_interval", "real"))(u)
    torch.testing.assert_close(mixed, torch.stack([x[:, 0].exp(), x[:, 1].sigmoid(), x[:, 2]], 1))
    simplex = ToTarget(bridge.mean, bridge.factor, "simplex")
    assert simplex.image_shape((3,)) == (4,)
    torch.testing.assert_close(simplex(u), torch.distributions.biject_to(constraints.simplex)(x))
    matrices = ToTarget(bridge.mean, bridge.factor, "corr_cholesky")
    assert matrices.image_shape((3,)) == (9,)
    assert matrices(u)[:, [0, 1, 2, 5]].tolist() == [[1, 0, 0, 0]] * 5  # row by row: nothing above the diagonal


@pytest.mark.parametrize(
    "name, message",
    [
        ("positiv", "target.constraints: 'positiv' is no constraint of torch.distributions, as real, positive"),
        ("Constraint", "target.constraints: 'Constraint' is no constraint"),
        ("interval", "target.constraints: 'interval' is no constraint"),
        ("lower_cholesky", "target.constraints: 'lower_cholesky' has no transform from real numbers"),
        ("boolean", "target.constraints: 'boolean' has no transform from real numbers"),
        (("positive", "integer_interval", "real"), "target.constraints: 'integer_interval' is no constraint"),
        (("positive", "simplex", "real"), "target.constraints: 'simplex' is of several coordinates"),
        (("positive", "nonnegative_integer", "real"), "target.constraints: 'nonnegative_integer' has no transform"),
    ],
)
def test_an_unknown_constraint_is_one_line(name, message):
    with pytest.raises(ValueError) as refused:
        transform_of(name)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_a_run_s_target_has_its_constraints_and_names(tmp_path):
    from hsivi_fast.config import TargetConfig

    file = tmp_path / "mine.py"
    file.write_text("def f(x):\n    return -(x.log() ** 2).sum(1) / 2\n")
    settings = TargetConfig(f"{file}:f", 2, constraints="positive", parameters=("a", "b"))
    target = target_of(settings, "cpu")
    assert target.parameters == ["a", "b"] and target.constrained(torch.zeros(1, 2)).tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="^target.parameters: 3 names for 2 parameters"):
        target_of(TargetConfig(f"{file}:f", 2, constraints="positive", parameters=("a", "b", "c")), "cpu")
