"""A training stops at a loss that is not finite, and says where that was."""

from types import SimpleNamespace

import pytest
import torch
from checkpoint_files import rewrite
from safetensors.torch import load_file

from hsivi_fast import load_config, train
from hsivi_fast.parallel.world import ALONE
from hsivi_fast.training.updates import FiniteGuard

RUN = ["nfe=5", "train.batch_size=8", "train.f_learning_times=4", "log_every=2", "save_every=2", "train.warmup=0"]


def test_a_loss_that_is_not_finite_names_step_layer_and_checkpoint(no_report, tmp_path):
    healthy = train(load_config("smoke", [*RUN, "train.steps=4"]), tmp_path / "run")
    _put_an_infinity_into(healthy)
    message = r"the loss is not finite at step \d+, layer [1-5]; the last good checkpoint is .*step_4; try smaller"
    with pytest.raises(FloatingPointError, match=f"{message} learning rates"):
        train(load_config("smoke", [*RUN, "train.steps=30"]), healthy.path)
    assert healthy.checkpoints()[-1] == 4


def _put_an_infinity_into(folder):
    """Into the score network of the newest checkpoint."""
    checkpoint = folder.checkpoint_path(folder.checkpoints()[-1])
    weights = load_file(checkpoint / "score_net.safetensors")
    weights["in_conv.weight"][0] = float("inf")
    rewrite(checkpoint, "score_net", weights)


def test_the_guard_keeps_the_first_bad_step_and_its_highest_layer():
    folder = SimpleNamespace(checkpoints=list)
    guard, k = FiniteGuard(SimpleNamespace(world=ALONE, device="cpu")), torch.tensor([1, 4, 2, 3])
    guard.watch(torch.tensor([1.0, 2.0, 3.0, 4.0]), k, 7)
    guard.check(folder)
    guard.watch(torch.tensor([1.0, float("inf"), float("nan"), 4.0]), k, 8)
    guard.watch(torch.tensor([float("nan")] * 4), k, 9)
    with pytest.raises(FloatingPointError, match="step 8, layer 4; no checkpoint was saved before"):
        guard.check(folder)
