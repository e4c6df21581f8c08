"""The sampler: an image is a function of its seed, and DDIM is the same code with the teacher in it."""

import pytest
import torch
from contexts import context_with_teacher

from hsivi_fast import load_config, sample
from hsivi_fast.build import build_context
from hsivi_fast.data import to_uint8
from hsivi_fast.execution import EAGER
from hsivi_fast.metrics.features import feature_extractor
from hsivi_fast.parallel.world import ALONE
from hsivi_fast.sampling.sampler import NO_CLASSES, Batches, ddim_sampler, load_sampler


@pytest.fixture(scope="module")
def context():
    return context_with_teacher(load_config("digits"))


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_an_image_does_not_depend_on_its_batch(context, eta):
    sampler = ddim_sampler(context, 5, eta)
    seeds = range(64)
    whole = sampler(seeds, batch_size=64)
    for batch_size in (1, 7):
        other = sampler(seeds, batch_size=batch_size)
        assert float((other - whole).abs().max()) <= 1e-5
        levels = (to_uint8(other).int() - to_uint8(whole).int()).abs()
        assert int(levels.max()) <= 1 and float((levels > 0).float().mean()) <= 1e-4
    assert float((sampler([40], batch_size=1)[0] - whole[40]).abs().max()) <= 1e-5


def test_the_last_batch_of_many_is_as_large_as_the_others_on_a_gpu():
    """Its libraries choose their kernels by the batch. A batch of its own choice costs a caller nothing more."""
    batches, drawn, gpu = Batches(EAGER, NO_CLASSES), [], torch.device("meta")  # any device but a CPU

    def draw(seeds, labels):
        drawn.append(len(seeds))
        return seeds

    for count, batch_size, expected in (
        (4, 250, [4]),
        (600, 250, [250, 250, 250]),
        (100, 250, [250]),  # as a command hands on what is left
        (3, 2, [2, 2]),
        (1, 1, [1]),
    ):
        drawn.clear()
        assert batches(draw, range(count), gpu, batch_size).shape == (count,) and drawn == expected


@pytest.mark.gpu
def test_an_image_on_a_gpu_depends_on_its_batch_by_rounding_alone():
    """In one batch size its place is of no matter. Another one may be computed by other kernels: in float32 that is
    rounding, which the way down amplifies about 25-fold.
    """
    config = load_config("digits", ["device=cuda"])
    sampler = ddim_sampler(build_context(config, ALONE, teacher=True), 5, 0.6)
    whole = sampler(range(64), batch_size=64)
    assert torch.equal(sampler(range(63, -1, -1), batch_size=64).flip(0), whole)
    for batch_size in (1, 7):
        other = ddim_sampler(build_context(config, ALONE, teacher=True), 5, 0.6)(range(64), batch_size=batch_size)
        assert float((other - whole).abs().max()) <= 1e-4


def test_more_ddim_steps_keep_a_seed_s_image(context):
    """x_K is drawn at stream 0 whatever the NFE, and the ODE that eta 0 follows has one solution."""
    few, many = (ddim_sampler(context, nfe, 0.0)(range(32)) for nfe in (20, 50))
    other = ddim_sampler(context, 50, 0.0)(range(32, 64))
    near, far = (float((x - many).square().mean()) for x in (few, other))
    assert near < 0.2 * far


def test_eta_zero_needs_no_layer_noise_and_eta_one_has_it(context):
    first, second = (ddim_sampler(context, 5, eta)(range(8)) for eta in (0.0, 1.0))
    assert float((first - second).abs().mean()) > 0.1


def test_doubled_knots_are_dropped_in_a_baseline(context):
    assert ddim_sampler(context, 10, 0.0).nfe == 10
    assert 40 < ddim_sampler(context, 60, 0.0).nfe < 60


def test_samples_of_the_teacher_look_like_digits(context):
    """The classifier behind the metric is sure of what it sees in nearly all samples of the shipped teacher."""
    classifier = feature_extractor("digits", torch.device("cpu")).classifier
    with torch.no_grad():
        sure = classifier(to_uint8(ddim_sampler(context, 20, 0.0)(range(100)), 17)).softmax(1).max(1).values
    assert float((sure > 0.6).float().mean()) > 0.85
    noise = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float(classifier(to_uint8(noise, 17)).softmax(1).max(1).values.mean()) < float(sure.mean())


def test_rounding_is_to_the_nearest_level():
    x = torch.tensor([-2.0, -1.0, -0.997, 0.0, 0.996, 1.0, 3.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 128, 254, 255, 255]
    levels = torch.arange(17) / 8 - 1
    assert torch.equal(to_uint8(levels + 0.05, 17), to_uint8(levels, 17))
    assert len(set(to_uint8(levels, 17).tolist())) == 17


def test_bad_requests_are_named(context, tmp_path):
    sampler = ddim_sampler(context, 5, 0.0)
    with pytest.raises(ValueError, match="seeds: none"):
        sampler([])
    with pytest.raises(ValueError, match="batch: 0"):
        sampler([1], batch_size=0)
    with pytest.raises(ValueError, match="no config.yaml"):
        sample(tmp_path, seeds=[0])
    with pytest.raises(ValueError, match="weights: 'best'"):
        load_sampler(tmp_path, ALONE, "best")
