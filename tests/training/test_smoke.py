"""The whole training loop through the kernels, student updates included, against the same loop in plain torch."""

import json

import pytest
import torch
from devices import KERNEL_DEVICE
from safetensors.torch import load_file

from hsivi_fast import load_config, ops, train
from hsivi_fast.checkpoints.run_folder import RunFolder
from hsivi_fast.nets import build_unet

# Relative, of losses; absolute, of parameters. A GPU's exp, square root and division are good to 1 or 2 units, and the
# interpreter's are rounded once. Adam divides a gradient by its own size, so that where it is as small as these units
# a parameter moves by another part of the rate, 4e-4.
LOSSES, PARAMETERS = (1e-5, 5e-6) if KERNEL_DEVICE == "cpu" else (1e-4, 5e-5)


@pytest.fixture(scope="module")
def runs(no_report, tmp_path_factory):
    """The run `smoke` with each backend: {backend: its folder}."""
    folder = tmp_path_factory.mktemp("smoke")
    return {
        backend: train(load_config("smoke", [f"backend={backend}", f"device={KERNEL_DEVICE}"]), folder / backend).path
        for backend in ("torch", "triton")
    }


def test_losses_and_parameters_end_within_rounding(runs):
    records = {backend: RunFolder(path).metrics() for backend, path in runs.items()}
    assert [record["step"] for record in records["triton"]] == [1, 2, 3, 4]
    for plain, fused in zip(records["torch"], records["triton"]):
        assert fused["loss_score_net"] == pytest.approx(plain["loss_score_net"], rel=LOSSES)
        if plain["step"] % 2:
            assert plain["loss_student"] is fused["loss_student"] is None
        else:
            assert fused["loss_student"] == pytest.approx(plain["loss_student"], rel=10 * LOSSES)
    for stem in ("student", "student_ema", "score_net", "score_net_ema"):
        plain, fused = (
            load_file(path / "checkpoints" / "step_4" / f"{stem}.safetensors")
            for path in (runs["torch"], runs["triton"])
        )
        assert plain.keys() == fused.keys()
        for name in plain:
            torch.testing.assert_close(fused[name], plain[name], rtol=0, atol=PARAMETERS)
    start = load_file(load_config("smoke").teacher.checkpoint)
    moved = load_file(runs["triton"] / "checkpoints" / "step_4" / "student.safetensors")
    # Both student updates happened, a rate's length each.
    assert max(float((moved[name] - start[name]).abs().max()) for name in start) > 5e-5
    assert float(moved["log_scaled_gamma"].abs().max()) > 1e-5


def test_the_environment_says_what_ran(runs):
    for backend, path in runs.items():
        environment = json.loads((path / "environment.json").read_text())
        assert environment["backend"] == backend
        assert environment["triton_interpreted"] is (backend == "triton" and ops.triton_is_interpreted())


def test_the_network_is_small_and_has_three_norms():
    network = build_unet("smoke")
    assert sum(parameter.numel() for parameter in network.parameters()) < 5000
    assert sum(isinstance(module, torch.nn.GroupNorm) for module in network.modules()) == 3
