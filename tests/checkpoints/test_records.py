"""JSON of a run's folder that is valid and of another shape: one line that names the file, whoever reads it."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from hsivi_fast import cli, train
from hsivi_fast.checkpoints.run_folder import RunFolder
from hsivi_fast.config import load_config

ROW = {"sampler": "hsivi_ema", "nfe": 3, "frechet_distance": 1.0, "num_samples": 4, "images_per_second": 2.0}
STATE = {"step": 10, "metric": None, "student_updates": 5, "score_net_updates": 10}

# (name, content, what is said of it)
DAMAGED = [
    ("state.json", "", "no JSON"),
    ("state.json", "null", "holds null"),
    ("state.json", "[]", r"holds \[\]"),
    ("state.json", "3", "holds 3"),
    ("state.json", "{}", "step is missing"),
    ("state.json", {**STATE, "step": "10"}, 'step is "10", which should be a valid integer'),
    ("state.json", {**STATE, "step": 11}, "step is 11, not 10 as the folder's name says"),
    ("state.json", {**STATE, "student_updates": None}, "student_updates is missing"),
    ("state.json", {**STATE, "score_net_updates": "5"}, 'score_net_updates is "5"'),
    ("state.json", {**STATE, "score_net_updates": -1}, "score_net_updates is -1"),
    ("state.json", {**STATE, "student_updates": 10**30}, "student_updates is 10000"),
    ("state.json", {**STATE, "metric": "low"}, 'metric is "low"'),
    ("state.json", {**STATE, "losses": [1]}, r"losses is \[1\]"),
    ("state.json", {**STATE, "sha256": {"student.safetensors": 3}}, "sha256.* is 3"),
    ("state.json", "[" * 100_000, "nested too deeply"),
    ("metrics.jsonl", "3\n", "line 1: holds 3"),
    ("metrics.jsonl", '{"step": 1}\nnull\n', "line 2: holds null"),
    ("metrics.jsonl", '[]\n{"step": 1}\n', r"line 1: holds \[\]"),
    ("metrics.jsonl", '"text"\n', 'line 1: holds "text"'),
    ("metrics.jsonl", '{"loss": 1.0}\n', "line 1: step is missing"),
    ("metrics.jsonl", '{"step": 1, "seconds": "long"}\n', 'line 1: seconds is "long"'),
    ("metrics.jsonl", '{"step": 1, "se\n{"step": 2}\n', "line 1: no JSON"),
    ("saves.jsonl", '{"step": 1}\n', "line 1: seconds is missing"),
    ("results.json", "null", "holds null"),
    ("results.json", "3", "holds 3"),
    ("results.json", "[3]", "0 is 3"),
    ("results.json", [{**ROW, "nfe": -1}], "0.nfe is -1"),
    ("results.json", [{**ROW, "images_per_second": None}], "0.images_per_second is null"),
    ("results.json", [{**ROW, "solver": 3}], "0.solver is 3"),
    ("results.json", [{**ROW, "frechet_distance": None}], "0 has no distance"),
    ("results.json", [ROW, {**ROW, "frechet_distance": None}], "1.frechet_distance is missing"),
    ("wandb.json", "[]", r"holds \[\]"),
    ("wandb.json", {"project": "a"}, "id is missing"),
    ("environment.json", "3", "holds 3"),
    ("environment.json", {"world_size": "many"}, 'world_size is "many"'),
    ("inputs.json", {"teacher.checkpoint": "sum"}, 'checkpoint is "sum"'),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a checkpoint of step 10, which no network could load."""
    folder = RunFolder.start(tmp_path_factory.mktemp("runs") / "run", load_config("digits", ["train.steps=40"]))
    checkpoint = folder.checkpoint_path(10)
    checkpoint.mkdir()
    save_file({"w": torch.ones(1)}, checkpoint / "student_ema.safetensors")
    (checkpoint / "state.json").write_text(json.dumps(STATE))
    return folder.path


@pytest.mark.parametrize("name, content, said", DAMAGED)
def test_another_shape_is_one_line(tmp_path, run, name, content, said):
    folder = RunFolder(shutil.copytree(run, tmp_path / "run"))
    file = (folder.checkpoint_path(10) if name == "state.json" else folder.path) / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=said) as caught:
        if name == "state.json":
            folder.newest_state(["student_updates", "score_net_updates"])
        elif name.endswith(".jsonl"):
            folder.read_lines(name)
        else:
            folder.read_json(name)
    message = str(caught.value)
    assert str(file) in message and "damaged (" in message and "\n" not in message and len(message) < 600


def test_what_a_newer_version_adds_and_a_half_written_last_line_are_no_damage(tmp_path, run):
    folder = RunFolder(shutil.copytree(run, tmp_path / "run"))
    (folder.path / "metrics.jsonl").write_bytes(b'{"step": 1, "new": [1]}\n\n{"step": 2, "sec\xc3')
    assert folder.metrics() == [{"step": 1, "new": [1]}]
    (folder.path / "environment.json").write_text('{"new": {"a": 1}}')
    assert folder.read_json("environment.json") == {"new": {"a": 1}}
    assert folder.read_json("results.json", "none") == "none" and folder.read_lines("saves.jsonl") == []


@pytest.mark.parametrize("what", ["pipe", "device", "folder", "loop"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "state.json", "student_ema.safetensors", ".lock"])
def test_what_is_no_file_is_never_waited_for(tmp_path, run, name, what):
    folder = RunFolder(shutil.copytree(run, tmp_path / "run"))
    file = (folder.path if name in ("metrics.jsonl", ".lock") else folder.checkpoint_path(10)) / name
    file.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if what == "device" else file)
    calls = {
        "metrics.jsonl": folder.metrics,
        "state.json": lambda: folder.load_state(10),
        "student_ema.safetensors": lambda: folder.load_tensors(10, "student_ema"),
        ".lock": lambda: folder.locked().__enter__(),
    }
    if name == ".lock" and what == "pipe":
        calls[name]()  # which can be held like a file
        return
    if name == ".lock" and what == "device":
        what = "loop"  # no link is followed there
    said = {"pipe": "is a pipe or a device", "device": "is a pipe or a device", "folder": "[Ii]s a (folder|directory)"}
    with pytest.raises((ValueError, OSError), match=f"{name}.*{said.get(what, 'Too many levels of symbolic links')}"):
        calls[name]()


@pytest.mark.parametrize("name", ["metrics.jsonl", "saves.jsonl", ".lock"])
def test_nothing_is_made_where_a_link_leads(tmp_path, run, name):
    folder = RunFolder(shutil.copytree(run, tmp_path / "run"))
    (folder.path / name).unlink(missing_ok=True)
    (folder.path / name).symlink_to(tmp_path / "outside")
    call = (lambda: folder.locked().__enter__()) if name == ".lock" else (lambda: folder.append(name, {"step": 1}))
    with pytest.raises(OSError, match=f"cannot write .*{name}: Too many levels of symbolic links"):
        call()
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("command", ["report RUN", "export RUN --format safetensors --outdir OUT", "train"])
def test_the_commands_say_it_in_a_line_and_change_nothing(tmp_path, capsys, command):
    config = load_config("smoke", ["train.steps=1"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hsivi_fast.training.trainer.write_report", lambda *arguments, **options: None)
        run = train(config, tmp_path / "run").path
    (run / "results.json").write_text("[3]")
    (run / "metrics.jsonl").write_text("3\n")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    words = [{"RUN": str(run), "OUT": str(tmp_path / "out")}.get(word, word) for word in command.split()]
    more = ["smoke", "train.steps=2", "--outdir", str(run)] if command == "train" else []
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, *more])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and last.startswith(f"hsivi: {run}/") and "damaged (" in last
    assert not (tmp_path / "out").exists()
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("name", ["student_ema.safetensors", "state.json"])
def test_what_may_not_be_read_is_not_to_be_deleted(run, monkeypatch, name):
    """Whoever runs the tests may be allowed to read everything, so the refusal is made here."""
    from pathlib import Path

    def refused(file, *arguments, **keywords):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("builtins.open", refused)
    monkeypatch.setattr(Path, "read_bytes", refused)
    folder = RunFolder(run)
    with pytest.raises(ValueError, match=rf"{name}: cannot be read \(Permission denied\); ask its owner") as caught:
        folder.load_tensors(10, "student_ema") if name.startswith("student") else folder.load_state(10)
    assert "delete" not in str(caught.value)


def test_a_flipped_byte_is_noticed_and_a_checkpoint_without_sums_is_read(tmp_path, run):
    folder = RunFolder(shutil.copytree(run, tmp_path / "run"))
    assert float(folder.load_tensors(10, "student_ema")["w"][0]) == 1
    folder.save_checkpoint(20, {"student_ema": {"w": torch.ones(4)}}, {"metric": None})
    assert folder.load_tensors(20, "student_ema")["w"].tolist() == [1, 1, 1, 1]
    file = folder.checkpoint_path(20) / "student_ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"student_ema.safetensors: damaged \(its sha256 is not the one .*delete"):
        folder.load_tensors(20, "student_ema")
