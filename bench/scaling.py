"""Weak and strong scaling of a training cycle over CPU ranks of this machine, and what they send each other.

One core a rank; one and two ranks, ZeRO 0 to 3, take about ten minutes on 2 cores:

    python -m bench.scaling
    python -m bench.scaling --ranks 1 2 4 8

Every case is measured in processes of its own, in turn, `--rounds` times over; medians. Weak: the same samples a rank;
strong: the same batch. The yardstick is the plain engine in one process. Three times are taken of a cycle: as it is;
with collectives that return at once (what the ranks compute); and its collectives by themselves. What of the latter is
not added to the former was overlapped. Bytes are counted at torch.distributed, for ring algorithms, as bench/cluster.py
models them.

What happens on machines that are not here is modelled, not measured: python -m bench.cluster, which fills the tables of
bench/scaling.md.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.distributed as dist

from bench.cluster import sent_per_cycle
from bench.measure import Row, describe, print_rows, write_rows
from bench.options import command_line
from bench.tables import Column
from bench.train_step import RATE, small_teacher, three_networks
from hsivi_fast.build import build_context
from hsivi_fast.config import config_from_dict
from hsivi_fast.method.layers import attach_log_gamma
from hsivi_fast.parallel.world import connect
from hsivi_fast.training.rollout import build_rollout
from hsivi_fast.training.updates import Updates
from hsivi_fast.training.zero import build_engine

ROOT = Path(__file__).resolve().parent.parent
NFE, F_LEARNING_TIMES = 5, 4
THREADS = 1  # of a rank
# collective -> which argument has the tensor whose bytes count, and the ring's factor of (W-1)/W of them
COLLECTIVES = {
    "all_reduce": (0, 2),
    "all_gather_into_tensor": (0, 1),
    "all_gather_single": (0, 1),
    "reduce_scatter_tensor": (1, 1),
    "reduce_scatter_single": (1, 1),
    "broadcast": (0, 1),
    "reduce": (0, 1),
}


def sent_megabytes(row):
    """What a rank sends, counted."""
    return f"{row['sent_bytes'] / 1e6:.1f}"


def modelled_megabytes(row):
    """What a rank sends, as the model has it."""
    return f"{row['modelled_bytes'] / 1e6:.1f}"


COLUMNS = [
    Column("case", "{case}"),
    Column("seconds a cycle (range)", "{ours:.2f} ({ours_range[0]:.2f} to {ours_range[1]:.2f})"),
    Column("images/s, times one process", "**{ratio:.2f}**"),
    Column("efficiency", "{efficiency:.0%}"),
    Column("computing, s", "{computing:.2f}", needs="computing"),
    Column("collectives alone, s", "{communicating:.2f}"),
    Column("in collectives, s", "{in_collectives:.2f}"),
    Column("overlapped", "{overlapped:.0%}", needs="overlapped"),
    Column("MB sent a rank", sent_megabytes),
    Column("modelled", modelled_megabytes),
]


class Finished:
    """What an asynchronous collective that was left out returns."""

    def wait(self, *arguments):
        """Nothing to wait for."""

    def is_completed(self):
        """It is."""
        return True


class Recorder:
    """Stands before torch.distributed's collectives: counts bytes and seconds, remembers calls, or leaves them out."""

    def __init__(self):
        self.mode, self.inside = "count", False
        self.clear()
        for name, (tensor, factor) in COLLECTIVES.items():
            if hasattr(dist, name):
                setattr(dist, name, self._wrapped(getattr(dist, name), tensor, factor))

    def clear(self):
        """Begin to count anew."""
        self.sent, self.seconds, self.calls = 0.0, 0.0, []

    def _wrapped(self, function, tensor, factor):
        def collective(*arguments, **options):
            if self.inside:  # one that is made of another
                return function(*arguments, **options)
            if self.mode == "leave out":
                return Finished() if options.get("async_op") else None
            value = _counted_tensor(arguments, options, tensor)
            share = (dist.get_world_size() - 1) / dist.get_world_size()
            self.sent += factor * share * value.numel() * value.element_size()
            self.calls.append(lambda: function(*arguments, **{**options, "async_op": False}))
            self.inside, start = True, time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.inside, self.seconds = False, self.seconds + time.perf_counter() - start

        return collective


def _counted_tensor(arguments, options, position):
    """The tensor of a collective whose bytes count: at its position, or by one of the names that it goes by."""
    if len(arguments) > position:
        return arguments[position]
    return next((options[name] for name in ("tensor", "output_tensor", "output") if name in options), None)


def measure_rank(case):
    """One rank's cycles; rank 0 returns {seconds, computing, communicating, sent, parameters}."""
    recorder = Recorder()  # before DeepSpeed takes hold of the functions
    config = config_from_dict(
        {
            "network": {"name": "cifar10", "channels": case["width"]},
            "teacher": {"checkpoint": "random weights"},
            "nfe": NFE,
            "name": "scaling",
            "device": "cpu",
            "train": {"batch_size": case["batch"], "f_learning_times": F_LEARNING_TIMES},
            "distributed": {"engine": case["engine"], "zero": case["zero"], "deepspeed": case["settings"]},
        }
    )
    world = connect(config)
    context = build_context(config, world)
    student, score_net, teacher = three_networks(small_teacher(config.network, context.device))
    context = context.with_teacher(teacher)
    attach_log_gamma(student, context.layers)
    # Before ZeRO-3 cuts them.
    parameters = [sum(parameter.numel() for parameter in network.parameters()) for network in (student, score_net)]
    student, score_net = build_engine(context, student), build_engine(context, score_net)
    rollout = build_rollout(context, student.network, student.frozen())
    updates = Updates(context, student, score_net)

    def cycle():
        updates.student(rollout.student_batch(0), RATE)
        rollout.start_cycle(1)
        for step in range(F_LEARNING_TIMES):
            updates.score_net(rollout.score_net_batch(step), RATE)

    def timed(function):
        if world.size > 1:
            dist.barrier()
        start = time.perf_counter()
        function()
        if world.size > 1:
            dist.barrier()
        return time.perf_counter() - start

    def call_all(calls):
        for call in calls:
            call()

    rollout.start_cycle(0)
    cycle()  # libraries and optimizers set themselves up
    measured = {
        "seconds": [],
        "computing": [],
        "communicating": [],
        "in_collectives": [],
        "sent": [],
        "parameters": parameters,
    }
    for _ in range(case["cycles"]):
        recorder.clear()
        measured["seconds"].append(timed(cycle))
        measured["sent"].append(recorder.sent)
        measured["in_collectives"].append(recorder.seconds)
        calls, recorder.inside = recorder.calls, True
        measured["communicating"].append(timed(lambda calls=calls: call_all(calls)))
        recorder.inside = False
        if case["zero"] < 3:  # whose parameters have to arrive
            recorder.mode = "leave out"
            with contextlib.suppress(FloatingPointError):
                measured["computing"].append(timed(cycle))
            recorder.mode = "count"
    return measured


def run_case(case):
    """What rank 0 of a case's processes returns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "bench.scaling", "--rank", json.dumps(case)]
    ranks = []
    for rank in range(case["ranks"]):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(case["ranks"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(THREADS),
            "DS_ACCELERATOR": "cpu",
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    outputs = [rank.communicate() for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"{case}: {' '.join(error for _, error in outputs)[-2000:]}")
    return json.loads(outputs[0][0].splitlines()[-1])


def cases(ranks, samples, width, cycles):
    """The cases to be measured, the yardsticks first: {name: case}."""

    def case(engine, zero, size, batch, kind):
        numbers = {"width": width, "cycles": cycles, "settings": None}
        return {**numbers, "engine": engine, "zero": zero, "ranks": size, "batch": batch, "kind": kind}

    largest = samples * max(ranks)
    found = {f"plain, batch {batch}": case("plain", 0, 1, batch, None) for batch in sorted({samples, largest})}
    found[f"deepspeed, batch {samples}"] = case("deepspeed", 1, 1, samples, "weak")
    for kind in ("weak", "strong"):
        for size in ranks:
            if size > 1:
                batch = samples * size if kind == "weak" else largest
                for zero in range(4):
                    found[f"{kind}, {size} ranks, ZeRO {zero}"] = case("deepspeed", zero, size, batch, kind)
    return found


class Medians:
    """What all rounds gave: {name of a case: [what `run_case` returned]}."""

    def __init__(self, results):
        self.results = results

    def of(self, name, key):
        """The median of a case's values of one kind."""
        return statistics.median(self.values(name, key))

    def values(self, name, key):
        """All values of one kind, of every cycle in every round."""
        return [value for result in self.results[name] for value in result[key]]


def rows_of(found, results):
    """The rows of a results file: {name: case} and {name: [what each round gave]} -> a list."""
    facts = describe(torch.device("cpu"), THREADS)
    return [_row(name, case, Medians(results), facts) for name, case in found.items()]


def _row(name, case, medians, facts):
    seconds, size = medians.of(name, "seconds"), case["ranks"]
    # Weak: against one process with one rank's samples. Strong: against one process with the whole batch.
    weak = case["kind"] == "weak"
    yardstick = f"plain, batch {case['batch'] // size if weak else case['batch']}"
    ratio = medians.of(yardstick, "seconds") / seconds * (size if weak else 1)  # in images/s
    computing = medians.of(name, "computing") if medians.results[name][0]["computing"] else None
    communicating = medians.of(name, "communicating") if size > 1 else 0.0
    all_seconds = medians.values(name, "seconds")
    extras = {
        "ranks": size,
        "batch": case["batch"],
        "zero": case["zero"] if case["engine"] == "deepspeed" else None,
        "ours_range": [min(all_seconds), max(all_seconds)],
        "efficiency": ratio / size,
        "sent_bytes": medians.of(name, "sent"),
        "modelled_bytes": _modelled_bytes(case, medians.results[name][0]["parameters"]),
        "computing": computing,
        "communicating": communicating,
        "in_collectives": medians.of(name, "in_collectives"),
        "overlapped": _overlapped(seconds, computing, communicating),
        "cores": os.cpu_count(),
        "threads": THREADS,
    }
    return Row(name, ours=seconds, ratio=ratio, unit="s", extras=extras, **facts)


def _modelled_bytes(case, parameters):
    """What a rank sends in a cycle as bench/cluster.py has it."""
    size = case["ranks"]
    if size == 1:
        return 0.0
    pool = (NFE + 1) * -(-F_LEARNING_TIMES * case["batch"] // NFE) * 3 * 32 * 32
    modelled = sent_per_cycle(
        *parameters, pool, size, case["zero"], F_LEARNING_TIMES, rollout_calls=NFE, reduction="all_reduce"
    )
    return sum(modelled.values())


def _overlapped(seconds, computing, communicating):
    """The share of the collectives that does not add to a cycle; None where there are none, or it is not known."""
    if not communicating or computing is None:
        return None
    return min(max(1 - (seconds - computing) / communicating, 0.0), 1.0)


def main():
    parser = command_line(__doc__, width=32, rounds=3, json=None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=8, help="of a rank")
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # a process of a case, which this script starts itself
    arguments = parser.parse_args()
    if arguments.rank:
        torch.set_num_threads(THREADS)
        print(json.dumps(measure_rank(json.loads(arguments.rank))))
        return 0
    found = cases(arguments.ranks, arguments.samples, arguments.width, arguments.cycles)
    results = {name: [] for name in found}
    for _ in range(arguments.rounds):
        for name, case in found.items():
            results[name].append(run_case(case))
    rows = rows_of(found, results)
    write_rows(arguments.json, rows)
    return print_rows(rows, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
