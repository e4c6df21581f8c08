"""Rollouts: every stored pair is a layer of the student at its address, and a cycle follows from (run seed, cycle)."""

import pytest
import torch

from hsivi_fast import ops
from hsivi_fast.build import build_context
from hsivi_fast.config import load_config
from hsivi_fast.method.layers import attach_log_gamma
from hsivi_fast.nets import build_unet
from hsivi_fast.parallel.world import ALONE
from hsivi_fast.training.rollout import Batch, build_rollout, draw_layers, one_layer_on

NFE, BATCH, CYCLE = 4, 6, 5


def _setting(*overrides):
    """(layers, student, rollout) of a run in the plane."""
    sizes = [f"nfe={NFE}", f"train.batch_size={BATCH}", f"train.f_learning_times={CYCLE}"]
    context = build_context(
        load_config("toy2d", [*sizes, "objective.match=knots", "eta=1.0", "device=cpu", "seed=3", *overrides]), ALONE
    )
    torch.manual_seed(0)
    student = build_unet("toy2d")
    torch.nn.init.normal_(student.layers[-1].weight, std=0.1)
    attach_log_gamma(student, context.layers)
    with torch.no_grad():
        student.log_scaled_gamma.fill_(0.3)
    return context.layers, student, build_rollout(context, student)


@torch.no_grad()
def _trajectory(student, layers, seed):
    """x_K .. x_0 of one seed, by hand."""
    seeds = torch.tensor([seed])
    states = {layers.nfe: ops.draw_noise(seeds, 0, (2,))}
    for current in range(layers.nfe, 0, -1):
        k, x = torch.tensor([current]), states[current]
        states[current - 1] = layers.step(x, student(x, layers.tau[k]), student.log_scaled_gamma, ops.Noise(seeds, k))
    return states


def test_layers_are_antithetic_and_uniform():
    for batch_size in (6, 7):
        k = draw_layers(1, 2, 3, batch_size, 10)
        half = batch_size // 2 + 1
        assert len(k) == batch_size and k.min() >= 1 and k.max() <= 10
        assert torch.equal(k[half:], 11 - k[: batch_size - half])
    counts = torch.bincount(draw_layers(0, 2, 1, 100000, 10), minlength=11)[1:].double()
    assert (counts / 10000 - 1).abs().max() < 0.06
    assert not torch.equal(draw_layers(1, 2, 3, 50, 10), draw_layers(1, 2, 4, 50, 10))


def test_pool_serves_every_transition_once_and_exactly():
    layers, student, rollout = _setting()
    rollout.start_cycle(cycle=2)
    assert rollout.trajectories == -(-CYCLE * BATCH // NFE) == 8
    served = set()
    for step in range(2 * CYCLE, 3 * CYCLE):
        batch = rollout.score_net_batch(step)
        assert batch.x.shape == (BATCH, 2)
        for x, k, seed in zip(batch.x, batch.noise.stream, batch.noise.seeds):
            expected = _trajectory(student, layers, int(seed))[int(k) - 1][0]
            torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
            served.add((int(seed), int(k)))
    assert len(served) == CYCLE * BATCH


def test_student_states_come_from_the_pool_with_new_noise():
    layers, student, rollout = _setting()
    rollout.start_cycle(cycle=2)
    batch = rollout.student_batch(3 * CYCLE)
    trajectories = [_trajectory(student, layers, int(seed)) for seed in rollout.seeds]
    for x, k, seed in zip(batch.x, batch.noise.stream, batch.noise.seeds):
        assert min(float((states[int(k)][0] - x).abs().max()) for states in trajectories) < 1e-5
        assert int(seed) not in rollout.seeds.tolist()
    assert torch.equal(batch.noise.stream, draw_layers(3, 3, 3 * CYCLE, BATCH, NFE))


def test_redraw_uses_each_mean_several_times_with_new_noise():
    layers, student, rollout = _setting("rollout.redraw=2")
    rollout.start_cycle(cycle=1)
    assert rollout.trajectories == 4
    served = {}
    for step in range(CYCLE, 2 * CYCLE):
        batch = rollout.score_net_batch(step)
        for x, k, seed, draw in zip(batch.x, batch.noise.stream, batch.noise.seeds, batch.noise.draw):
            higher = _trajectory(student, layers, int(seed))[int(k)]
            noise = ops.Noise(seed.reshape(1), k.reshape(1), int(draw))
            with torch.no_grad():
                eps_hat = student(higher, layers.tau[noise.stream])
                expected = layers.step(higher, eps_hat, student.log_scaled_gamma, noise)
            torch.testing.assert_close(x, expected[0], rtol=1e-5, atol=1e-5)
            served[int(seed), int(k), int(draw)] = x
    assert len(served) == CYCLE * BATCH
    assert {draw for _, _, draw in served} == {0, 1}
    again = [(served[seed, k, 0], x) for (seed, k, draw), x in served.items() if draw == 1 and (seed, k, 0) in served]
    assert again and all(float((first - second).abs().max()) > 1e-4 for first, second in again)


@pytest.mark.parametrize("overrides", [[], ["rollout.redraw=2"], ["rollout.mode=fresh"]])
def test_a_rollout_can_be_made_again(overrides):
    _, _, first = _setting(*overrides)
    _, _, second = _setting(*overrides, "rollout.chunk=3")
    for rollout in (first, second):
        rollout.start_cycle(cycle=4)
    for step in (4 * CYCLE, 4 * CYCLE + 3):
        for one, other in (
            (first.score_net_batch(step), second.score_net_batch(step)),
            (first.student_batch(step), second.student_batch(step)),
        ):
            assert torch.equal(one.noise.stream, other.noise.stream) and torch.equal(one.noise.seeds, other.noise.seeds)
            torch.testing.assert_close(one.x, other.x, rtol=1e-5, atol=1e-6)  # another chunk, another rounding


def test_fresh_states_are_their_trajectories():
    layers, student, rollout = _setting("rollout.mode=fresh")
    for batch, below in ((rollout.student_batch(5), 0), (rollout.score_net_batch(5), 1)):
        for x, k, seed in zip(batch.x, batch.noise.stream, batch.noise.seeds):
            expected = _trajectory(student, layers, int(seed))[int(k) - below][0]
            torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_two_runs_share_no_trajectory():
    _, _, first = _setting()
    _, _, second = _setting("seed=4")
    first.start_cycle(1)
    second.start_cycle(1)
    seeds = first.seeds.tolist()
    first.start_cycle(2)
    assert not set(seeds) & set(second.seeds.tolist()) and not set(seeds) & set(first.seeds.tolist())


def test_one_layer_on_keeps_the_address():
    layers, student, _ = _setting()
    seeds, k, draw = torch.tensor([5, 6, 7]), torch.tensor([1, 4, 2]), torch.tensor([0, 1, 2])
    batch = Batch(torch.randn(3, 2), ops.Noise(seeds, k, draw))
    lower = one_layer_on(student, layers, student.log_scaled_gamma, batch)
    assert lower.noise.seeds is seeds and lower.noise.draw is draw and lower.noise.stream is k
    given = torch.stack([ops.draw_noise(seeds[n : n + 1], int(k[n]), (2,), int(draw[n]))[0] for n in range(3)])
    eps_hat = student(batch.x, layers.tau[k])
    expected = layers.step(batch.x, eps_hat, student.log_scaled_gamma, ops.Noise(None, k, given=given))
    torch.testing.assert_close(lower.x, expected.detach())
