"""Bad inputs by kind, each given to the command in a process of its own: what must not happen, happens to nobody.

    python -m tests.hostile --minutes 20                 # 1,500 inputs on 2 cores
    python -m tests.hostile --seed 0 --only 217          # one of them again, with all that it prints

Each input runs in a scratch folder, with limits on time, memory and output. It ends with exit code 0, or with 2 and one
line on stderr. There is no traceback, no warning of a library, no file outside of its folder, and no file changed or
left by what was refused. Inputs depend on --seed alone (hostile_inputs.py makes them), so a fault can be repeated.
"""

import argparse
import collections
import contextlib
import io
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS, MEMORY, OUTPUT, FILE = 60, 2 << 30, 20_000, 256 << 20  # limits: of a process beyond what torch takes, in bytes
# What may stand on stderr before the one line: bars, and our own words.
BAR = re.compile(r"\d+%\||\?\w*/s|\d+(\.\d+)?(\w+/s|s/\w+)|^\s*\d+\w* \[\d\d:\d\d")
OURS = re.compile(r"^(backend |warning: |step \d+: |compiling |accuracy on |loading )")


def prepare():
    """Import once what all processes need: they are forked from this one."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # as the command does; torch reads it when it is imported
    import matplotlib.figure  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch
    import torch.utils.tensorboard  # noqa: F401
    import torch_fidelity.metric_fid  # noqa: F401

    import hsivi_fast.checkpoints.convert
    import hsivi_fast.cli
    import hsivi_fast.export.write
    import hsivi_fast.report.run_report
    import hsivi_fast.training.pretrain
    import hsivi_fast.training.trainer  # noqa: F401

    torch.set_num_threads(1)


def start(given, folder, seconds=SECONDS):
    """Fork a process for an input, in `folder`/work; returns its id."""
    sys.stdout.flush(), sys.stderr.flush()
    number = os.fork()
    if number:
        return number
    code = 70
    try:
        os.setsid()
        _become(given, folder, seconds)
        code = _command(given.arguments)
    except BaseException:
        (folder / "stderr").write_text(f"of hostile.py itself: {traceback.format_exc()}")
    finally:
        os._exit(code)


def _become(given, folder, seconds):
    os.chdir(folder / "work")
    private = {"HOME": folder / "home", "HSIVI_CACHE": folder / "home" / "cache", "TMPDIR": folder / "tmp"}
    for place in private.values():
        place.mkdir(exist_ok=True)
    private |= {"MPLCONFIGDIR": os.environ["MPLCONFIGDIR"]} if "MPLCONFIGDIR" in os.environ else {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCH_HOME", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    for name, value in {**private, **given.environment}.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, str(value))
    tempfile.tempdir = None
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        what = given.streams.get(descriptor)
        if what == "full":
            other = os.open("/dev/full", os.O_WRONLY)
        elif what == "pipe":
            reading, other = os.pipe()
            os.close(reading)
        else:
            path, mode = (folder / name, os.O_WRONLY | os.O_CREAT) if descriptor else ("/dev/null", os.O_RDONLY)
            other = os.open(path, mode, 0o600)
        os.dup2(other, descriptor)
        os.close(other)
        if what == "closed":
            os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (_stream(number) for number in range(3))
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, own + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (2 * seconds, 2 * seconds))
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def _stream(descriptor):
    """What the interpreter would have made of a descriptor: None where it is closed."""
    try:
        file = open(
            descriptor, "rb" if descriptor == 0 else "wb", buffering=0 if descriptor == 2 else -1, closefd=False
        )
    except OSError:
        return None
    return io.TextIOWrapper(file, errors="backslashreplace" if descriptor == 2 else None, write_through=descriptor == 2)


def _command(arguments):
    """The exit code of the command, as the interpreter would give it."""
    from hsivi_fast import cli

    try:
        cli.main(arguments)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        code = 1
        with contextlib.suppress(OSError, ValueError):  # as the interpreter does where nobody can be told
            traceback.print_exc(file=sys.stderr) if sys.stderr is not None else None
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except Exception:  # an OSError, or what click has put in the place of a stream
        return 120
    return code


def complaints(given, folder, status, peak, seconds, before, limit=SECONDS):
    """What is wrong with how an input ended, in words."""
    found = []
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    code = None if killed else os.WEXITSTATUS(status)
    if seconds >= limit:
        found.append(f"hang: no end within {limit} s")
    elif killed:
        found.append(f"ended by signal {killed}")
    elif code not in (0, 2) and not (code == 1 and given.streams.get(1) == "pipe"):  # 1: nobody reads any more
        found.append(f"exit code {code}")
    said = _text(folder / "stderr")
    if "Traceback (most recent call last)" in said + _text(folder / "stdout"):
        found.append("traceback")
    lines = [
        line
        for line in re.split(r"[\r\n]+", said)
        if line.startswith("hsivi: ") or (line.strip() and not BAR.search(line))
    ]
    others = [line for line in lines if not line.startswith("hsivi: ") and not OURS.match(line)]
    if "traceback" not in found and others:
        found.append(f"stderr has {len(others)} lines of others, first: {others[0][:150]}")
    ours = [line for line in lines if line.startswith("hsivi: ")]
    if code == 2 and len(ours) != 1 and 2 not in given.streams:
        found.append(f"{len(ours)} lines of ours with exit code 2")
    if any(len(line) > 1000 for line in ours):
        found.append(f"a line of {max(map(len, ours))} characters")
    if len(said) > OUTPUT:
        found.append(f"{len(said)} characters on stderr")
    if peak > MEMORY:
        found.append(f"peak memory {peak / 2**30:.1f} GB")
    after = snapshot(folder)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    outside = [name for name in changed if not name.startswith(("work/", "home/cache/"))]
    if outside:
        found.append(f"written outside: {', '.join(outside[:3])}")
    inside = [name for name in changed if name.startswith("work/") and not name.endswith("/.lock")]
    if code == 2 and given.keeps and inside:
        found.append(f"refused, and changed: {', '.join(inside[:3])}")
    return found


def _text(file):
    return file.read_bytes()[: 100 * OUTPUT].decode(errors="replace") if file.is_file() else ""


def snapshot(folder):
    """{path: size and time of change} of all files in a folder; the streams and the temporary files do not count."""
    found = {}
    for path, folders, files in os.walk(folder):
        if Path(path) == folder:
            folders[:] = [name for name in folders if name != "tmp"]
            files = [name for name in files if name not in ("stdout", "stderr")]
        for name in files:
            status = os.lstat(os.path.join(path, name))
            found[os.path.relpath(os.path.join(path, name), folder)] = (status.st_size, status.st_mtime_ns)
    return found


class Fixtures:
    """What inputs are made of: runs and files that are whole, made once by the command itself."""

    def __init__(self, folder):
        from . import hostile_inputs  # here: numpy and torch come with it, and `main` says first how many threads

        self.folder = folder
        self.run, self.plane, self.published = folder / "run", folder / "plane", folder / "published.pt"
        self.export, self.statistics = folder / "export", folder / "statistics.npz"
        quick = ["device=cpu", "log_every=1", "save_every=1", "eval.num_samples=0"]
        quick += ["start.updates=2", "start.trajectories=8", "start.score_net_updates=0"]
        for words in (
            ["train", "smoke", "train.steps=2", "--outdir", self.run, *quick],
            ["train", "toy2d", "train.steps=1", "train.batch_size=8", "--outdir", self.plane, *quick],
            ["convert", self.run, "--to", self.published],
            ["export", self.run, "--format", "safetensors", "--outdir", self.export],
        ):
            place = Path(tempfile.mkdtemp(dir=folder))
            (place / "work").mkdir()
            given = hostile_inputs.Input("fixture", words)
            _, status = os.waitpid(start(given, place), 0)
            assert status == 0, f"{given}: {_text(place / 'stderr')}"
            shutil.rmtree(place)
        self.checkpoint = self.run / "checkpoints" / "step_2" / "score_net_ema.safetensors"


def run_all(seed, numbers, minutes, workers, limit=SECONDS, show=print):
    """Run the inputs of these numbers.

    Returns (Counter of (kind, "tried" or "faults"), [(number, input, complaints)]).
    """
    from . import hostile_inputs  # here: as above

    counts, faults, deadline = collections.Counter(), [], time.monotonic() + 60 * minutes
    waiting, running = list(reversed(numbers)), {}
    with tempfile.TemporaryDirectory(prefix="hostile_") as scratch:
        scratch = Path(scratch)
        os.environ["MPLCONFIGDIR"] = str(scratch / "matplotlib")
        fixtures = Fixtures(scratch)
        while running or (waiting and time.monotonic() < deadline):
            while waiting and len(running) < workers and time.monotonic() < deadline:
                number = waiting.pop()
                folder = scratch / f"input_{number}"
                (folder / "work").mkdir(parents=True)
                given = hostile_inputs.make(random.Random(f"{seed} {number}"), number, folder / "work", fixtures)
                (folder / "home").mkdir()
                before = snapshot(folder)
                began = time.monotonic()
                running[start(given, folder, limit)] = (number, given, folder, before, began)
            for process, (number, given, folder, before, began) in list(running.items()):
                late = time.monotonic() - began >= limit
                if late:
                    os.killpg(process, signal.SIGKILL)
                ended, status, usage = os.wait4(process, 0 if late else os.WNOHANG)
                if not ended:
                    continue
                seconds = time.monotonic() - began
                found = complaints(given, folder, status, usage.ru_maxrss * 1024, seconds, before, limit)
                counts[given.kind, "tried"] += 1
                if found:
                    counts[given.kind, "faults"] += 1
                    faults.append((number, given, found))
                    last = _text(folder / "stderr").strip().replace("\r", "\n").splitlines()[-1:]
                    show(f"{number} {given.kind}: {given}\n    {'; '.join(found)}\n    {''.join(last)[:300]}")
                if len(numbers) == 1:
                    show(f"{given}\n{_text(folder / 'stdout')}\n{_text(folder / 'stderr')}")
                del running[process]
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.005)
    return counts, faults


def _tree():
    """The repository as git sees it, for what an input may have written there."""
    listed = subprocess.run(["git", "status", "--porcelain", "-uall"], cwd=ROOT, capture_output=True, text=True)
    return set(listed.stdout.splitlines())


def main(arguments=None):
    """Run inputs and print a table; exit code 1 where there are faults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20, help="start no input after so long")
    parser.add_argument("--inputs", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, action="append", help="the input of this number alone; may be repeated")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=SECONDS, help="seconds of one input")
    given = parser.parse_args(arguments)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # before numpy is imported: a process with threads is not to be forked
    prepare()
    tree, began = _tree(), time.monotonic()
    numbers = given.only or range(given.inputs)
    counts, faults = run_all(given.seed, list(numbers), given.minutes, given.workers, int(given.limit))
    kinds = sorted({kind for kind, _ in counts})
    print(f"\n{'kind':12}  tried   fine  faults")
    for kind in [*kinds, "all"]:
        of = kinds if kind == "all" else [kind]
        tried, bad = (sum(counts[one, what] for one in of) for what in ("tried", "faults"))
        print(f"{kind:12} {tried:6} {tried - bad:6} {bad:7}")
    took = f"seed {given.seed}, {time.monotonic() - began:.0f} s"
    print(f"{took}; again: python -m tests.hostile --seed {given.seed} --only N")
    strangers = sorted(_tree() - tree)
    if strangers:
        print(f"written into the repository: {', '.join(strangers[:5])}")
    return 1 if faults or strangers else 0


if __name__ == "__main__":
    sys.exit(main())
