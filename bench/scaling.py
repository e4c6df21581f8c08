"""Weak and strong scaling of a training cycle over CPU ranks of this machine, one core each, and what they send each other.

    python -m bench.scaling                 one and two ranks, ZeRO 0 to 3: about ten minutes on 2 cores
    python -m bench.scaling --ranks 1 2 4 8

Every case is measured in processes of its own, in turn, `--rounds` times over; medians. Weak: the same samples a rank; strong: the same batch. The yardstick is the
plain engine in one process. Three times are taken of a cycle: as it is; with collectives that return at once (what the ranks compute); and its collectives by themselves.
What of the latter is not added to the former was overlapped. Bytes are counted at torch.distributed, for ring algorithms, as bench/cluster.py models them.

What happens on machines that are not here is modelled, not measured: python -m bench.cluster, which writes bench/scaling.md.
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

import torch
import torch.distributed as dist

from hsivi_fast.build import build_execution, build_layers, prepare_device
from hsivi_fast.config import config_from_dict
from hsivi_fast.method.layers import attach_log_gamma
from hsivi_fast.parallel.world import connect
from hsivi_fast.training.engine import build_engine
from hsivi_fast.training.rollout import build_rollout
from hsivi_fast.training.trainer import Updates

from .cluster import sent_per_cycle
from .measure import describe, print_rows, write_rows
from .train_step import RATE, small_teacher, three_networks

ROOT = Path(__file__).resolve().parent.parent
NFE, F_UPDATES = 5, 4
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
            value = (
                arguments[tensor]
                if len(arguments) > tensor
                else options.get("tensor", options.get("output_tensor", options.get("output")))
            )
            self.sent += (
                factor * (dist.get_world_size() - 1) / dist.get_world_size() * value.numel() * value.element_size()
            )
            self.calls.append(lambda: function(*arguments, **{**options, "async_op": False}))
            self.inside, start = True, time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.inside, self.seconds = False, self.seconds + time.perf_counter() - start

        return collective


def measure_rank(case):
    """One rank's cycles; rank 0 returns {seconds, computing, communicating, sent, parameters}."""
    recorder = Recorder()  # before DeepSpeed takes hold of the functions
    config = config_from_dict(
        {
            "network": {"name": "cifar10", "channels": case["channels"]},
            "teacher": {"checkpoint": "random weights"},
            "nfe": NFE,
            "name": "scaling",
            "device": "cpu",
            "train": {"batch_size": case["batch"], "f_learning_times": F_UPDATES},
            "distributed": {"engine": case["engine"], "zero": case["zero"], "deepspeed": case["settings"]},
        }
    )
    world = connect(config)
    device, _ = prepare_device(config, world=world)
    execution, layer = build_execution(config, device), build_layers(config, device)
    networks = three_networks(small_teacher(config.network, device))
    attach_log_gamma(networks[0], layer)
    parameters = [
        sum(parameter.numel() for parameter in network.parameters()) for network in networks[:2]
    ]  # before ZeRO-3 cuts them
    student, score_net = (build_engine(config, network, execution, world) for network in networks[:2])
    rollout, updates = (
        build_rollout(config, layer, student.network, execution, world),
        Updates(student, score_net, networks[2], layer, execution),
    )

    def cycle():
        updates.student(rollout.student_batch(0), RATE)
        rollout.start_cycle(1)
        for step in range(F_UPDATES):
            updates.score_net(rollout.score_net_batch(step), RATE)

    def timed(function):
        if world.size > 1:
            dist.barrier()
        start = time.perf_counter()
        function()
        if world.size > 1:
            dist.barrier()
        return time.perf_counter() - start

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
        measured["communicating"].append(timed(lambda: [call() for call in calls]))
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
    ranks = []
    for rank in range(case["ranks"]):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(case["ranks"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "bench.scaling", "--rank", json.dumps(case)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [rank.communicate() for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"{case}: {' '.join(error for _, error in outputs)[-2000:]}")
    return json.loads(outputs[0][0].splitlines()[-1])


def cases(ranks, samples, channels, cycles):
    """The cases to be measured, the yardsticks first: {name: case}."""
    common = {"channels": channels, "cycles": cycles, "settings": None}
    most = max(ranks)
    found = {
        f"plain, batch {batch}": {**common, "engine": "plain", "zero": 0, "ranks": 1, "batch": batch, "kind": None}
        for batch in sorted({samples, samples * most})
    }
    found["deepspeed, batch %d" % samples] = {
        **common,
        "engine": "deepspeed",
        "zero": 1,
        "ranks": 1,
        "batch": samples,
        "kind": "weak",
    }
    for kind in ("weak", "strong"):
        for size in ranks:
            for zero in range(4) if size > 1 else ():
                batch = samples * (size if kind == "weak" else most)
                found[f"{kind}, {size} ranks, ZeRO {zero}"] = {
                    **common,
                    "engine": "deepspeed",
                    "zero": zero,
                    "ranks": size,
                    "batch": batch,
                    "kind": kind,
                }
    return found


def rows_of(found, results):
    """The rows of a results file: {name: case} and {name: [what each round gave]} -> a list."""
    middle = lambda name, key: statistics.median(value for result in results[name] for value in result[key])
    rows = []
    for name, case in found.items():
        seconds, size = middle(name, "seconds"), case["ranks"]
        # Weak: against one process with one rank's samples. Strong: against one process with the whole batch.
        yardstick = f"plain, batch {case['batch'] // size if case['kind'] == 'weak' else case['batch']}"
        ratio = middle(yardstick, "seconds") / seconds * (size if case["kind"] == "weak" else 1)  # in images/s
        student, score_net = results[name][0]["parameters"]
        pool = (NFE + 1) * -(-F_UPDATES * case["batch"] // NFE) * 3 * 32 * 32
        modelled = sent_per_cycle(
            student, score_net, pool, size, case["zero"], F_UPDATES, rollout_calls=NFE, reduction="all_reduce"
        )
        computing = middle(name, "computing") if results[name][0]["computing"] else None
        communicating = middle(name, "communicating") if size > 1 else 0.0
        rows.append(
            {
                "case": name,
                "ours": seconds,
                "published": None,
                "ratio": ratio,
                "counted_ratio": size,
                "unit": "s",
                "ranks": size,
                "batch": case["batch"],
                "zero": case["zero"] if case["engine"] == "deepspeed" else None,
                "ours_range": [
                    min(v for r in results[name] for v in r["seconds"]),
                    max(v for r in results[name] for v in r["seconds"]),
                ],
                "efficiency": ratio / size,
                "sent_bytes": middle(name, "sent"),
                "modelled_bytes": sum(modelled.values()) if size > 1 else 0.0,
                "computing": computing,
                "communicating": communicating,
                "in_collectives": middle(name, "in_collectives"),
                "overlapped": None
                if not communicating or computing is None
                else min(max(1 - (seconds - computing) / communicating, 0.0), 1.0),
                "cores": os.cpu_count(),
                **describe(torch.device("cpu")),
                "threads": 1,
            }
        )
    return rows


COLUMNS = {
    "case": lambda r: r["case"],
    "seconds a cycle (range)": lambda r: f"{r['ours']:.2f} ({r['ours_range'][0]:.2f} to {r['ours_range'][1]:.2f})",
    "images/s, times one process": lambda r: f"**{r['ratio']:.2f}**",
    "efficiency": lambda r: f"{r['efficiency']:.0%}",
    "computing, s": lambda r: "-" if r["computing"] is None else f"{r['computing']:.2f}",
    "collectives alone, s": lambda r: f"{r['communicating']:.2f}",
    "in collectives, s": lambda r: f"{r['in_collectives']:.2f}",
    "overlapped": lambda r: "-" if r["overlapped"] is None else f"{r['overlapped']:.0%}",
    "MB sent a rank": lambda r: f"{r['sent_bytes'] / 1e6:.1f}",
    "modelled": lambda r: f"{r['modelled_bytes'] / 1e6:.1f}",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=8, help="of a rank")
    parser.add_argument("--channels", type=int, default=32, help="of CIFAR-10's network; 128 is its own")
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # a process of a case, which this script starts itself
    arguments = parser.parse_args()
    if arguments.rank:
        torch.set_num_threads(1)
        print(json.dumps(measure_rank(json.loads(arguments.rank))))
        return 0
    found = cases(arguments.ranks, arguments.samples, arguments.channels, arguments.cycles)
    results = {name: [] for name in found}
    for _ in range(arguments.rounds):
        for name, case in found.items():
            results[name].append(run_case(case))
    rows = rows_of(found, results)
    if arguments.json:
        write_rows(arguments.json, rows)
    print_rows(rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
