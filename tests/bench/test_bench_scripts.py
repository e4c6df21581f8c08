"""Every benchmark is started by its path as it is as a module."""

import os
import re
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


def test_no_script_needs_what_only_the_tests_need():
    """The quick start installs the package without [dev], and starts them."""
    for path in (ROOT / "bench").glob("*.py"):
        if not path.name.startswith("test_"):
            imported = re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
            assert not {"pytest", "xdist", "diffusers"} & set(imported), path.name


def test_the_operations_are_collected_in_pytest_benchmark_as_the_page_says():
    page = (ROOT / "bench" / "README.md").read_text()
    assert "`pytest -n 0 bench/test_ops.py --benchmark-only`" in page
    command = [sys.executable, "-m", "pytest", "-n", "0", "bench/test_ops.py", "--benchmark-only", "--collect-only"]
    # This test may run in one of pytest's two processes, which that one must not take itself for.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True)
    if "unrecognized arguments: --benchmark-only" in done.stderr:
        pytest.skip("pytest-benchmark is not installed")
    assert done.returncode == 0 and "18 tests collected" in done.stdout, done.stdout + done.stderr


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
    assert "NOT RUN for want of time or packages: sampling_" in done.stdout and not list(tmp_path.iterdir())
