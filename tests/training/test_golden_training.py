"""Six whole training iterations of the published implementation, replayed with its noise and its layers."""

import functools

import numpy as np
import pytest
import torch
from golden_values import fill_by_name, load_golden

from hsivi_fast import ops
from hsivi_fast.build import Context
from hsivi_fast.execution import EAGER
from hsivi_fast.method.layers import Layers, attach_log_gamma
from hsivi_fast.method.schedule import make_schedule
from hsivi_fast.nets import build_unet
from hsivi_fast.parallel.world import ALONE
from hsivi_fast.training.engine import PlainEngine
from hsivi_fast.training.optim import learning_rate
from hsivi_fast.training.rollout import Batch, one_layer_on, roll_down
from hsivi_fast.training.updates import Updates

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


@pytest.mark.parametrize("name", CASES)
def test_six_iterations_agree_with_the_published_code(name, backend_device, monkeypatch):
    """With both backends. In the interpreter the group normalisation is torch's: the other would take minutes here,
    and test_nets.py has golden values of its own for it. Of the two cases one has torch's optimizer step there.
    """
    device = backend_device
    if ops.triton_is_interpreted():
        for name_of_norm in ("group_norm_silu", "joined_group_norm_silu"):
            plain = functools.partial(getattr(ops, name_of_norm), backend="torch")
            monkeypatch.setattr(ops, name_of_norm, plain)
        if name == "train_shared_image_gamma":
            monkeypatch.setattr(ops, "running_backend", lambda device: "torch")
    golden = load_golden(name)
    layers = Layers(make_schedule("linear", 1000, "quad", 5), **CASES[name]).to(device)
    teacher = _network().to(device).requires_grad_(False)
    student = PlainEngine(attach_log_gamma(_network(0.95), layers).to(device), clip=1.0, ema=0.999)
    score_net = PlainEngine(_network(1.05).to(device), clip=1.0, ema=0.999)
    context = Context(None, ALONE, torch.device(device), None, EAGER, layers, teacher)  # no run, so no configuration
    updates, log_gamma = Updates(context, student, score_net), student.network.log_scaled_gamma

    def tensor(key):
        return torch.from_numpy(golden[key]).to(device)

    def batch(key):
        k, x = tensor(f"{key}.k"), tensor(f"{key}.x_K")
        noise = tensor(f"{key}.noise_rollout")
        x = roll_down(student.network, layers, log_gamma, x, k, None, int(k.min()), given=noise)
        return Batch(x, ops.Noise(None, k, given=tensor(f"{key}.noise_layer")))

    for step in range(1, 7):
        rates = [learning_rate("decay", base, step, warmup=4, total=9000) for base in (1e-3, 2e-3)]
        if step % 2 == 0:
            losses, _ = updates.student(batch(f"it{step}.phi"), rates[0])
            assert float(losses.mean()) == pytest.approx(float(golden[f"it{step}.loss_phi"]), rel=5e-3)
            assert rates[0] == pytest.approx(float(golden[f"it{step}.lr_phi"]), rel=1e-12)
        lower = one_layer_on(student.network, layers, log_gamma, batch(f"it{step}.f"))
        losses, _ = updates.score_net(lower, rates[1])
        assert float(losses.mean()) == pytest.approx(float(golden[f"it{step}.loss_f"]), rel=5e-4)
        assert rates[1] == pytest.approx(float(golden[f"it{step}.lr_f"]), rel=1e-12)

    for key, engine in (("phi", student), ("f", score_net)):
        assert list(engine.names) == list(golden[f"end.{key}.names"])
        norms = [float(parameter.detach().norm()) for parameter in engine.parameters]
        averages = [float(value.norm()) for value in engine.averaged().values()]
        np.testing.assert_allclose(norms, golden[f"end.{key}.norms"], rtol=1e-3)
        np.testing.assert_allclose(averages, golden[f"end.{key}.ema_norms"], rtol=1e-3)
        np.testing.assert_allclose(
            engine.network.in_conv.weight.detach().cpu(), golden[f"end.{key}.in_conv"], atol=2e-4
        )
    np.testing.assert_allclose(student.network.log_scaled_gamma.detach().cpu(), golden["end.phi.log_gamma"], atol=2e-5)
