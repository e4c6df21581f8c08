"""A run goes on with other processes and another ZeRO stage, from the very state that was saved."""

import json
import shutil

import pytest
import torch
from ranks import run_ranks
from run_files import checkpoint, distance, losses_of

from hsivi_fast.config import load_config
from hsivi_fast.training import trainer

RUN = ["device=cpu", "train.log_gamma_lr=0.01", "train.batch_size=16", "log_every=1", "save_every=4"]
STEMS = [name + suffix for name in ("student", "score_net") for suffix in ("", "_ema", "_optimizer")]


def settings(zero, *more, pieces):
    return [f"distributed.zero={zero}", f"distributed.deepspeed={pieces}", *more]


def train(folder, overrides):
    trainer.train(load_config("smoke", [*RUN, *overrides]), folder)


def go_on(folder, overrides):
    """Go on with a run; returns what its engines had right after loading, as {stem: {name: array}} and counters."""
    loaded = {}

    class Watched(trainer.Training):
        def resume(self):
            super().resume()
            for name, engine in (("student", self.student), ("score_net", self.score_net)):
                tensors, numbers = engine.state(name)
                loaded.update(numbers)
                if self.world.is_main:
                    loaded.update((stem, arrays_of(values)) for stem, values in tensors.items())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Training", Watched)
        train(folder, overrides)
    return loaded


def arrays_of(tensors):
    return {key: value.detach().numpy().copy() for key, value in tensors.items()}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Trained to step 4 by 2 ranks with ZeRO 2; and a copy that the same went on with to step 8."""
    folder = tmp_path_factory.mktemp("resume")
    pieces = folder / "pieces.json"
    pieces.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    run_ranks(train, 2, folder / "start", settings(2, "train.steps=4", pieces=pieces))
    shutil.copytree(folder / "start", folder / "same")
    run_ranks(train, 2, folder / "same", settings(2, "train.steps=8", pieces=pieces))
    return folder, pieces


@pytest.mark.parametrize("ranks, zero", [(1, None), (4, 1), (2, 3), (2, 0)])
def test_saved_with_2_ranks_and_zero_2_it_goes_on_elsewhere(started, ranks, zero):
    folder, pieces = started
    run = folder / f"on_{ranks}_{zero}"
    shutil.copytree(folder / "start", run)
    if zero is None:
        loaded = go_on(run, ["train.steps=8", "distributed.engine=plain"])
    else:
        loaded = run_ranks(go_on, ranks, run, settings(zero, "train.steps=8", pieces=pieces))[0]

    for stem in STEMS:
        saved = checkpoint(folder / "start", stem, 4)
        assert saved.keys() == loaded[stem].keys() and len(saved) > 0
        for name, value in saved.items():
            assert torch.equal(value, torch.from_numpy(loaded[stem][name])), f"{stem} {name}"
    assert {name.split(".")[0] for name in loaded["student_optimizer"]} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
    }
    state = json.loads((folder / "start" / "checkpoints" / "step_4" / "state.json").read_text())
    assert (
        (loaded["student_updates"], loaded["score_net_updates"])
        == (state["student_updates"], state["score_net_updates"])
        == (2, 4)
    )

    assert losses_of(run) == pytest.approx(losses_of(folder / "same"), rel=1e-4)
    for stem in STEMS:
        assert distance(checkpoint(run, stem, 8), checkpoint(folder / "same", stem, 8)) < 1e-6, stem
    assert json.loads((run / "environment.json").read_text())["world_size"] == ranks


def test_stopped_and_resumed_is_undisturbed(started):
    """The same ranks, stopped at step 4 or not: bit for bit."""
    folder, pieces = started
    run_ranks(train, 2, folder / "whole", settings(2, "train.steps=8", pieces=pieces))
    assert losses_of(folder / "whole") == losses_of(folder / "same")
    for stem in STEMS:
        for name, value in checkpoint(folder / "whole", stem, 8).items():
            assert torch.equal(value, checkpoint(folder / "same", stem, 8)[name]), f"{stem} {name}"
