"""A training cycle of ours against the published one: one update of the student and 20 of the score network.

Both sides have the same networks. CIFAR-10's at half width, batch 16, K = 10 takes about ten minutes on 2 cores:

    python -m bench.train_step
    python -m bench.train_step --width 128 --batch 128      at full width, for a GPU
    python -m bench.train_step --upstream PATH              against the published code itself, in a clone of yours
    python -m bench.train_step --full                       the compiled cases on a CPU too: Inductor takes minutes

Both sides are interleaved in one run. A cycle is put together from the medians of its parts. Before a case is timed,
one update of each kind is computed by both sides from the same states and noise, and must agree. The published side is
then without TF32, which it is timed with where torch has it by default: on a GPU, in convolutions. Counted:
floating-point operations of matrix products and convolutions (torch's own formulas).
"""

import copy
import functools
import statistics
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench.measure import (
    Row,
    counted_bytes,
    counted_calls,
    counted_flops,
    describe,
    joules_per_image,
    print_headline,
    print_rows,
    rates,
    run_cases,
    timed_rounds,
    use_full_float32,
    use_modes_of,
    use_torch_defaults,
    wait_for_turn,
    warmed_up,
)
from bench.options import add_cases, command_line
from bench.published import PublishedTraining, cycle_calls, cycle_work
from bench.tables import Column, peak_megabytes
from bench.upstream import UpstreamTraining
from hsivi_fast import ops
from hsivi_fast.build import build_context, choose_device, device_of, in_form_of
from hsivi_fast.config import config_from_dict
from hsivi_fast.execution import WARM_UP, Execution
from hsivi_fast.method.layers import attach_log_gamma
from hsivi_fast.method.schedule import make_schedule
from hsivi_fast.nets import build_unet
from hsivi_fast.parallel.world import ALONE
from hsivi_fast.training.engine import PlainEngine
from hsivi_fast.training.rollout import Batch, build_rollout, one_layer_on, roll_down
from hsivi_fast.training.updates import Updates

RATE = 1e-5  # of both networks; how fast they learn is not what is timed
ETA = 0.2
REDRAW = {"rollout": {"mode": "pooled", "redraw": 4}}
GRAPHS = {"precision": "bf16", "channels_last": True, "compile": True, "cuda_graphs": True}
CASES = {  # name -> what is ours in it
    "train_cycle_fp32": {"channels_last": True},
    "train_cycle_fp32_redraw4": {"channels_last": True, **REDRAW},
    "train_cycle_tf32": {"precision": "tf32", "channels_last": True},
    "train_cycle_bf16": {"precision": "bf16"},
    "train_cycle_bf16_redraw4": {"precision": "bf16", **REDRAW},
    "train_cycle_bf16_compiled": {"precision": "bf16", "compile": True},
    "train_cycle_bf16_graphs": GRAPHS,
    "train_cycle_bf16_graphs_redraw4": {**GRAPHS, **REDRAW},
}
EQUAL = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}  # relative error allowed between the sides' losses
CALLS = {"rollout": 1, "student": 2, "score_net": 4}  # of ours in a round: they are short
PUBLISHED_CALLS = {"student": 1, "score_net": 2}  # long, and they vary with the lowest layer drawn
COLUMNS = [
    Column("case", "{case}"),
    Column("ours s", "{ours:.2f}"),
    Column("quartiles", "{ours_quartiles[0]:.2f} to {ours_quartiles[1]:.2f}"),
    Column("published s", "{published:.2f}"),
    Column("quartiles", "{published_quartiles[0]:.2f} to {published_quartiles[1]:.2f}"),
    Column("ratio", "{ratio:.2f}"),
    Column("counted", "{counted_ratio:.2f}"),
    Column("calls", "{ours_network_calls:.0f} / {published_network_calls:.0f}"),
    Column("peak MB", peak_megabytes),
    Column("of a product's rate", "{utilisation:.0%}"),
    Column("of a copy's", "{share_of_copy:.0%}"),
    Column("preparing s", "{preparing_seconds:.0f}"),
]


def default_cases(device, full):
    """The cases that are timed where none is named: on a CPU, compilers take minutes; graphs and TF32 do not exist."""
    return [name for name in runnable(CASES, device) if full or device.type == "cuda" or not CASES[name].get("compile")]


def runnable(cases, device):
    """Those of {name: keys of the configuration} that a device can run: graphs and TF32 need a GPU."""
    if device.type == "cuda":
        return cases
    return {
        name: keys for name, keys in cases.items() if not keys.get("cuda_graphs") and keys.get("precision") != "tf32"
    }


def bench_config(network, nfe, **keys):
    """The configuration of our side: its teacher is a module that the benchmark makes."""
    return config_from_dict(
        {"network": network, "teacher": {"checkpoint": "random weights"}, "nfe": nfe, "eta": ETA, **keys}
    )


def small_teacher(network, device):
    """The network that both sides start from, with random weights.

    They are made smaller: a fresh network's predictions are as large as its input, and ten layers of that go far.
    """
    torch.manual_seed(0)
    teacher = build_unet(network).to(device).requires_grad_(False)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.9)
    return teacher


def three_networks(teacher):
    """Student and score network, trainable, and teacher, all copies of the teacher.

    The score network is a little off: where it is the teacher, the student's loss is zero.
    """
    student, score_net, frozen = (copy.deepcopy(teacher) for _ in range(3))
    with torch.no_grad():
        for parameter in score_net.parameters():
            parameter.mul_(1.05)
    return student.requires_grad_(True), score_net.requires_grad_(True), frozen


def published_training(teacher, nfe, upstream=None):
    """The published side on copies of the teacher: `bench.published`, or the code of the clone at `upstream`."""
    training = functools.partial(UpstreamTraining, upstream) if upstream else PublishedTraining
    schedule = make_schedule("linear", 1000, "quad", nfe)
    rates = [lambda step: RATE] * 2
    return training(*three_networks(teacher), schedule, ETA, per_step=False, per_pixel=True, rates=rates)


class OurTraining:
    """Our side of one case, on copies of the teacher and on its device.

    changes: what of the configuration is not its default; `warm_up`: how many calls compile and record it.
    """

    def __init__(self, case, changes, teacher, network, batch, nfe, f_learning_times):
        self.batch, self.f_learning_times = batch, f_learning_times
        train = {"batch_size": batch, "f_learning_times": f_learning_times}
        device = str(device_of(teacher))
        self.config = bench_config(network, nfe, name=case, device=device, train=train, **changes)
        context = build_context(self.config, ALONE)
        networks = three_networks(teacher)
        for each in networks:
            in_form_of(self.config, each)
        student, score_net, frozen = networks
        self.context = context.with_teacher(frozen)
        attach_log_gamma(student, context.layers).to(context.device)
        self.student = PlainEngine(student, 1.0, 0.999, context.execution)
        self.score_net = PlainEngine(score_net, 1.0, 0.999, context.execution)
        self.updates = Updates(self.context, self.student, self.score_net)
        self.rollout = build_rollout(self.context, student)
        self.cycle, self.warm_up = 0, WARM_UP + 1 if self.config.cuda_graphs else 1

    def check(self, published):
        """One update of each kind from the same states and noise: losses as equal as the precision allows.

        Raises AssertionError.
        """
        use_full_float32()
        k, x, noise = published.draw(self.batch)
        lowest = int(k.min())
        layers, device = self.context.layers, self.context.device
        rolled = torch.randn(layers.nfe - lowest, *x.shape, device=device)
        expected = [
            published.update_student(1, k, x, noise, rolled),
            published.update_score_net(1, k, x, noise, rolled),
        ]
        use_modes_of(self.context)
        student, log_gamma = self.student.predict, self.student.network.log_scaled_gamma

        def states():
            x_k = roll_down(student, layers, log_gamma, x, k, None, lowest, rolled)
            return Batch(x_k, ops.Noise(None, k, given=noise))

        # A pair of updates of its own: what `self.updates` records later has no noise given to it.
        execution = Execution(device, self.config.compile, self.config.cuda_graphs)
        updates = Updates(replace(self.context, execution=execution), self.student, self.score_net)
        student_losses, _ = updates.student(states(), RATE)
        score_net_losses, _ = updates.score_net(one_layer_on(student, layers, log_gamma, states()), RATE)
        got = [float(student_losses.mean()), float(score_net_losses.mean())]
        # The student's loss is a small difference of terms that are as large as the other loss.
        slack = 0.02 * abs(expected[1])
        for ours, theirs in zip(got, expected):
            allowed = EQUAL[self.config.precision] * (abs(theirs) + slack)
            assert abs(ours - theirs) <= allowed, f"losses differ: ours {got}, published {expected}"

    def parts(self):
        """{part: function of nothing}: what a cycle is made of."""

        def start_cycle():
            use_modes_of(self.context)
            self.cycle += 1
            self.rollout.start_cycle(self.cycle)

        def student_update():
            use_modes_of(self.context)
            self.updates.student(self.rollout.student_batch(self.cycle * self.f_learning_times), RATE)

        def score_net_update():
            use_modes_of(self.context)
            self.updates.score_net(self.rollout.score_net_batch(self.cycle * self.f_learning_times + 1), RATE)

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


def cycle_sum(values, f_learning_times):
    """A cycle from its parts, {part: value}."""
    return sum(value * (f_learning_times if part == "score_net" else 1) for part, value in values.items())


def counted_of_parts(count, parts, f_learning_times):
    """What `count(function)` counts of a cycle, from its parts."""
    return cycle_sum({part: count(function) for part, function in parts.items()}, f_learning_times)


def measure(case, network, batch, nfe, f_learning_times, rounds, facts, upstream=None):
    """The row of one case."""
    device = choose_device("auto")
    teacher = small_teacher(network, device)
    published = published_training(teacher, nfe, upstream)
    ours = OurTraining(case, CASES[case], teacher, network, batch, nfe, f_learning_times)
    try:
        ours.check(published)
    except AssertionError as error:
        return Row(case, failed=str(error), **facts)
    mine, theirs = ours.parts(), published_parts(published, batch)
    wait_for_turn(mine.values(), device)
    our_peak = warmed_up([*mine.values()], ours.warm_up, device)
    published_peak = warmed_up([*theirs.values()], 1, device)
    sides = {("ours", part): (function, CALLS[part]) for part, function in mine.items()}
    sides |= {("published", part): (function, PUBLISHED_CALLS[part]) for part, function in theirs.items()}
    seconds = timed_rounds(sides, device, rounds)

    def cycle(side, value):
        parts = {part: value(values) for (of, part), values in seconds.items() if of == side}
        return cycle_sum(parts, f_learning_times)

    median = {side: cycle(side, statistics.median) for side in ("ours", "published")}
    # What is compiled or recorded does the same products and convolutions as its eager twin, which can be counted.
    eager = ours
    if ours.context.execution.fixed_shapes:
        changes = {**CASES[case], "compile": False, "cuda_graphs": False}
        eager = OurTraining(case, changes, teacher, network, batch, nfe, f_learning_times)
    # Published work depends on the lowest layer drawn. Its expectation is known, in forwards, and is checked against
    # counts in tests/bench/test_published.py.
    state = torch.zeros(batch, *teacher.event_shape, device=device)
    forward = counted_flops(lambda: teacher(state, ours.context.layers.tau[:1].expand(batch)))
    published_work = cycle_work(nfe, batch, f_learning_times) * forward
    our_work = counted_of_parts(counted_flops, eager.parts(), f_learning_times)
    our_calls = counted_of_parts(counted_calls, eager.parts(), f_learning_times)
    our_bytes = counted_of_parts(counted_bytes, eager.parts(), f_learning_times)
    extras = {
        "ours_quartiles": [cycle("ours", lower_quartile), cycle("ours", upper_quartile)],
        "published_quartiles": [cycle("published", lower_quartile), cycle("published", upper_quartile)],
        "ours_flops": our_work,
        "published_flops": published_work,
        "ours_network_calls": our_calls,
        "published_network_calls": cycle_calls(nfe, batch, f_learning_times),
        "ours_peak_bytes": our_peak,
        "published_peak_bytes": published_peak,
        "joules_per_image": joules_per_image(mine["score_net"], device, batch),
        **rates(our_work, our_bytes, median["ours"], ours.context),
        "ours_images_per_second": batch * f_learning_times / median["ours"],
        "parts": {f"{side} {part}": statistics.median(values) for (side, part), values in seconds.items()},
        "preparing_seconds": ours.context.execution.seconds,
        "baseline": "a clone of the published code" if upstream else "bench/published.py",
        "batch": batch,
        "nfe": nfe,
        "f_learning_times": f_learning_times,
        "network": network,
        "backend": ours.context.backend,
    }
    return Row(
        case,
        ours=median["ours"],
        published=median["published"],
        ratio=median["published"] / median["ours"],
        unit="s a cycle",
        counted_ratio=published_work / our_work,
        extras=extras,
        **facts,
    )


def lower_quartile(values):
    """The value below which a quarter lies; of one value, itself."""
    return statistics.quantiles(values, n=4)[0] if len(values) > 1 else values[0]


def upper_quartile(values):
    """The value above which a quarter lies; of one value, itself."""
    return statistics.quantiles(values, n=4)[2] if len(values) > 1 else values[0]


def main(given=None):
    defaults = {"network": "cifar10", "width": 64, "batch": 16, "nfe": 10, "f_learning_times": 20, "rounds": 4}
    parser = command_line(__doc__, **defaults, upstream=None, json=None)
    add_cases(parser, CASES, "those that fit the device")
    parser.add_argument("--full", action="store_true", help="on a CPU, the compiled cases too")
    arguments = parser.parse_args(given)
    device = choose_device("auto")
    facts = describe(device)
    measure_case = functools.partial(
        measure,
        network={"name": arguments.network, "channels": arguments.width},
        batch=arguments.batch,
        nfe=arguments.nfe,
        f_learning_times=arguments.f_learning_times,
        rounds=arguments.rounds,
        facts=facts,
        upstream=arguments.upstream,
    )
    cases, advice = arguments.case or default_cases(device, arguments.full), f"--batch {arguments.batch}; use a smaller"
    try:
        rows = run_cases(cases, measure_case, arguments.json, facts, advice)
    except ValueError as error:  # a clone that is none, a device that cannot do what a case needs
        parser.error(str(error))
    cycle = f"K = {arguments.nfe}, {arguments.f_learning_times} score-network updates a cycle"
    network = f"{arguments.network}, {arguments.width} channels"
    print(f"{network}, batch {arguments.batch}, {cycle}, on {facts['device']}")
    code = print_rows(rows, COLUMNS)
    print_headline(rows, device)
    return code


if __name__ == "__main__":
    sys.exit(main())
