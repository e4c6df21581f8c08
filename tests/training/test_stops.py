"""A run that was stopped or killed anywhere, and went on, ends with the files of one that was not, but for times."""

import numpy as np
import pytest
from run_files import files_without_times, killed_at

from hsivi_fast import load_config, train
from hsivi_fast.checkpoints.run_folder import RunFolder
from hsivi_fast.parallel.interrupt import Interrupted
from hsivi_fast.report.figures import image_grid
from hsivi_fast.training import journal, pretrain, trainer

# Cycles of 4 steps; records at 3, 6, 9, and where it saves: at 5 and 10, at 4 and 8 where it measures, and at the end.
RUN = [
    "train.steps=12",
    "train.f_learning_times=4",
    "log_every=3",
    "save_every=5",
    "eval.every=4",
    "eval.num_samples=4",
    "eval.seeds=1",
    "eval.ddim_nfe=[3]",
    "log.images_every=2",
    "device=cpu",
]
TEACHER = ["teacher_train.steps=8", "teacher_train.batch_size=4", "log_every=3", "save_every=4", "device=cpu"]


def _assert_same_files(path, straight):
    found, expected = files_without_times(path), files_without_times(straight)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.fixture(scope="module", autouse=True)
def no_drawings():
    """What matplotlib draws takes longer than the run, and is not compared.

    The page that a run ends with is made of what is compared here, and the noise scale's picture is for TensorBoard.
    """
    picture = image_grid(np.zeros((1, 1, 8, 8), np.uint8))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "write_report", lambda *arguments, **options: None)
        patched.setattr(journal, "log_gamma_picture", lambda *arguments: picture)
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run that went through at once."""
    return train(load_config("smoke", RUN), tmp_path_factory.mktemp("runs") / "straight").path


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(module, counted, step): a signal arrives in the step-th use of `counted`, a class and a method's name."""

    def install(module, counted, step):
        stop = type("Stop", (), {"requested": None, "__enter__": lambda self: self, "__exit__": lambda *_: None})()
        monkeypatch.setattr(module, "StopRequest", lambda: stop)
        owner, name = counted
        whole, calls = getattr(owner, name), []

        def told(*arguments):
            calls.append(arguments)
            stop.requested = 15 if len(calls) == step else None
            return whole(*arguments)

        monkeypatch.setattr(owner, name, told)

    return install


@pytest.mark.parametrize("stops", [[1], [3], [5], [7], [8], [12], [2, 3, 2, 4]], ids=str)
def test_a_run_that_was_stopped_ends_with_the_same_files(tmp_path, straight, stop_at, monkeypatch, stops):
    for steps in stops:
        with monkeypatch.context():
            stop_at(trainer, (trainer.Training, "advance"), steps)
            with pytest.raises(Interrupted):
                train(load_config("smoke", RUN), tmp_path / "run")
        monkeypatch.undo()
    train(load_config("smoke", RUN), tmp_path / "run")
    _assert_same_files(tmp_path / "run", straight)


# Where the process ends: (whose method, which, at which call, before or after it).
KILLS = [
    (journal.Journal, "log", 2, "after"),
    (journal.Journal, "show", 2, "before"),
    (journal.Journal, "show", 2, "after"),
    (RunFolder, "save_checkpoint", 3, "before"),
    (RunFolder, "save_checkpoint", 1, "after"),
    (RunFolder, "drop_old_checkpoints", 5, "before"),
    (RunFolder, "drop_old_checkpoints", 6, "before"),  # the last one: nothing is saved after it
    (journal.Journal, "saved", 2, "before"),
    (trainer.Training, "finish", 1, "before"),
    (RunFolder, "write_json", 2, "before"),  # the table
]


@pytest.mark.parametrize("owner, name, call, when", KILLS)
def test_a_run_that_was_killed_ends_with_the_same_files(tmp_path, straight, owner, name, call, when):
    with killed_at(owner, name, call, when):
        train(load_config("smoke", RUN), tmp_path / "run")
    for left in (".metrics.jsonl.unfinished", "samples/.step_0000007.png.unfinished"):
        (tmp_path / "run" / left).write_bytes(b"half")  # by a process that could not tidy up
    train(load_config("smoke", RUN), tmp_path / "run")
    _assert_same_files(tmp_path / "run", straight)


@pytest.mark.parametrize("stop", [2, 3, 4, 7])
def test_a_teacher_that_was_stopped_ends_with_the_same_files(tmp_path, stop_at, monkeypatch, stop):
    config = load_config("smoke", TEACHER)
    stop_at(pretrain, (pretrain.PlainEngine, "step"), stop)
    with pytest.raises(Interrupted):
        pretrain.train_teacher(config, tmp_path / "run")
    monkeypatch.undo()
    pretrain.train_teacher(config, tmp_path / "run")
    pretrain.train_teacher(config, tmp_path / "straight")
    _assert_same_files(tmp_path / "run", tmp_path / "straight")
