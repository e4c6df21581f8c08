"""Everything that a command writes goes through one writer: whole or not there, named in the error, for the umask."""

import ast
import errno
import os
import shutil
from pathlib import Path

import pytest

from hsivi_fast import cli, load_config, train
from hsivi_fast.checkpoints.run_folder import RunFolder

PACKAGE = Path(__file__).resolve().parent.parent / "hsivi_fast"

# Calls that write a file by themselves. `open` counts with a mode that writes.
WRITERS = {"write_bytes", "write_text", "savez", "savez_compressed", "save_file", "savefig", "mkstemp", "to_file"}
# Who may, and why.
ALLOWED = {
    "checkpoints/files.py": "the writer itself",
    "checkpoints/download.py": "a download has a name of its own until its sum is right, and a lock",
    "checkpoints/run_folder.py:open": "the lock, which stays empty",
    "checkpoints/convert.py:torch.save": "into the file that written_beside gives",
    "checkpoints/convert.py:open": "into the file that written_beside gives",
    "density/reference.py": "the command that makes what the package ships; written beside and renamed",
    "data.py:open": "the lock of a file in the cache, which stays empty",
    "metrics/features.py:torch.save": "a copy for torch-fidelity, in a folder of our own that is gone afterwards",
    "metrics/image_files.py:open": "into the file that written_beside gives",
    "metrics/image_files.py:save": "into the file that written_beside gives",
    "report/figures.py": "pictures as bytes in memory",
    "export/": "into the folder that written_beside gives",
}


def _writes(call):
    """The name of a writer that a call is, or None."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
    owner = getattr(getattr(function, "value", None), "id", "")
    if name == "open":
        modes = [argument.value for argument in call.args[1:2] if isinstance(argument, ast.Constant)]
        return name if modes and set(str(modes[0])) & set("wax+") else None
    if name == "save" and (owner == "torch" or len(call.args) == 1 or isinstance(function, ast.Attribute)):
        return "torch.save" if owner == "torch" else name
    return name if name in WRITERS else None


def test_nothing_writes_a_file_past_the_writer():
    bypassing = []
    for path in sorted(PACKAGE.rglob("*.py")):
        where = str(path.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(path.read_text())):
            name = _writes(node) if isinstance(node, ast.Call) else None
            allowed = where in ALLOWED or f"{where}:{name}" in ALLOWED or f"{where.split('/')[0]}/" in ALLOWED
            if name and not allowed:
                bypassing.append(f"{where}:{node.lineno}: {name}")
    assert bypassing == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hsivi_fast.training.trainer.write_report", lambda *arguments, **options: None)
        config = load_config("smoke", ["train.steps=1", "device=cpu", "log.images_every=1"])
        return train(config, tmp_path_factory.mktemp("runs") / "run").path


def _words(command, run, out):
    return [word.replace("RUN", str(run)).replace("OUT", str(out)) for word in command.split()]


# (command, the file that cannot be written)
COMMANDS = [
    ("sample RUN --seeds 0-3 --outdir OUT", "out/000000.png"),
    ("eval RUN --num-samples 4 --save-images OUT", "out/000000.png"),
    ("eval RUN --num-samples 4 --save-images OUT/a.npz", "out/a.npz"),
    ("prepare images RUN/samples --to OUT/a.npz --count 1", "out/a.npz"),
    ("report RUN", "run/samples/teacher.png"),
    ("report RUN --out OUT/page.html", "out/page.html"),
    ("convert RUN --to OUT/a.pt", "out/a.pt"),
    ("convert RUN/checkpoints/step_1/score_net_ema.safetensors --to OUT", "out/teacher.safetensors"),
    ("export RUN --format safetensors --outdir OUT", "out"),
    ("teacher smoke teacher_train.steps=1 --outdir OUT", "out/inputs.json"),
    ("train smoke train.steps=2 device=cpu log.images_every=1 --outdir RUN", "run/inputs.json"),
]


@pytest.mark.parametrize("command, file", COMMANDS)
def test_a_full_disk_is_a_line_that_names_the_file_and_leaves_nothing(
    tmp_path, run, monkeypatch, capsys, command, file
):
    """The disk is full for whatever the writer has written, before it is renamed: nothing can be on the disk then."""
    run = Path(shutil.copytree(run, tmp_path / "run"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hsivi_fast.checkpoints.files.sync", full)
    with pytest.raises(SystemExit) as ended:
        cli.main(_words(command, run, tmp_path / "out"))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2
    assert last.startswith(f"hsivi: cannot write {tmp_path}/{file}") and last.endswith(": No space left on device")
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == {path: content for path, content in before.items() if path.name != ".lock"}


def test_what_is_written_has_the_mode_that_the_umask_gives(tmp_path, run, monkeypatch):
    run = Path(shutil.copytree(run, tmp_path / "run"))
    (run / "results.json").unlink(missing_ok=True)
    monkeypatch.setattr("hsivi_fast.training.trainer.write_report", lambda *arguments, **options: None)
    before = os.umask(0o026)
    try:
        started = set(tmp_path.rglob("*"))
        for command in (
            "train smoke train.steps=2 device=cpu log.images_every=1 --outdir RUN",
            "export RUN --format safetensors --outdir OUT/export",
            "convert RUN --to OUT/a.pt",
            "convert RUN/checkpoints/step_1/score_net_ema.safetensors --to OUT/converted",
            "sample RUN --seeds 0-3 --outdir OUT/pictures",
            "teacher smoke teacher_train.steps=1 --outdir OUT/teacher",
            "eval RUN --num-samples 4 --save-images OUT/a.npz",
        ):
            cli.main(_words(command, run, tmp_path / "out"))
    finally:
        os.umask(before)
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - started
    assert {f".{name}" for name in ("safetensors", "json", "pt", "png", "npz", "md")} <= {
        path.suffix for path in written
    }
    assert {
        str(path): oct(path.stat().st_mode & 0o777) for path in written if path.stat().st_mode & 0o777 != 0o640
    } == {}
    assert RunFolder(run).checkpoints() == [1, 2]
