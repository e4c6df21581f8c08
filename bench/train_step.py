"""A training cycle of ours against the published one: one update of the student and 20 of the score network, on the same networks.

    python -m bench.train_step                              CIFAR-10's network at half width, batch 16, K = 10: about ten minutes on 2 cores
    python -m bench.train_step --width 128 --batch 128      at full width, for a GPU
    python -m bench.train_step --upstream PATH              against the published code itself, in a clone of yours
    python -m bench.train_step --full                       the compiled cases on a CPU too, where Inductor takes minutes

Both sides are interleaved in one run; a cycle is put together from the medians of its parts. Before a case is timed, one update of each kind is computed by both sides
from the same states and noise, and must agree. Counted: floating-point operations of matrix products and convolutions (torch's own formulas).
"""

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch

from hsivi_fast.build import build_execution, build_layers, in_form_of, prepare_device
from hsivi_fast.config import config_from_dict
from hsivi_fast.method.layers import attach_log_gamma
from hsivi_fast.method.schedule import make_schedule
from hsivi_fast.nets import build_unet
from hsivi_fast.training.engine import PlainEngine
from hsivi_fast.training.rollout import Batch, build_rollout, one_layer_on, roll_down
from hsivi_fast.training.trainer import Updates

from .measure import (
    counted_calls,
    counted_flops,
    describe,
    joules_per_image,
    peak_bytes,
    print_rows,
    product_rate,
    run_cases,
    span,
    timed_rounds,
    use_torch_defaults,
)
from .published import PublishedTraining, cycle_calls, cycle_work
from .upstream import UpstreamTraining

RATE = 1e-5  # of both networks; how fast they learn is not what is timed
REDRAW = {"rollout": {"mode": "pooled", "redraw": 4}}
GRAPHS = {"precision": "bf16", "channels_last": True, "compile": True, "cuda_graphs": True}
CASES = {  # name -> what is ours in it
    "train_cycle_fp32": {"channels_last": True},
    "train_cycle_fp32_redraw4": {"channels_last": True, **REDRAW},
    "train_cycle_bf16": {"precision": "bf16"},
    "train_cycle_bf16_redraw4": {"precision": "bf16", **REDRAW},
    "train_cycle_bf16_compiled": {"precision": "bf16", "compile": True},
    "train_cycle_bf16_graphs": GRAPHS,
    "train_cycle_bf16_graphs_redraw4": {**GRAPHS, **REDRAW},
}
EQUAL = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}  # relative error allowed between the sides' losses
CALLS = {"rollout": 1, "student": 2, "score_net": 4}  # of ours in a round: they are short
PUBLISHED_CALLS = {"student": 1, "score_net": 2}  # long, and they vary with the lowest layer drawn


def default_cases(device, full):
    """The cases that are timed where none is named: on a CPU, compilers take minutes and graphs do not exist."""
    return [
        name
        for name, changes in CASES.items()
        if device.type == "cuda" or not changes.get("cuda_graphs") and (full or not changes.get("compile"))
    ]


def small_teacher(network, device):
    """The network that both sides start from, with random weights: a fresh network's predictions are as large as its input, and ten layers of that go far."""
    torch.manual_seed(0)
    teacher = build_unet(network).to(device).requires_grad_(False)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.9)
    return teacher


def three_networks(teacher):
    """Student and score network, trainable, and teacher, all copies of the teacher; the score network a little off, since where it is the teacher the student's loss is zero."""
    networks = [copy.deepcopy(teacher) for _ in range(3)]
    with torch.no_grad():
        for parameter in networks[1].parameters():
            parameter.mul_(1.05)
    return [networks[0].requires_grad_(True), networks[1].requires_grad_(True), networks[2]]


def published_training(teacher, nfe, upstream=None):
    """The published side on copies of the teacher: `bench.published`, or the code of the clone at `upstream`."""
    arguments = (
        *three_networks(teacher),
        make_schedule("linear", 1000, "quad", nfe),
        0.2,
        False,
        True,
        [lambda step: RATE] * 2,
    )
    return UpstreamTraining(upstream, *arguments) if upstream else PublishedTraining(*arguments)


class OurTraining:
    """Our side of one case, on copies of the teacher. `changes`: what of the configuration is not its default."""

    def __init__(self, case, changes, teacher, network, batch, nfe, f_updates):
        self.batch, self.f_updates = batch, f_updates
        self.config = config_from_dict(
            {
                "network": network,
                "teacher": {"checkpoint": "random weights"},
                "nfe": nfe,
                "eta": 0.2,
                "name": case,
                "train": {"batch_size": batch, "f_learning_times": f_updates},
                **changes,
            }
        )
        self.device, self.backend = prepare_device(self.config)
        self.layer, self.execution = build_layers(self.config, self.device), build_execution(self.config, self.device)
        student, score_net, frozen = networks = three_networks(teacher)
        for each in networks:
            in_form_of(self.config, each)
        attach_log_gamma(student, self.layer).to(self.device)
        self.student, self.score_net = (PlainEngine(each, 1.0, 0.999, self.execution) for each in (student, score_net))
        self.updates = Updates(self.student, self.score_net, frozen, self.layer, self.execution)
        self.rollout = build_rollout(self.config, self.layer, student, self.execution)
        self.cycle = 0

    def check(self, published):
        """One update of each kind from the same states and noise: losses as equal as the precision allows. Raises AssertionError."""
        use_torch_defaults()
        k, x, noise = published.draw(self.batch)
        lowest = int(k.min())
        rolled = torch.randn(self.layer.nfe - lowest, *x.shape, device=self.device)
        expected = [
            published.update_student(1, k, x, noise, rolled),
            published.update_score_net(1, k, x, noise, rolled),
        ]
        prepare_device(self.config)
        student, log_gamma = self.student.predict, self.student.network.log_scaled_gamma
        states = lambda: Batch(
            roll_down(student, self.layer, log_gamma, x, k, None, lowest, rolled), k, None, noise=noise
        )
        # A pair of updates of its own: what `self.updates` records later has no noise given to it.
        updates = Updates(
            self.student, self.score_net, self.updates.teacher, self.layer, build_execution(self.config, self.device)
        )
        got = [
            float(updates.student(states(), RATE)[0].mean()),
            float(updates.score_net(one_layer_on(student, self.layer, log_gamma, states()), RATE)[0].mean()),
        ]
        allowed = EQUAL[self.config.precision]
        for ours, theirs in zip(
            got, expected
        ):  # the student's loss is a small difference of terms that are as large as the other loss
            assert abs(ours - theirs) <= allowed * (abs(theirs) + 0.02 * abs(expected[1])), (
                f"losses differ: ours {got}, published {expected}"
            )

    def parts(self):
        """{part: function of nothing}: what a cycle is made of."""

        def start_cycle():
            prepare_device(self.config)
            self.cycle += 1
            self.rollout.start_cycle(self.cycle)

        def student_update():
            prepare_device(self.config)
            self.updates.student(self.rollout.student_batch(self.cycle * self.f_updates), RATE)

        def score_net_update():
            prepare_device(self.config)
            self.updates.score_net(self.rollout.score_net_batch(self.cycle * self.f_updates + 1), RATE)

        start_cycle()
        return {"rollout": start_cycle, "student": student_update, "score_net": score_net_update}


def published_parts(published, batch):
    """The same of the published side."""

    def part(update):
        def run():
            use_torch_defaults()
            update(1, *published.draw(batch))

        return run

    return {"student": part(published.update_student), "score_net": part(published.update_score_net)}


def cycle_sum(values, f_updates):
    """A cycle from its parts, {part: value}."""
    return sum(value * (f_updates if part == "score_net" else 1) for part, value in values.items())


def measure(case, network, batch, nfe, f_updates, rounds, facts, upstream=None):
    """The row of one case."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = small_teacher(network, device)
    published, ours = (
        published_training(teacher, nfe, upstream),
        OurTraining(case, CASES[case], teacher, network, batch, nfe, f_updates),
    )
    try:
        ours.check(published)
    except AssertionError as error:
        return {"case": case, "failed": str(error), **facts}
    mine, theirs = ours.parts(), published_parts(published, batch)
    for function in [*mine.values(), *theirs.values()] * (
        4 if ours.config.cuda_graphs else 1
    ):  # warm up: compile, record
        function()
    sides = {
        **{("ours", part): (function, CALLS[part]) for part, function in mine.items()},
        **{("published", part): (function, PUBLISHED_CALLS[part]) for part, function in theirs.items()},
    }
    seconds = timed_rounds(sides, device, rounds)
    cycle = lambda side, value: cycle_sum(
        {part: value(values) for (of, part), values in seconds.items() if of == side}, f_updates
    )
    median = {side: cycle(side, statistics.median) for side in ("ours", "published")}
    quartiles = {
        side: [cycle(side, lambda values: statistics.quantiles(values, n=4)[index]) for index in (0, 2)]
        for side in median
    }
    # Published work depends on the lowest layer drawn; its expectation is known, in forwards (checked against counts in tests/test_published.py). What is
    # compiled or recorded does the same products and convolutions as its eager twin, on which they can be counted.
    eager = (
        ours
        if not ours.execution.fixed_shapes
        else OurTraining(
            case, {**CASES[case], "compile": False, "cuda_graphs": False}, teacher, network, batch, nfe, f_updates
        )
    )
    state = torch.zeros(batch, *teacher.event_shape, device=device)
    forward = counted_flops(lambda: teacher(state, ours.layer.tau[:1].expand(batch)))
    counted = {
        count: cycle_sum({part: count(function) for part, function in eager.parts().items()}, f_updates)
        for count in (counted_flops, counted_calls)
    }
    work = {"published": cycle_work(nfe, batch, f_updates) * forward, "ours": counted[counted_flops]}
    peaks = {
        side: max(peak_bytes(function, device) for function in parts.values())
        for side, parts in (("ours", mine), ("published", theirs))
    }
    rate = product_rate(device, torch.bfloat16 if ours.config.precision == "bf16" else torch.float32)
    return {
        "case": case,
        "ours": median["ours"],
        "published": median["published"],
        "ratio": median["published"] / median["ours"],
        "unit": "s a cycle",
        "counted_ratio": work["published"] / work["ours"],
        "ours_quartiles": quartiles["ours"],
        "published_quartiles": quartiles["published"],
        "ours_flops": work["ours"],
        "published_flops": work["published"],
        "ours_network_calls": counted[counted_calls],
        "published_network_calls": cycle_calls(nfe, batch, f_updates),
        "ours_peak_bytes": peaks["ours"],
        "published_peak_bytes": peaks["published"],
        "joules_per_image": joules_per_image(mine["score_net"], device, batch),
        "product_flops_per_second": rate,
        "utilisation": work["ours"] / median["ours"] / rate,
        "ours_images_per_second": batch * f_updates / median["ours"],
        "parts": {f"{side} {part}": statistics.median(values) for (side, part), values in seconds.items()},
        "preparing_seconds": ours.execution.seconds,
        "baseline": "a clone of the published code" if upstream else "bench/published.py",
        "batch": batch,
        "nfe": nfe,
        "f_learning_times": f_updates,
        "network": network,
        "backend": ours.backend,
        **facts,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case", action="append", choices=CASES, help="one case; may be repeated; those that fit the device by default"
    )
    parser.add_argument("--full", action="store_true", help="on a CPU, the compiled cases too")
    parser.add_argument("--width", type=int, default=64, help="base channels of CIFAR-10's network; 128 is full width")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--nfe", type=int, default=10)
    parser.add_argument("--f-learning-times", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--upstream", type=Path, help="a clone of github.com/longinYu/HSIVI to be timed instead of bench/published.py"
    )
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    arguments = parser.parse_args()
    network = {"name": "cifar10", "channels": arguments.width}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = describe(device)
    try:
        rows = run_cases(
            arguments.case or default_cases(device, arguments.full),
            lambda case: measure(
                case,
                network,
                arguments.batch,
                arguments.nfe,
                arguments.f_learning_times,
                arguments.rounds,
                facts,
                arguments.upstream,
            ),
            arguments.json,
        )
    except ValueError as error:  # a clone that is none, a device that cannot do what a case needs
        parser.error(str(error))
    print(
        f"{network['name']}, {arguments.width} channels, batch {arguments.batch}, K = {arguments.nfe}, {arguments.f_learning_times} score-network updates a cycle, on {facts['device']}"
    )
    return print_rows(
        rows,
        {
            "case": lambda r: r["case"],
            "ours s": lambda r: f"{r['ours']:.2f}",
            "quartiles": lambda r: span(r["ours_quartiles"]),
            "published s": lambda r: f"{r['published']:.2f}",
            "quartiles ": lambda r: span(r["published_quartiles"]),
            "ratio": lambda r: f"{r['ratio']:.2f}",
            "counted": lambda r: f"{r['counted_ratio']:.2f}",
            "calls": lambda r: f"{r['ours_network_calls']:.0f} / {r['published_network_calls']:.0f}",
            "peak MB": lambda r: f"{r['ours_peak_bytes'] / 1e6:.0f} / {r['published_peak_bytes'] / 1e6:.0f}",
            "of a product's rate": lambda r: f"{r['utilisation']:.0%}",
            "preparing s": lambda r: f"{r['preparing_seconds']:.0f}",
        },
    )


if __name__ == "__main__":
    sys.exit(main())
