"""Six whole training iterations of the published implementation, replayed with its noise and its layers."""

import functools

import numpy as np
import pytest
import torch
from golden_values import fill_by_name, load_golden

from hsivi_fast import ops
from hsivi_fast.method.layers import Layers, attach_log_gamma
from hsivi_fast.method.schedule import make_schedule
from hsivi_fast.nets import build_unet
from hsivi_fast.training.engine import PlainEngine
from hsivi_fast.training.optim import learning_rate
from hsivi_fast.training.rollout import Batch, one_layer_on, roll_down
from hsivi_fast.training.trainer import Updates

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
    """With both backends; in the interpreter, whose group normalisation would take minutes here, that one is torch's (test_nets.py has its own golden values)."""
    device = backend_device
    if ops.triton_is_interpreted():
        monkeypatch.setattr(ops, "group_norm_silu", functools.partial(ops.group_norm_silu, backend="torch"))
    golden = load_golden(name)
    tensor = lambda key: torch.from_numpy(golden[key]).to(device)
    layer = Layers(make_schedule("linear", 1000, "quad", 5), **CASES[name]).to(device)
    teacher = _network().to(device).requires_grad_(False)
    student = PlainEngine(attach_log_gamma(_network(0.95), layer).to(device), clip=1.0, ema=0.999)
    score_net = PlainEngine(_network(1.05).to(device), clip=1.0, ema=0.999)
    updates, log_gamma = Updates(student, score_net, teacher, layer), student.network.log_scaled_gamma

    def batch(key):
        k = tensor(f"{key}.k")
        x = roll_down(
            student.network,
            layer,
            log_gamma,
            tensor(f"{key}.x_K"),
            k,
            None,
            int(k.min()),
            tensor(f"{key}.noise_rollout"),
        )
        return Batch(x, k, None, noise=tensor(f"{key}.noise_layer"))

    for step in range(1, 7):
        rates = [learning_rate("decay", base, step, warmup=4, total=9000) for base in (1e-3, 2e-3)]
        if step % 2 == 0:
            losses, _ = updates.student(batch(f"it{step}.phi"), rates[0])
            assert float(losses.mean()) == pytest.approx(float(golden[f"it{step}.loss_phi"]), rel=5e-3)
            assert rates[0] == pytest.approx(float(golden[f"it{step}.lr_phi"]), rel=1e-12)
        losses, _ = updates.score_net(one_layer_on(student.network, layer, log_gamma, batch(f"it{step}.f")), rates[1])
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
