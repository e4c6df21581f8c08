"""A training cycle of ours against the published one: one update of the student and 20 of the score network, on the same networks.

    python -m bench.train_step                              CIFAR-10's network at half width, batch 16, K = 10: about ten minutes on 2 cores
    python -m bench.train_step --width 128 --batch 128      at full width, for a GPU

Both sides are interleaved in one run; a cycle is put together from the medians of its parts. Before a case is timed, one update of each kind is computed by both sides
from the same states and noise, and must agree. Counted: floating-point operations of matrix products and convolutions (torch's own formulas).
"""

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch

from hsivi_fast.config import config_from_dict
from hsivi_fast.engine import PlainEngine
from hsivi_fast.method.layer import attach_log_gamma
from hsivi_fast.method.schedule import make_schedule
from hsivi_fast.models import build_layer, prepare_device
from hsivi_fast.nets import build_unet
from hsivi_fast.rollout import Batch, build_rollout, one_layer_on, roll_down
from hsivi_fast.trainer import update_score_net, update_student

from .measure import counted_flops, describe, print_rows, run_cases, span, synchronized_seconds, use_torch_defaults
from .published import PublishedTraining, cycle_work

RATE = 1e-5  # of both networks; how fast they learn is not what is timed
CASES = {  # name -> what is ours in it
    "train_cycle_fp32": {},
    "train_cycle_fp32_redraw4": {"rollout": {"mode": "pooled", "redraw": 4}},
    "train_cycle_bf16": {"precision": "bf16"},
    "train_cycle_bf16_redraw4": {"precision": "bf16", "rollout": {"mode": "pooled", "redraw": 4}},
}
EQUAL = {"fp32": 1e-4, "bf16": 5e-2}  # relative error allowed between the sides' losses


class Sides:
    """Both trainings of one case, from the same weights."""

    def __init__(self, case, network, batch, nfe, f_updates):
        self.batch, self.f_updates = batch, f_updates
        self.config = config_from_dict({
            "network": network, "teacher": {"checkpoint": "random weights"}, "nfe": nfe, "eta": 0.2, "name": case,
            "train": {"batch_size": batch, "f_learning_times": f_updates}, **CASES[case]})
        self.device, self.backend = prepare_device(self.config)
        torch.manual_seed(0)
        teacher = build_unet(network).to(self.device).requires_grad_(False)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.mul_(0.9)  # a fresh network's predictions are as large as its input, and ten layers of that go far
        copies = [copy.deepcopy(teacher).requires_grad_(True) for _ in range(2)]
        self.published = PublishedTraining(*copies, teacher, make_schedule("linear", 1000, "quad", nfe), 0.2, False, True, [lambda step: RATE] * 2)
        self.layer = build_layer(self.config, self.device)
        ours = [copy.deepcopy(teacher) for _ in range(3)]
        for each in ours:
            each.precision = self.config.precision
        self.teacher = ours[2].requires_grad_(False)
        self.student = PlainEngine(attach_log_gamma(ours[0].requires_grad_(True), self.layer).to(self.device), 1.0, 0.999)
        self.score_net = PlainEngine(ours[1].requires_grad_(True), 1.0, 0.999)
        self.rollout = build_rollout(self.config, self.layer, teacher.event_shape)
        self.cycle = 0

    def check(self):
        """One update of each kind from the same states and noise: losses as equal as the precision allows. Raises AssertionError."""
        use_torch_defaults()
        k, x, noise = self.published.draw(self.batch)
        rolled = torch.randn(self.layer.nfe - int(k.min()), *x.shape, device=self.device)
        expected = [self.published.update_student(1, k, x, noise, rolled), self.published.update_score_net(1, k, x, noise, rolled)]
        prepare_device(self.config)
        roll = lambda: Batch(roll_down(self.student.network, self.layer, x, k, None, rolled), k, None, noise=noise)
        got = [float(update_student(self.student, self.score_net, self.teacher, self.layer, roll(), RATE)[0].mean())]
        got.append(float(update_score_net(self.score_net, self.layer, self.student.network.log_scaled_gamma, one_layer_on(self.student.network, self.layer, roll()), RATE)[0].mean()))
        for ours, published in zip(got, expected):
            assert abs(ours - published) <= EQUAL[self.config.precision] * abs(published), f"losses differ: ours {got}, published {expected}"

    def parts(self):
        """{(side, part): function of nothing}: what a cycle is made of."""
        def published(function):
            def run():
                use_torch_defaults()
                function(1, *self.published.draw(self.batch))
            return run

        def start_cycle():
            prepare_device(self.config)
            self.cycle += 1
            self.rollout.start_cycle(self.student.network, self.cycle)

        def student_update():
            prepare_device(self.config)
            update_student(self.student, self.score_net, self.teacher, self.layer, self.rollout.student_batch(self.student.network, self.cycle * self.f_updates), RATE)

        def score_net_update():
            prepare_device(self.config)
            batch = self.rollout.score_net_batch(self.student.network, self.cycle * self.f_updates + 1)
            update_score_net(self.score_net, self.layer, self.student.network.log_scaled_gamma, batch, RATE)

        return {("published", "student"): published(self.published.update_student), ("published", "score_net"): published(self.published.update_score_net),
                ("ours", "rollout"): start_cycle, ("ours", "student"): student_update, ("ours", "score_net"): score_net_update}


def measure(case, network, batch, nfe, f_updates, rounds, facts):
    """The row of one case."""
    sides = Sides(case, network, batch, nfe, f_updates)
    try:
        sides.check()
    except AssertionError as error:
        return {"case": case, "failed": str(error), **facts}
    parts = sides.parts()
    parts["ours", "rollout"]()
    flops = {key: counted_flops(function) for key, function in parts.items()}  # this warms both sides up
    # A published update is long and varies with the lowest layer drawn; ours is short. So many of each in a round.
    repeats = {("published", "student"): 1, ("published", "score_net"): 2, ("ours", "rollout"): 1, ("ours", "student"): 2, ("ours", "score_net"): 4}
    seconds = {key: [] for key in parts}
    if sides.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(sides.device)
    for _ in range(rounds):
        for key, function in parts.items():
            for _ in range(repeats[key]):
                seconds[key].append(synchronized_seconds(function, sides.device))
    cycle = lambda values, side: sum(values(key) * (f_updates if key[1] == "score_net" else 1) for key in parts if key[0] == side)
    median = lambda side: cycle(lambda key: statistics.median(seconds[key]), side)
    quartile = lambda side, index: cycle(lambda key: statistics.quantiles(seconds[key], n=4)[index], side)
    # Published work depends on the lowest layer drawn; its expectation is known, in forwards (checked against counts in tests/test_published.py).
    state = torch.zeros(batch, *sides.teacher.event_shape, device=sides.device)
    forward = counted_flops(lambda: sides.teacher(state, sides.layer.tau[:1].expand(batch)))
    work = {"published": cycle_work(nfe, batch, f_updates) * forward, "ours": cycle(flops.get, "ours")}
    row = {"case": case, "ours": median("ours"), "published": median("published"), "ratio": median("published") / median("ours"), "unit": "s a cycle",
           "counted_ratio": work["published"] / work["ours"], "ours_quartiles": [quartile("ours", 0), quartile("ours", 2)],
           "published_quartiles": [quartile("published", 0), quartile("published", 2)], "ours_flops": work["ours"], "published_flops": work["published"],
           "ours_images_per_second": batch * f_updates / median("ours"), "parts": {f"{side} {part}": statistics.median(values) for (side, part), values in seconds.items()},
           "batch": batch, "nfe": nfe, "f_learning_times": f_updates, "network": network, "backend": sides.backend, **facts}
    if sides.device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated(sides.device)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=CASES, help="one case; may be repeated; all by default")
    parser.add_argument("--width", type=int, default=64, help="base channels of CIFAR-10's network; 128 is full width")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--nfe", type=int, default=10)
    parser.add_argument("--f-learning-times", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    arguments = parser.parse_args()
    network = {"name": "cifar10", "channels": arguments.width}
    facts = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows = run_cases(arguments.case or CASES,
                     lambda case: measure(case, network, arguments.batch, arguments.nfe, arguments.f_learning_times, arguments.rounds, facts), arguments.json)
    print(f"{network['name']}, {arguments.width} channels, batch {arguments.batch}, K = {arguments.nfe}, {arguments.f_learning_times} score-network updates a cycle, on {facts['device']}")
    return print_rows(rows, {"case": lambda r: r["case"], "ours s": lambda r: f"{r['ours']:.2f}", "quartiles": lambda r: span(r["ours_quartiles"]), "published s": lambda r: f"{r['published']:.2f}",
                       "quartiles ": lambda r: span(r["published_quartiles"]), "ratio": lambda r: f"{r['ratio']:.2f}", "counted": lambda r: f"{r['counted_ratio']:.2f}"})


if __name__ == "__main__":
    sys.exit(main())
