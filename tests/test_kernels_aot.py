"""What the compiler makes of the kernels for GPUs that are not here: no spills, no stack, 16-byte accesses, few instructions.

In a process of its own, because this one interprets the kernels. The whole matrix is `python -m bench.aot`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHOD = ("affine_noise_step_forward", "affine_noise_step_backward", "score_losses_denoising", "score_losses_fisher")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The subset's figures. The command fails by itself on spills, stacks and narrow accesses."""
    file = tmp_path_factory.mktemp("aot") / "rows.jsonl"
    done = subprocess.run([sys.executable, "-m", "bench.aot", "--subset", "--processes", "2", "--json", file], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_no_spills_no_stack_and_wide_accesses(rows):
    assert all(row["stack"] == 0 and row["local"] == 0 and not row["problems"] for row in rows)
    for architecture in (80, 90, 100):
        for name in METHOD:
            due = [row for row in rows if row["kernel"] == name and row["sm"] == architecture and row["event"] == "cifar10" and row["layout"] == "row-major"]
            assert {(row["dtype"], row["log_gamma"]) for row in due} >= {(dtype, shape) for dtype in ("fp32", "bf16") for shape in ("[1]", "[K]", "[event]", "[K, event]")}
            assert all(row["wide_accesses"] > 0 for row in due)


@pytest.mark.parametrize("name, instructions, registers", [
    ("affine_noise_step_forward", 62, 96), ("affine_noise_step_backward", 62, 96), ("score_losses_denoising", 64, 96), ("score_losses_fisher", 84, 128)])
def test_the_method_kernels_stay_as_lean_as_they_are(rows, name, instructions, registers):
    """Static instructions per element and registers a thread, for Hopper; bounds a little above what the table in bench/results has."""
    measured = [row for row in rows if row["kernel"] == name and row["sm"] == 90 and row["event"] == "cifar10" and row["layout"] == "row-major"]
    assert measured and max(row["instructions_per_element"] for row in measured) <= instructions and max(row["registers"] for row in measured) <= registers


def test_group_normalisation_in_both_forms(rows):
    kernels = {row["kernel"] for row in rows if row["kernel"].startswith("group_norm_silu")}
    assert kernels == {f"group_norm_silu_{form}" for form in ("forward", "backward", "split_statistics", "split_forward", "split_backward")}
    one_pass = [row for row in rows if row["kernel"] in ("group_norm_silu_forward", "group_norm_silu_backward")]
    assert max(row["registers"] * row["warps"] * 32 for row in one_pass) <= 65536


def test_the_gate_sees_a_stack():
    """The library's sine has a slow path with a stack: a kernel that uses it does not pass."""
    code = '''
import sys
sys.argv = ["aot"]
import bench.aot as aot, triton, triton.language as tl, torch
@triton.jit
def wave(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.sin(tl.load(x_ptr + i)))
x = torch.empty(1024, device="meta")
figures = aot.measure(aot.source_of(wave, {"x_ptr": x, "y_ptr": x, "BLOCK": 1024}), 4, 90)
case = {"kernel": "wave", "case": {}, "launch": (wave, {"BLOCK": 1024}, 4), "moved": 8, "due": True}
print(figures["stack"], figures["local"], aot.row_of(case, 90, figures)["problems"])
'''
    (Path(scripts := ROOT / "bench") / "x").parent  # the code must stand in a file: Triton reads its source
    done = _run_file(code)
    stack, local, problems = done.split(maxsplit=2)
    assert int(stack) > 0 and int(local) > 0 and "bytes of stack" in problems and "16 bytes" not in problems


def _run_file(code):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "wave.py"
        file.write_text(code)
        done = subprocess.run([sys.executable, file], cwd=ROOT, capture_output=True, text=True, env={**__import__("os").environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout
