"""A run that starts from the student and score network of a trained one, `init`, in the place of the teacher."""

import pytest
import torch
from safetensors.torch import load_file

from hsivi_fast.config import load_config
from hsivi_fast.training.trainer import train


def test_a_run_starts_from_a_trained_one(tmp_path):
    trained = train(load_config("smoke", ["train.steps=2"]), tmp_path / "trained")
    folder = trained.checkpoint_path(2)
    weights = {role: load_file(folder / f"{role}.safetensors") for role in ("student", "score_net")}
    # So small a rate that two updates leave the weights where they started.
    tiny = ["train.steps=2", "train.student_lr=1e-30", "train.score_net_lr=1e-30"]
    from_run = [*tiny, f"init={trained.path}", "nfe=2"]
    started = train(load_config("smoke", from_run), tmp_path / "started")
    for role, expected in weights.items():
        for name, value in load_file(started.checkpoint_path(2) / f"{role}.safetensors").items():
            assert torch.equal(value, expected[name]), name
    assert weights["student"]["log_scaled_gamma"].abs().max() > 0
    train(load_config("smoke", [*tiny, f"init={folder}"]), tmp_path / "from_folder")
    with pytest.raises(ValueError, match="init: .*is neither a trained run nor a folder with"):
        train(load_config("smoke", ["init=runs/nowhere"]), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="log_scaled_gamma"):
        train(load_config("smoke", [*from_run, "gamma.per_step=true"]), tmp_path / "other_gamma")
