"""Every benchmark is started by its path as it is as a module."""

import subprocess
import sys

import pytest
from bench_cases import ROOT

SCRIPTS = sorted(path for path in (ROOT / "bench").glob("*.py") if "def main()" in path.read_text())
MECHANISM = """
if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
"""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_finds_the_repository_by_the_same_two_lines(path):
    text = path.read_text()
    assert MECHANISM in text and "\nfrom ." not in text


@pytest.mark.parametrize("name", ["train_step", "report", "start"])
def test_a_script_is_started_by_its_path_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    command = [sys.executable, str(ROOT / "bench" / f"{name}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {name}.py") and "--help" in done.stdout


def test_without_time_nothing_is_started_and_all_is_named(tmp_path):
    command = [sys.executable, "bench/all.py", "--minutes", "0", "--outdir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "NOT RUN for want of time: sampling_" in done.stdout and not list(tmp_path.iterdir())
