"""The class-conditional teacher that ships, on real images: what it draws is of the class that was asked for."""

import pytest
import torch

from hsivi_fast import load_config, sample, train
from hsivi_fast.build import build_context
from hsivi_fast.data import to_uint8
from hsivi_fast.metrics.features import load_classifier
from hsivi_fast.parallel.world import ALONE
from hsivi_fast.sampling.sampler import ddim_sampler

LABELS = [label for label in range(10) for _ in range(4)]
SMALL = [
    *("device=cpu", "start.updates=2", "start.trajectories=16", "start.substeps=1", "train.steps=2"),
    *("train.batch_size=16", "train.f_learning_times=2", "eval.num_samples=0"),
]


@pytest.fixture(scope="module")
def classifier():
    return load_classifier("mnist")


def share_of_their_class(classifier, images):
    """The share of uint8 images that the classifier puts into `LABELS`."""
    with torch.no_grad():
        return float((classifier(images).argmax(1) == torch.tensor(LABELS)).double().mean())


def test_the_teacher_draws_the_class_that_is_asked_for(classifier):
    context = build_context(load_config("mnist_edm", ["device=cpu"]), ALONE, teacher=True)
    images = ddim_sampler(context, 8, 0.0)(range(40), labels=LABELS)
    assert share_of_their_class(classifier, to_uint8(images)) > 0.85


def test_a_run_of_two_updates_draws_them_too(classifier, no_report, tmp_path):
    run = train(load_config("mnist_edm", SMALL), tmp_path / "run")
    assert share_of_their_class(classifier, sample(run, range(40), labels=LABELS)) > 0.6
    own = sample(run, range(4))
    assert own.shape == (4, 1, 32, 32)
