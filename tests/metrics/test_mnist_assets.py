"""What ships for MNIST belongs together: the teacher's digits are ones to the classifier, and near the reference."""

import numpy as np
import torch
from contexts import context_with_teacher

from hsivi_fast.checkpoints.weights import load_weights, read_weights
from hsivi_fast.config import load_config
from hsivi_fast.data import to_uint8
from hsivi_fast.metrics.distances import frechet_distance
from hsivi_fast.metrics.evaluation import build_metric
from hsivi_fast.metrics.features import DigitsClassifier, weights_file
from hsivi_fast.sampling.sampler import ddim_sampler


def test_the_teacher_draws_digits():
    context = context_with_teacher(load_config("mnist"))
    images = to_uint8(ddim_sampler(context, 10, 0.0)(range(96)))
    classifier = DigitsClassifier(32)
    load_weights(classifier, read_weights(weights_file("mnist")), "features")
    with torch.no_grad():
        sure = classifier(images).softmax(1).amax(1)
    # Of real digits all are; this is a small teacher, and ten evaluations of DDIM are few.
    assert (sure > 0.6).float().mean() > 0.45
    assert len(classifier(images).argmax(1).unique()) >= 9
    metric = build_metric(context)
    assert metric.reference["mu"].shape == (64,) and np.linalg.eigvalsh(metric.reference["sigma"]).min() > -1e-6
    noise = torch.randint(0, 256, (96, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(metric.statistics(images), metric.reference) < 0.2 * frechet_distance(
        metric.statistics(noise), metric.reference
    )
