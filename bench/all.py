"""What matters most, in a given time: the benchmarks in their order of importance, each with what is left of it.

    python bench/all.py --list                        the plan: what each job takes and needs; nothing is run
    python bench/all.py --minutes 8                   on a GPU at full width; on a CPU at half width
    python bench/all.py --minutes 8 --outdir DIR      the results files elsewhere than in bench/results

On a GPU the tests that need one come first. Every job runs in a process of its own and writes each case as it is done.
So what the time did not suffice for is all that is missing; it is named at the end. Most of a GPU's minutes are
compiling. Where there are cores enough, the compilers of all jobs run beside each other first, with the tests. Then
nothing runs beside what is timed. `--one-by-one` leaves that out: a small GPU's memory does not hold all jobs at once.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench.measure import TURN
from bench.options import command_line
from bench.tables import Column, text_table
from hsivi_fast import ops
from hsivi_fast.training.telemetry import nvml_problem

ROOT = Path(__file__).resolve().parent.parent
SHORTEST = 5.0  # seconds; with less left, nothing is started
MANY_CORES = 8  # from so many on, jobs are prepared beside each other
PREPARING = 0.45  # of the time, at most
COLUMNS = [
    Column("job", "{name}"),
    Column("minutes", "{minutes:g}"),
    Column("needs", "{needs}"),
    Column("command", "{command}"),
]


@dataclass(frozen=True)
class Job:
    """One process of the plan.

    name: the stem of its results file; module: of bench, or pytest; options: its arguments without the file.
    minutes: how long it is expected to take; share: of the time that is left when it begins, what it may take.
    needs: packages beside torch and those that every command of hsivi_fast imports.
    prepares: whether it compiles much, and waits then for its turn (`bench.measure.wait_for_turn`).
    """

    name: str
    module: str
    options: list
    minutes: float
    share: float = 1.0
    needs: tuple = ()
    prepares: bool = False

    @property
    def tests(self):
        """Whether it is the tests', which are not timed."""
        return self.module == "pytest"

    def command(self, outdir):
        """(command line, file that its output goes into or None)."""
        start = [sys.executable, "-m"]
        if self.tests:
            return [*start, "pytest", *self.options], outdir / f"{self.name}.txt"
        return [*start, f"bench.{self.module}", *self.options, "--json", str(outdir / f"{self.name}.jsonl")], None

    def row(self):
        """What `--list` says of it."""
        needs = [package if find_spec(package) else f"{package} (missing)" for package in self.needs]
        command = "pytest -m gpu" if self.tests else " ".join([f"bench.{self.module}", *self.options])
        return {"name": self.name, "minutes": self.minutes, "needs": ", ".join(needs) or "-", "command": command}


@dataclass(frozen=True)
class Size:
    """How large the networks and batches of the GPU's plan are."""

    network: tuple = ("--width", "128")
    images: tuple = (128, 512)  # few and many, drawn at once
    batches: tuple = (128, 16)  # of an update
    cycle: tuple = ()
    measured: tuple = ()  # how many images a distance is of
    kernels: tuple = ("--minutes", "2")


def jobs(device):
    """The plan of a device, the most important first."""
    return gpu_jobs(card_name(device)) if device.type == "cuda" else cpu_jobs("cpu")


def cpu_jobs(device):
    """The jobs of a CPU, at half width."""
    sampling = cases("sampling_fp32", "sampling_bf16_eager")
    cycle = cases("train_cycle_fp32", "train_cycle_bf16")
    return [
        Job(f"sampling_{device}", "sampling", ["--rounds", "2", *sampling], 3),
        Job(f"train_step_{device}", "train_step", ["--rounds", "1", *cycle], 5),
        fid_job(device),
        Job(f"start_{device}", "start", ["--rounds", "3"], 0.5),
    ]


def gpu_jobs(card, size=None):
    """The jobs of a GPU, at full width by default.

    A batch that is new is compiled anew. So each job has one batch and one case.
    """
    size = size or Size()
    (few, many), (large, small) = size.images, size.batches
    ablation = [*size.network, *size.cycle, "--batch", str(small), "--images", str(few), "--rounds", "2"]

    def sampling(images, suffix, case, **options):
        arguments = [*size.network, "--images", str(images), "--rounds", "3", "--case", case]
        return Job(f"sampling_{card}_{images}{suffix}", "sampling", arguments, 1.5, **options)

    def cycle(batch, suffix, case, **options):
        arguments = ["--batch", str(batch), *size.network, *size.cycle, "--rounds", "2", "--case", case]
        return Job(f"train_step_{card}_{batch}{suffix}", "train_step", arguments, 2, **options)

    return [
        Job(f"gpu_tests_{card}", "pytest", gpu_test_options(), 3, share=0.35, needs=("pytest",)),
        sampling(few, "", "sampling_bf16_graphs", prepares=True),
        cycle(large, "", "train_cycle_bf16_graphs", prepares=True),
        cycle(small, "", "train_cycle_bf16_graphs", prepares=True),
        sampling(many, "", "sampling_bf16_graphs", prepares=True),
        Job(f"trace_{card}", "trace", ["--batches", str(small), str(large)], 3, prepares=True),
        Job(f"ops_{card}", "ops", ["--selection", "--replay", *size.kernels], 2, prepares=True),
        sampling(few, "_tf32", "sampling_tf32"),
        cycle(large, "_tf32", "train_cycle_tf32"),
        cycle(small, "_tf32", "train_cycle_tf32"),
        fid_job(card, size.measured),
        Job(f"ablation_{card}", "ablation", ablation, 15),
    ]


def fid_job(device, images=()):
    """Distances: the one job that needs the packages of distances."""
    return Job(f"fid_{device}", "fid", [*images, "--rounds", "1"], 1, needs=("torch_fidelity", "scipy", "PIL"))


def gpu_test_options():
    """What pytest is told: the tests marked gpu, of the files that have some, without what pytest.ini adds.

    That is for packages which a machine with a GPU may lack, so a file that cannot be imported ends none of the others.
    """
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    files = [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text()]
    options = ["-o", "addopts=", "-v", "-rs", "--tb=short", "--no-header", "--continue-on-collection-errors"]
    options += ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    if find_spec("xdist"):
        options += ["-n", str(min(6, os.cpu_count()))]
    return [*options, "-m", "gpu", *files]


def cases(*names):
    """The arguments that choose these cases."""
    return [word for name in names for word in ("--case", name)]


def card_name(device):
    """The GPU in the names of results files, as "h100"."""
    words = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower().replace("nvidia ", "")).split("_")
    return next((word for word in words if word not in ("geforce", "tesla", "rtx", "")), "gpu")


def problem_of(device, needs_clocks):
    """Why the GPU's plan cannot be run on a device as it should, in one line; None where it can."""
    if device.type != "cuda":
        return None
    if old := ops.old_capability(device):
        advice = "time what it can: python -m bench.sampling --case sampling_fp32"
        return f"GPU: compute capability {old[0]}, and kernels and bfloat16 need {old[1]} or newer; {advice}"
    if needs_clocks and (problem := nvml_problem(device)):
        return f"NVML: {problem}; rows would have no clocks and no energy; mend it, or add --without-clocks"
    return None


@contextlib.contextmanager
def started(job, outdir, turn=None):
    """The process of a job; at the end it is killed with all that it has started. turn: see `bench.measure.TURN`."""
    command, output = job.command(outdir)
    environment = os.environ if turn is None else {**os.environ, TURN: str(turn)}
    with open(output, "w") if output else contextlib.nullcontext() as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stdout=file, stderr=file)
        try:
            yield process
        finally:  # after Ctrl-C too
            kill(process)


def kill(process):
    """Kill a process and all that it has started: its compilers may outlive it."""
    signalled(process, signal.SIGKILL)
    process.wait()


def signalled(process, number):
    """Send a signal to a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def run(job, outdir, seconds):
    """Run a job: its exit code, or None where it was ended after so many seconds, with all that it had started."""
    with started(job, outdir) as process:
        code = waited(process, seconds)
    show(job, outdir)
    return code


def waited(process, seconds):
    """The exit code of a process, or None where it runs after so many seconds."""
    try:
        return process.wait(timeout=max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None


def show(job, outdir):
    """Print the end of what a job wrote, where that went into a file."""
    _, output = job.command(outdir)
    if output:
        print("\n".join(output.read_text().splitlines()[-20:]))


class Beside:
    """Jobs that compile beside each other, and beside the tests, until each has its turn.

    turns: an empty folder.
    """

    def __init__(self, plan, outdir, turns, running):
        self.outdir, self.turns = outdir, turns
        jobs = [job for job in plan if (job.prepares or job.tests) and not lacking(job)]
        self.processes = {
            job.name: running.enter_context(started(job, outdir, None if job.tests else turns / job.name))
            for job in jobs
        }

    def wait(self, seconds):
        """Until all are ready and the tests are done, or so many seconds. Those that go on then are halted."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not all(map(self._is_ready, self.processes)):
            time.sleep(0.05)
        for process in self.processes.values():
            signalled(process, signal.SIGSTOP)

    def _is_ready(self, name):
        return self.processes[name].poll() is not None or (self.turns / f"{name}.ready").exists()

    def run(self, job, seconds):
        """As `run`, of a job that has compiled already."""
        process = self.processes[job.name]
        (self.turns / f"{job.name}.go").touch()
        if not job.tests:  # those are not taken up again: they were to run beside others
            signalled(process, signal.SIGCONT)
        code = waited(process, 0 if job.tests else seconds)
        kill(process)  # now: nothing of it may run beside the next job
        show(job, self.outdir)
        return code


def lacking(job):
    """The packages that a job needs and that are not there."""
    return [package for package in job.needs if not find_spec(package)]


def main(given=None):
    parser = command_line(__doc__)
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="when to stop; a job that runs then is ended, and keeps the cases that it has written",
    )
    parser.add_argument("--outdir", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--one-by-one", action="store_true", help="compile for a job when its turn comes")
    parser.add_argument("--list", action="store_true", help="print the plan, and run nothing")
    parser.add_argument("--without-clocks", action="store_true", help="go on where the driver tells no clocks")
    arguments = parser.parse_args(given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = jobs(device)
    if arguments.list:
        print(text_table([job.row() for job in plan], COLUMNS))
        return 0
    if problem := problem_of(device, not arguments.without_clocks):
        print(f"all.py: {problem}", file=sys.stderr)
        return 2
    arguments.outdir.mkdir(parents=True, exist_ok=True)
    beside = device.type == "cuda" and os.cpu_count() >= MANY_CORES and not arguments.one_by_one
    return run_all(plan, arguments.outdir.resolve(), 60 * arguments.minutes, beside)


def run_all(plan, outdir, seconds, beside=False):
    """Run a plan within so many seconds; the exit code, 1 where a job had an error.

    beside: whether the jobs compile beside each other first.
    """
    end, missing, failed, compiled = time.monotonic() + seconds, [], False, None
    with contextlib.ExitStack() as running:
        if beside and seconds >= SHORTEST:
            print("\n== compiling for all jobs, and the tests", flush=True)
            turns = Path(running.enter_context(tempfile.TemporaryDirectory()))
            compiled = Beside(plan, outdir, turns, running)
            compiled.wait(PREPARING * seconds)
        for job in plan:
            left = end - time.monotonic()
            if left < SHORTEST:
                missing.append(job.name)
            elif packages := lacking(job):
                missing.append(f"{job.name} (needs {', '.join(packages)})")
            else:
                print(f"\n== {job.name}: {job.row()['command']}", flush=True)
                if compiled and job.name in compiled.processes:
                    code = compiled.run(job, left * job.share)
                else:
                    code = run(job, outdir, left * job.share)
                failed |= bool(code)
                if code is None:
                    missing.append(f"the rest of {job.name}")
    if missing:
        print(f"\nNOT RUN for want of time or packages: {', '.join(missing)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
