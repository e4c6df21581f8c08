"""A run goes on wherever it and what it names stand now, and a command that is refused changes nothing of it."""

import shutil
from pathlib import Path

import pytest
import torch

from hsivi_fast.checkpoints.run_folder import RunFolder
from hsivi_fast.config import ASSETS, load_config


def _content(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def _config(*overrides):
    return load_config("smoke", ["train.steps=4", *overrides])


def test_a_shipped_teacher_is_a_name_and_one_of_another_checkout_is_found_here(tmp_path):
    folder = RunFolder.start(tmp_path / "run", _config())
    file = folder.path / "config.yaml"
    text = file.read_text()
    assert "checkpoint: smoke_teacher.safetensors\n" in text and str(ASSETS) not in text
    assert folder.config() == _config()  # where it is read, it is the file again
    gone = "/gone/hsivi_fast/assets/smoke_teacher.safetensors"
    file.write_text(text.replace("checkpoint: smoke", f"checkpoint: {Path(gone).parent}/smoke"))
    assert gone in file.read_text() and folder.config() == _config()
    RunFolder.start(folder.path, _config())
    assert file.read_text() == text
    # A checkout that is still there, with the same file in it.
    other = tmp_path / "checkout" / "hsivi_fast" / "assets"
    other.mkdir(parents=True)
    shutil.copy(ASSETS / "smoke_teacher.safetensors", other)
    file.write_text(text.replace("checkpoint: smoke", f"checkpoint: {other}/smoke"))
    (folder.path / "inputs.json").unlink()  # as before there was one
    RunFolder.start(folder.path, _config())
    assert file.read_text() == text


@pytest.mark.parametrize("key", ["teacher.checkpoint", "data_path", "init", "eval.reference"])
def test_a_file_may_move_and_its_content_may_not_change(tmp_path, key):
    def place(name, content):
        path = tmp_path / name
        if key == "init":
            run = RunFolder.start(path, _config())
            run.save_checkpoint(2, {"student": {"w": torch.tensor(content)}}, {"metric": None})
        elif key == "data_path":
            path.mkdir()
            (path / "train-images").write_bytes(bytes(content))
        else:
            path.write_bytes(bytes(content))
        return path

    first = place("first", [1, 2, 3])
    run = RunFolder.start(tmp_path / "run", _config(f"{key}={first}")).path
    shutil.move(first, tmp_path / "second")
    shutil.move(run, tmp_path / "moved")
    RunFolder.start(tmp_path / "moved", _config(f"{key}={tmp_path / 'second'}"))
    assert f"{tmp_path / 'second'}" in (tmp_path / "moved" / "config.yaml").read_text()
    before = _content(tmp_path / "moved")
    other = place("other", [1, 2, 3, 4])
    with pytest.raises(ValueError, match=f"its run has {key} = .*second.*, not .*other"):
        RunFolder.start(tmp_path / "moved", _config(f"{key}={other}"))
    assert _content(tmp_path / "moved") == before


# What is refused, by what the folder is and what is asked.
REFUSED = [
    ("run", ["eta=0.5"], False, "its run has eta"),
    ("run", ["train.steps=3"], False, "train.steps = 4, not 3"),
    ("run", [], True, "--fresh was given"),
    ("held", ["train.steps=8"], False, "another process is training there"),
    ("stranger", [], False, "is not empty and holds no run"),
    ("file", [], False, "is a file"),
    ("damaged", [], False, "inputs.json: damaged"),
    ("unreadable", [], False, "config.yaml is not readable"),
]


@pytest.mark.parametrize("kind, overrides, fresh, said", REFUSED, ids=[kind for kind, *_ in REFUSED])
def test_what_is_refused_changes_nothing(tmp_path, kind, overrides, fresh, said):
    path = tmp_path / "run"
    if kind == "file":
        path.write_text("mine")
    elif kind == "stranger":
        path.mkdir()
        (path / "thesis.tex").write_text("mine")
    else:
        RunFolder.start(path, _config())
        (path / ".lock").unlink()  # a copy may lack it
        if kind == "damaged":
            (path / "inputs.json").write_text("3")
        if kind == "unreadable":
            (path / "config.yaml").write_text("a: [")
    with pytest.MonkeyPatch.context() as patched:
        if kind == "held":
            holding = RunFolder(path).locked()
            holding.__enter__()
        before = _content(tmp_path)
        with pytest.raises(ValueError, match=said):
            RunFolder.start(path, _config(*overrides), fresh)
        assert _content(tmp_path) == before
        if kind == "held":
            holding.__exit__(None, None, None)
        patched.undo()


def test_the_configuration_is_looked_at_again_when_the_lock_is_held(tmp_path, monkeypatch):
    """Two different runs are started together: the second comes between the look of the first and its lock."""
    path, check, looks = tmp_path / "run", RunFolder.check, []

    def slow(*arguments):
        found = check(*arguments)
        looks.append(found)
        if len(looks) == 1:
            RunFolder.start(path, _config("eta=0.5"))
        return found

    monkeypatch.setattr(RunFolder, "check", slow)
    with pytest.raises(ValueError, match="its run has eta = 0.5, not 0.6"):
        RunFolder.start(path, _config())
    assert RunFolder(path).config().eta == 0.5
