"""The baseline of the benchmarks computes what the published code computed, and does the work that is described."""

import numpy as np
import pytest
import torch
from golden_values import fill_by_name, load_golden
from torch.utils.flop_counter import FlopCounterMode

from bench.published import PublishedTraining, cycle_work, published_sample, through_png
from hsivi_fast import ops
from hsivi_fast.method.layers import Layers
from hsivi_fast.method.schedule import make_schedule
from hsivi_fast.nets import build_unet
from hsivi_fast.sampling.sampler import Sampler
from hsivi_fast.training.optim import learning_rate

# The golden trainings and their network, as golden/README.md describes them.
CASES = {
    "train_shared_image_gamma": {"eta": 0.2, "per_step": False, "per_pixel": True},
    "train_per_step_scalar_gamma": {"eta": 1.0, "per_step": True, "per_pixel": False},
}
NETWORK = {
    "family": "ddpm",
    "image_channels": 3,
    "image_size": 16,
    "channels": 32,
    "multipliers": [1, 2],
    "res_blocks": 1,
    "attention": [False, True],
}


def _network(factor=1.0):
    network = fill_by_name(build_unet(NETWORK))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(factor)
    return network


def _training(eta, per_step, per_pixel, nfe=5):
    networks = _network(0.95), _network(1.05), _network()
    schedule = make_schedule("linear", 1000, "quad", nfe)
    rates = [_rate(base) for base in (1e-3, 2e-3)]
    return PublishedTraining(*networks, schedule, eta, per_step, per_pixel, rates)


def _rate(base):
    return lambda step: learning_rate("decay", base, step, warmup=4, total=9000)


@pytest.mark.parametrize("name", CASES)
def test_it_reproduces_the_golden_training(name):
    golden, training = load_golden(name), _training(**CASES[name])

    def given(key):
        return [torch.from_numpy(golden[f"{key}.{part}"]) for part in ("k", "x_K", "noise_layer", "noise_rollout")]

    for step in range(1, 7):
        if step % 2 == 0:
            loss = training.update_student(step, *given(f"it{step}.phi"))
            assert loss == pytest.approx(float(golden[f"it{step}.loss_phi"]), rel=5e-3)
        loss = training.update_score_net(step, *given(f"it{step}.f"))
        assert loss == pytest.approx(float(golden[f"it{step}.loss_f"]), rel=5e-4)
    for key, network, average in (
        ("phi", training.student, training.averages["student"]),
        ("f", training.score_net, training.averages["score_net"]),
    ):
        names = list(golden[f"end.{key}.names"])
        parameters = dict(network.named_parameters())
        norms = [float(parameters[each].detach().norm()) for each in names]
        np.testing.assert_allclose(norms, golden[f"end.{key}.norms"], rtol=1e-3)
        norms = [float(average[each].norm()) for each in names]
        np.testing.assert_allclose(norms, golden[f"end.{key}.ema_norms"], rtol=1e-3)


def test_its_work_is_the_described_one():
    """Counted by torch at K = 10, where the rollout reaches the bottom.

    13 forwards for an update of the score network and 16 for one of the student.
    """
    training = _training(0.5, per_step=False, per_pixel=False, nfe=10)
    k = torch.tensor([10, 4, 7, 1])
    x, noise = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)

    def count(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    forward = count(lambda: training.teacher(x, training.tau[k]))
    assert count(lambda: training.update_score_net(1, k, x, noise)) / forward == pytest.approx(13, rel=0.01)
    assert count(lambda: training.update_student(1, k, x, noise)) / forward == pytest.approx(16, rel=0.01)
    assert cycle_work(10, 1000, 20) == pytest.approx(276, abs=0.01)
    assert cycle_work(10, 16, 20) == pytest.approx(272, abs=1)


def test_expected_work_is_the_average_of_its_draws():
    torch.manual_seed(0)
    training = _training(**CASES["train_shared_image_gamma"])
    training.nfe = 10
    rolled = [10 - int(training.draw(6)[0].min()) + 1 for _ in range(4000)]
    assert cycle_work(10, 6, 1) == pytest.approx(2 * np.mean(rolled) + 9, rel=0.01)


def test_its_sampler_is_ours_with_the_same_noise():
    training = _training(**CASES["train_shared_image_gamma"])
    with torch.no_grad():
        training.log_gamma.fill_(0.2)
    layers = Layers(make_schedule("linear", 1000, "quad", 5), **CASES["train_shared_image_gamma"])
    seeds = torch.arange(16)
    noise = torch.stack([ops.draw_noise(seeds, current, (3, 16, 16)) for current in range(5, 1, -1)])
    theirs = published_sample(training, 16, ops.draw_noise(seeds, 0, (3, 16, 16)), noise)
    ours = Sampler(training.student, layers, training.log_gamma)(range(16))
    assert float((theirs - ours).abs().max() / theirs.abs().max()) < 1e-5


def test_png_truncates():
    images = torch.tensor([-1.0, 0.0, 1.0, 1.5]).reshape(4, 1, 1, 1).expand(4, 3, 2, 2)
    assert through_png(images)[:, 0, 0, 0].tolist() == [0, 127, 255, 255]
    assert through_png(images[:, :1]).shape == (4, 2, 2, 1)
