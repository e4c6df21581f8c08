"""What matters most, in a given time: the benchmarks in their order of importance, each with what is left of it.

    python bench/all.py --minutes 8                   on a GPU at full width; on a CPU at half width
    python bench/all.py --minutes 8 --outdir DIR      the results files elsewhere than in bench/results

Every benchmark runs in a process of its own and writes each case as it is done, so what the time did not suffice for is all that is missing; it is named at the end.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHORTEST = 5.0  # seconds; with less left, nothing is started


def jobs(gpu, device):
    """(name of the results file, module, arguments), the most important first."""
    cases = lambda *names: [word for name in names for word in ("--case", name)]
    if not gpu:
        return [
            (f"sampling_{device}", "sampling", ["--rounds", "2", *cases("sampling_fp32", "sampling_bf16_eager")]),
            (f"train_step_{device}", "train_step", ["--rounds", "1", *cases("train_cycle_fp32", "train_cycle_bf16")]),
            (f"fid_{device}", "fid", ["--rounds", "1"]),
            (f"start_{device}", "start", ["--rounds", "3"]),
        ]
    full = ["--width", "128"]
    return [
        (
            f"sampling_{device}",
            "sampling",
            [*full, "--images", "64", *cases("sampling_fp32", "sampling_bf16_graphs", "latency_bf16_graphs")],
        ),
        (
            f"train_step_{device}",
            "train_step",
            [
                *full,
                "--rounds",
                "2",
                *cases("train_cycle_fp32", "train_cycle_bf16_graphs", "train_cycle_bf16_graphs_redraw4"),
            ],
        ),
        (f"sampling_{device}_512", "sampling", [*full, "--images", "512", *cases("sampling_bf16_graphs")]),
        (
            f"train_step_{device}_128",
            "train_step",
            [*full, "--batch", "128", "--rounds", "1", *cases("train_cycle_bf16_graphs")],
        ),
        (f"ops_{device}", "ops", ["--minutes", "1"]),
        (f"fid_{device}", "fid", ["--rounds", "1"]),
        (f"ablation_{device}", "ablation", [*full, "--rounds", "2"]),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="when to stop; a benchmark that runs then is ended, and keeps the cases that it has written",
    )
    parser.add_argument("--outdir", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()
    import torch

    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name().lower().replace("nvidia ", "").split()[0].replace("-", "_") if gpu else "cpu"
    arguments.outdir.mkdir(parents=True, exist_ok=True)
    end, missing, code = time.monotonic() + 60 * arguments.minutes, [], 0
    for name, module, options in jobs(gpu, device):
        left = end - time.monotonic()
        if left < SHORTEST:
            missing.append(name)
            continue
        print(f"\n== {name}: python -m bench.{module} {' '.join(options)}", flush=True)
        command = [
            sys.executable,
            "-m",
            f"bench.{module}",
            *options,
            "--json",
            str((arguments.outdir / f"{name}.jsonl").resolve()),
        ]
        try:
            code |= subprocess.run(command, cwd=ROOT, timeout=left).returncode != 0
        except subprocess.TimeoutExpired:
            missing.append(f"the rest of {name}")
    if missing:
        print(f"\nNOT RUN for want of time: {', '.join(missing)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
