"""Noise by address: the integers are Random123's, the normals are Box-Muller's, and an address is all that counts."""

import numpy as np
import pytest
import torch
from random123 import KNOWN_ANSWERS

from hsivi_fast.ops import philox

FULL = 0xFFFFFFFF


def _words(values):
    return [torch.tensor([value]) for value in values]


@pytest.mark.parametrize("key, counter, expected", KNOWN_ANSWERS)
def test_known_answers(key, counter, expected):
    assert tuple(int(word) for word in philox.philox4x32(_words(key), _words(counter))) == expected


def test_normals_are_box_muller_of_the_words_in_float64():
    seeds, stream, redraw = torch.tensor([5, -3, 1 << 40]), torch.tensor([1, 7, 2]), 4
    z = philox.normal(seeds, stream, (18,), redraw)
    for sample in range(3):
        seed = int(seeds[sample])
        for group in range(5):
            words = philox.philox4x32(
                _words((seed & FULL, (seed >> 32) & FULL)), _words((group, int(stream[sample]), redraw, 0))
            )
            u = [
                np.float64(np.float32(w if w < 2**31 else FULL - w) * np.float32(4.6566127342e-10))
                for w in map(int, words)
            ]
            expected = []
            for first, second in ((u[0], u[1]), (u[2], u[3])):
                radius, angle = np.sqrt(-2 * np.log(max(first, 1e-7))), 2 * np.pi * second
                expected += [radius * np.cos(angle), radius * np.sin(angle)]
            got = z[sample, 4 * group : 4 * group + 4].numpy()
            np.testing.assert_allclose(got, expected[: len(got)], atol=2e-6)


def test_a_sample_depends_on_its_address_alone():
    seeds = torch.arange(100, 110)
    together = philox.normal(seeds, 3, (3, 5, 7))
    for index in (0, 4, 9):
        alone = philox.normal(seeds[index : index + 1], torch.tensor([3]), (3, 5, 7))
        assert torch.equal(alone[0], together[index])
    assert torch.equal(philox.normal(seeds, 3, (105,)).reshape(10, 3, 5, 7), together)
    assert torch.equal(philox.normal(seeds, 3, (20,)), philox.normal(seeds, 3, (105,))[:, :20])


def test_seed_stream_and_redraw_give_unrelated_numbers():
    n = 40000
    draws = [
        philox.normal(torch.tensor([seed]), stream, (n,), redraw)[0]
        for seed, stream, redraw in ((0, 0, 0), (1, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    correlations = np.corrcoef(torch.stack(draws).numpy()) - np.eye(len(draws))
    assert np.abs(correlations).max() < 5 / np.sqrt(n)


def test_moments_of_a_million_normals():
    z = philox.normal(torch.arange(1000), 1, (1000,)).double()
    assert abs(z.mean()) < 0.004 and abs(z.var() - 1) < 0.006
    assert abs((z**3).mean()) < 0.01 and abs((z**4).mean() - 3) < 0.03
    assert z.abs().max() < 5.68


def test_a_tensor_of_redraws_is_each_redraw_alone():
    seeds = torch.tensor([1, 2, 3])
    mixed = philox.normal(seeds, 2, (6,), torch.tensor([0, 5, 1]))
    for index, redraw in enumerate((0, 5, 1)):
        assert torch.equal(mixed[index], philox.normal(seeds[index : index + 1], 2, (6,), redraw)[0])


def test_integers_of_two_purposes_counters_or_runs_differ():
    base = philox.integers(7, 1, 3, 1000)
    assert len(set(base.tolist())) == 1000
    for other in (
        philox.integers(8, 1, 3, 1000),
        philox.integers(7, 2, 3, 1000),
        philox.integers(7, 1, 4, 1000),
        philox.integers(7, 1, 3 + (1 << 32), 1000),
    ):
        assert not (base == other).any()
    assert torch.equal(philox.integers(7, 1, 3, 10), base[:10])


def test_compiled_words_equal_eager_words():
    """Inductor has returned wrong integers for a counter that is a bare arange, without an error."""
    seeds, stream = torch.tensor([3, -1, 1 << 50]), torch.tensor([1, 2, 5])
    compiled = torch.compile(lambda: torch.stack(philox._words(seeds, stream, 300, 2)), fullgraph=True, dynamic=False)
    assert torch.equal(compiled(), torch.stack(philox._words(seeds, stream, 300, 2)))
