"""bfloat16: the networks' arithmetic alone; weights, losses and results stay float32, with both backends."""

import json

import pytest
import torch
from devices import KERNEL_DEVICE

from hsivi_fast import load_config, sample, train
from hsivi_fast.build import build_context, load_teacher
from hsivi_fast.parallel.world import ALONE


def test_a_network_in_bfloat16_has_float32_weights_results_and_gradients():
    config = load_config("digits", ["device=cpu"])
    teacher = load_teacher(config, torch.device("cpu")).requires_grad_(True)
    x, t = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) * 50
    results = {}
    for precision in ("fp32", "bf16"):
        teacher.precision = precision
        leaf = x.clone().requires_grad_()
        y = teacher(leaf, t)
        (grad,) = torch.autograd.grad(y.square().sum(), leaf, retain_graph=True)
        (weight_grad,) = torch.autograd.grad(y.square().sum(), teacher.in_conv.weight)
        assert y.dtype == grad.dtype == weight_grad.dtype == teacher.in_conv.weight.dtype == torch.float32
        results[precision] = (y.detach(), grad, weight_grad)
    for exact, low in zip(results["fp32"], results["bf16"]):
        assert 1e-4 < float((low - exact).norm() / exact.norm()) < 0.03  # it is bfloat16, and no worse


def test_a_run_in_bfloat16_is_the_run_in_float32_up_to_bfloat16(no_report, tmp_path):
    """With both backends; the losses of four steps, in which nothing has time to grow apart."""
    losses = {}
    for precision, backend, device in (
        ("fp32", "torch", "cpu"),
        ("bf16", "torch", "cpu"),
        ("bf16", "triton", KERNEL_DEVICE),
    ):
        settings = [f"precision={precision}", f"backend={backend}", f"device={device}"]
        folder = train(load_config("smoke", settings), tmp_path / f"{precision}_{backend}")
        losses[precision, backend] = [record["loss_score_net"] for record in folder.metrics()]
        assert json.loads((folder.path / "environment.json").read_text())["precision"] == precision
        for name in ("student", "student_ema", "score_net", "score_net_optimizer"):
            assert {value.dtype for value in folder.load_tensors(4, name).values()} == {torch.float32}
    assert losses["bf16", "torch"] != losses["fp32", "torch"]
    assert losses["bf16", "torch"] == pytest.approx(losses["fp32", "torch"], rel=0.05)
    assert losses["bf16", "triton"] == pytest.approx(losses["bf16", "torch"], rel=0.02)
    assert sample(tmp_path / "bf16_torch", range(4)).shape == (4, 1, 8, 8)


def test_tf32_is_for_cuda():
    with pytest.raises(ValueError, match="precision: 'tf32' is a mode of CUDA devices, the device is cpu"):
        build_context(load_config("digits", ["precision=tf32", "device=cpu"]), ALONE)
