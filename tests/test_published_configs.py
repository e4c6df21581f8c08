"""The four published data sets: every setting as the published scripts give it."""

import pytest

from hsivi_fast.config import PUBLISHED_REFERENCES, REFERENCES_TO_MAKE, load_config

SHARED = {"steps": 200000, "f_learning_times": 20, "warmup": 2500, "clip": 1.0, "ema": 0.999}
# Batch, betas, spacing, rule, rates of student and score network at 10 and 15 layers, and at 5.
PUBLISHED = {
    "cifar10": (128, "linear", "quad", "decay", (1.6e-5, 8e-5), (1.6e-6, 8e-7)),
    "celeba64": (128, "linear", "quad", "cosine", (1e-5, 5e-5), (1e-6, 5e-6)),
    "imagenet64": (2048, "cosine", "uniform", "cosine", (1e-5, 5e-5), (1e-6, 5e-6)),
}


@pytest.mark.parametrize("nfe", [5, 10, 15])
@pytest.mark.parametrize("data", PUBLISHED)
def test_a_config_names_its_reference_and_is_measured_on_inception(data, nfe):
    config = load_config(data if nfe == 10 else f"{data}_nfe{nfe}")
    assert config.eval.reference == data and config.eval.metric == "inception"
    assert data in PUBLISHED_REFERENCES or data in REFERENCES_TO_MAKE


@pytest.mark.parametrize("nfe", [5, 10, 15])
@pytest.mark.parametrize("data", PUBLISHED)
def test_a_config_has_the_published_settings(data, nfe):
    batch, betas, spacing, rule, rates, rates_of_5 = PUBLISHED[data]
    config = load_config(data if nfe == 10 else f"{data}_nfe{nfe}")
    assert (config.nfe, config.network.name, config.eta, config.spacing) == (nfe, data, 0.2, spacing)
    assert (config.teacher.betas, config.teacher.steps) == (betas, 1000)
    assert (config.gamma.per_step, config.gamma.per_pixel) == (False, True)
    assert {key: getattr(config.train, key) for key in SHARED} == SHARED
    assert (config.train.batch_size, config.train.lr_rule) == (batch, rule)
    assert (config.train.student_lr, config.train.score_net_lr) == (rates_of_5 if nfe == 5 else rates)
    assert config.init == (f"runs/{data}" if nfe == 5 else None)
    assert config.network.norm_eps == (None if data == "imagenet64" else 1e-6)


def test_mnist_is_there_at_5_10_and_15():
    assert [load_config(name).nfe for name in ("mnist_nfe5", "mnist", "mnist_nfe15")] == [5, 10, 15]
