"""What matters most, in a given time: the benchmarks in their order of importance, each with what is left of it.

    python bench/all.py --minutes 8                   on a GPU at full width; on a CPU at half width
    python bench/all.py --minutes 8 --outdir DIR      the results files elsewhere than in bench/results

Every benchmark runs in a process of its own and writes each case as it is done. So what the time did not suffice for is
all that is missing; it is named at the end.
"""

import subprocess
import sys
import time
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench.options import command_line

ROOT = Path(__file__).resolve().parent.parent
SHORTEST = 5.0  # seconds; with less left, nothing is started


def jobs(gpu, device):
    """(name of the results file, module, arguments), the most important first."""
    return gpu_jobs(device) if gpu else cpu_jobs(device)


def cpu_jobs(device):
    """The jobs of a CPU, at half width."""
    sampling = cases("sampling_fp32", "sampling_bf16_eager")
    cycle = cases("train_cycle_fp32", "train_cycle_bf16")
    return [
        (f"sampling_{device}", "sampling", ["--rounds", "2", *sampling]),
        (f"train_step_{device}", "train_step", ["--rounds", "1", *cycle]),
        (f"fid_{device}", "fid", ["--rounds", "1"]),
        (f"start_{device}", "start", ["--rounds", "3"]),
    ]


def gpu_jobs(device):
    """The jobs of a GPU, at full width."""
    full = ["--width", "128"]
    sampling = cases("sampling_fp32", "sampling_bf16_graphs", "latency_bf16_graphs")
    cycle = cases("train_cycle_fp32", "train_cycle_bf16_graphs", "train_cycle_bf16_graphs_redraw4")
    many_images = ["--images", "512", *cases("sampling_bf16_graphs")]
    large_batch = ["--batch", "128", "--rounds", "1", *cases("train_cycle_bf16_graphs")]
    return [
        (f"sampling_{device}", "sampling", [*full, "--images", "64", *sampling]),
        (f"train_step_{device}", "train_step", [*full, "--rounds", "2", *cycle]),
        (f"sampling_{device}_512", "sampling", [*full, *many_images]),
        (f"train_step_{device}_128", "train_step", [*full, *large_batch]),
        (f"ops_{device}", "ops", ["--minutes", "1"]),
        (f"fid_{device}", "fid", ["--rounds", "1"]),
        (f"ablation_{device}", "ablation", [*full, "--rounds", "2"]),
    ]


def cases(*names):
    """The arguments that choose these cases."""
    return [word for name in names for word in ("--case", name)]


def card_name():
    """The GPU in the names of results files, as "h100"."""
    return torch.cuda.get_device_name().lower().replace("nvidia ", "").split()[0].replace("-", "_")


def main():
    parser = command_line(__doc__)
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="when to stop; a benchmark that runs then is ended, and keeps the cases that it has written",
    )
    parser.add_argument("--outdir", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    arguments.outdir.mkdir(parents=True, exist_ok=True)
    end, missing, code = time.monotonic() + 60 * arguments.minutes, [], 0
    for name, module, options in jobs(gpu, card_name() if gpu else "cpu"):
        left = end - time.monotonic()
        if left < SHORTEST:
            missing.append(name)
            continue
        print(f"\n== {name}: python -m bench.{module} {' '.join(options)}", flush=True)
        file = (arguments.outdir / f"{name}.jsonl").resolve()
        command = [sys.executable, "-m", f"bench.{module}", *options, "--json", str(file)]
        try:
            code |= subprocess.run(command, cwd=ROOT, timeout=left).returncode != 0
        except subprocess.TimeoutExpired:
            missing.append(f"the rest of {name}")
    if missing:
        print(f"\nNOT RUN for want of time: {', '.join(missing)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
