"""Checkpoints that neither a full disk nor a killed process nor a stranger's file can harm."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from hsivi_fast.checkpoints.run_folder import RunFolder
from hsivi_fast.config import load_config


@pytest.fixture
def config():
    return load_config("digits", ["train.steps=40"])


def _save(folder, step, metric=None, size=4):
    folder.save_checkpoint(step, {"student": {"w": torch.full((size,), float(step))}}, {"metric": metric})


def test_the_last_two_and_the_best_are_kept(tmp_path, config):
    folder = RunFolder.start(tmp_path / "run", config)
    for step, metric in ((10, 3.0), (20, 1.0), (30, None), (40, 2.0), (50, 4.0), (60, None)):
        _save(folder, step, metric)
        # The new one stands beside the old ones until they may go.
        assert step in folder.checkpoints() and len(folder.checkpoints()) <= 4
        folder.drop_old_checkpoints()
    assert folder.checkpoints() == [20, 50, 60] and folder.best_checkpoint() == (20, 1.0)
    assert float(folder.load_tensors(50, "student")["w"][0]) == 50 and folder.load_state(60)["step"] == 60
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_a_run_from_before_a_key_existed_goes_on(tmp_path, config):
    file = RunFolder.start(tmp_path / "run", config).path / "config.yaml"
    text = file.read_text()
    file.write_text(text.replace("compile: false\n", "").replace("cuda_graphs: false\n", ""))
    assert file.read_text() != text and RunFolder.start(tmp_path / "run", config).config() == config
    with pytest.raises(ValueError, match="its run has compile = False, not True"):
        RunFolder.start(tmp_path / "run", load_config("digits", ["train.steps=40", "compile=true"]))


def test_a_full_disk_loses_nothing_older(tmp_path, config):
    """A real failing write: the process may not write files larger than 100 kB."""
    program = textwrap.dedent("""
        import resource, signal, sys, torch
        from hsivi_fast.checkpoints.run_folder import RunFolder
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            RunFolder(sys.argv[1]).save_checkpoint(20, {"student": {"w": torch.zeros(200_000)}}, {"metric": None})
        except OSError as error:
            print(error)
            sys.exit(2)
    """)
    folder = RunFolder.start(tmp_path / "run", config)
    _save(folder, 10)
    done = subprocess.run([sys.executable, "-c", program, str(folder.path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == ""
    assert "cannot write the checkpoint of step 20" in done.stdout
    assert "the checkpoint of step 10 is whole" in done.stdout and done.stdout.count("\n") == 1
    assert folder.checkpoints() == [10] and float(folder.load_tensors(10, "student")["w"][0]) == 10
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_an_unfinished_checkpoint_is_not_seen(tmp_path, config):
    folder = RunFolder.start(tmp_path / "run", config)
    _save(folder, 10)
    unfinished = tmp_path / "run" / "checkpoints" / ".step_20.unfinished"
    unfinished.mkdir()
    (unfinished / "student.safetensors").write_bytes(b"half")
    assert folder.checkpoints() == [10]
    _save(folder, 20)
    assert folder.checkpoints() == [10, 20] and not unfinished.exists()


def test_damaged_and_missing_files_are_one_line(tmp_path, config):
    folder = RunFolder.start(tmp_path / "run", config)
    _save(folder, 10, size=1000)
    file = folder.checkpoint_path(10) / "student.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(
        ValueError, match=r"student.safetensors: damaged .* delete .*step_10 to go on from an older one"
    ) as caught:
        folder.load_tensors(10, "student")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="score_net.safetensors: missing"):
        folder.load_tensors(10, "score_net")
    (folder.checkpoint_path(10) / "state.json").write_text("{")
    with pytest.raises(ValueError, match="state.json: damaged"):
        folder.load_state(10)


def test_only_the_same_run_goes_on(tmp_path, config):
    path = tmp_path / "run"
    RunFolder.start(path, config)
    RunFolder.start(path, load_config("digits", ["train.steps=50"]))
    with pytest.raises(ValueError, match="train.steps = 50, not 45"):
        RunFolder.start(path, load_config("digits", ["train.steps=45"]))
    with pytest.raises(ValueError, match=r"eta = .*, not 0.9; when a run goes on, only train.steps may grow"):
        RunFolder.start(path, load_config("digits", ["train.steps=50", "eta=0.9"]))
    with pytest.raises(ValueError, match="--fresh was given"):
        RunFolder.start(path, load_config("digits", ["train.steps=50"]), fresh=True)


def test_a_path_that_cannot_be_a_run_is_refused(tmp_path, config):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is a file"):
        RunFolder.start(tmp_path / "file", config)
    with pytest.raises(ValueError, match="not empty and holds no run"):
        RunFolder.start(tmp_path / "full", config)
    with pytest.raises(ValueError, match="no config.yaml"):
        RunFolder(tmp_path / "full")


def test_one_process_at_a_time(tmp_path, config):
    folder = RunFolder.start(tmp_path / "run", config)
    with folder.locked():
        with pytest.raises(ValueError, match="another process is training there"):
            with RunFolder(folder.path).locked():
                pass
    with folder.locked():
        pass


def test_metrics_forget_what_is_trained_again_and_half_lines(tmp_path, config):
    folder = RunFolder.start(tmp_path / "run", config)
    for step in (10, 20, 30):
        folder.append("metrics.jsonl", {"step": step, "seconds": 1.0})
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "sec')
    assert [record["step"] for record in folder.metrics()] == [10, 20, 30]
    folder.forget_metrics_after(20)
    assert [json.loads(line)["step"] for line in (folder.path / "metrics.jsonl").read_text().splitlines()] == [10, 20]
