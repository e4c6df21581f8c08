"""What each technique is worth by itself: one row a technique, against the same thing without it.

Rows that lost stay in the table. Single frozen calls, training and sampling of CIFAR-10's network at quarter width take
13 to 23 minutes on 2 cores:

    python -m bench.ablation
    python -m bench.ablation --width 128    at full width, for a GPU

Each must agree with the published side before it is timed, in turn with that side and with what it is added to. Every
row is written as it is done.
"""

import contextlib
import functools
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch.nn import functional as F

from bench.measure import (
    Row,
    counted_bytes,
    counted_flops,
    describe,
    print_rows,
    rates,
    row_of,
    timed_rounds,
    use_full_float32,
    use_torch_defaults,
    write_rows,
)
from bench.options import command_line
from bench.published import cycle_work, published_sample
from bench.sampling import EQUAL, OurSampling, noise_of_seeds
from bench.tables import Column
from bench.train_step import (
    CALLS,
    PUBLISHED_CALLS,
    OurTraining,
    counted_of_parts,
    cycle_sum,
    published_parts,
    published_training,
    small_teacher,
)
from hsivi_fast.build import Context, choose_device
from hsivi_fast.nets import blocks, ddpm, prepared

BF16, LAST, COMPILE = {"precision": "bf16"}, {"channels_last": True}, {"compile": True}
GRAPHS, FUSED = {"cuda_graphs": True}, {"backend": "triton"}
# technique -> (what it is added to, the configuration then). Where backend is not named it is torch's.
TRAINING = {
    "two-stage gradient, fresh rollout": ("published", {"rollout": {"mode": "fresh"}}),
    "pooled": ("two-stage gradient, fresh rollout", {}),
    "redraw 4": ("pooled", {"rollout": {"redraw": 4}}),
    "bf16": ("pooled", BF16),
    "channels_last": ("pooled", LAST),
    "channels_last in bf16": ("bf16", {**BF16, **LAST}),
    "compile in bf16": ("bf16", {**BF16, **COMPILE}),
    "fused kernels": ("pooled", FUSED),
    "fused kernels in bf16": ("bf16", {**BF16, **FUSED}),
    "fused kernels, compiled in bf16": ("compile in bf16", {**BF16, **COMPILE, **FUSED}),
    "graphs": ("pooled", GRAPHS),
    "graphs, compiled in bf16": ("compile in bf16", {**BF16, **COMPILE, **GRAPHS}),
    "graphs, fused kernels, compiled in bf16": (
        "graphs, compiled in bf16",
        {**BF16, **COMPILE, **GRAPHS, **FUSED},
    ),
}
SAMPLING = {
    "eager fp32": ("published", {}),
    "channels_last": ("eager fp32", LAST),
    "bf16": ("eager fp32", BF16),
    "channels_last in bf16": ("bf16", {**BF16, **LAST}),
    "compile in bf16": ("bf16", {**BF16, **COMPILE}),
    "compile in bf16, channels_last": ("channels_last in bf16", {**BF16, **LAST, **COMPILE}),
    "fused kernels in bf16": ("bf16", {**BF16, **FUSED}),
    "graphs": ("eager fp32", GRAPHS),
    "graphs, compiled in bf16, channels_last": (
        "compile in bf16, channels_last",
        {**BF16, **LAST, **COMPILE, **GRAPHS},
    ),
    "graphs, fused kernels, compiled in bf16, channels_last": (
        "graphs, compiled in bf16, channels_last",
        {**BF16, **LAST, **COMPILE, **GRAPHS, **FUSED},
    ),
}
# One call of the network by itself: technique -> (what it is added to, its precision and what of `SWITCHES` is on). On
# a GPU all of them have the kernels.
IN_CALLS = ("attention", "bias", "weights", "upsampling", "biases", "table", "sums")
CALL = {
    "attention by pixels": ("published", {"precision": "fp32", "techniques": IN_CALLS[:1]}),
    "bias left to the norm": ("attention by pixels", {"precision": "fp32", "techniques": IN_CALLS[:2]}),
    "upsampling folded": ("bias left to the norm", {"precision": "fp32", "techniques": IN_CALLS[:4]}),
    "biases in one": ("upsampling folded", {"precision": "fp32", "techniques": IN_CALLS[:5]}),
    "time table": ("biases in one", {"precision": "fp32", "techniques": IN_CALLS[:6]}),
    "sums left to the norm": ("time table", {"precision": "fp32", "techniques": IN_CALLS, **FUSED}),
    "bf16 by autocast": ("published", {**BF16, "techniques": ()}),
    "attention by pixels, bf16": ("bf16 by autocast", {**BF16, "techniques": IN_CALLS[:1]}),
    "bias left to the norm, bf16": ("attention by pixels, bf16", {**BF16, "techniques": IN_CALLS[:2]}),
    "weights ready, bf16": ("bias left to the norm, bf16", {**BF16, "techniques": IN_CALLS[:3]}),
    "upsampling folded, bf16": ("weights ready, bf16", {**BF16, "techniques": IN_CALLS[:4]}),
    "biases in one, bf16": ("upsampling folded, bf16", {**BF16, "techniques": IN_CALLS[:5]}),
    "time table, bf16": ("biases in one, bf16", {**BF16, "techniques": IN_CALLS[:6]}),
    "sums left to the norm, bf16": ("time table, bf16", {**BF16, "techniques": IN_CALLS, **FUSED}),
}
CALL_ROUNDS = 5  # of a call to one of a cycle: it takes a moment, and what it gains is little
COLUMNS = [
    Column("case", "{case}"),
    Column("s", "{ours:.2f}"),
    Column("against", "{against}", needs="against"),
    Column("x against", "{ratio_against:.2f}", needs="ratio_against"),
    Column("x published", "{ratio:.2f}"),
    Column("counted", "{counted_ratio:.2f}", needs="counted_ratio"),
    Column("preparing s", "{preparing_seconds:.0f}"),
]


def runnable(techniques, device):
    """Those that the device can run; kernels and graphs need a GPU."""
    if device.type == "cuda":
        return techniques
    return {
        name: (against, changes)
        for name, (against, changes) in techniques.items()
        if not changes.get("cuda_graphs") and changes.get("backend") != "triton"
    }


@dataclass(frozen=True)
class Side:
    """What is timed: a technique, or the published side.

    parts: {part: (function of nothing, calls a round)}; flops, moved: operations and bytes of all of it, None where
    they are not known; preparing: seconds of compiling and recording; context: of ours.
    """

    parts: dict
    flops: float | None
    moved: float | None = None
    preparing: float = 0.0
    context: Context | None = None


class TrainingStudy:
    """A training cycle with each technique."""

    what, unit, techniques = "training", "s a cycle", TRAINING

    def __init__(self, network, batch, nfe, f_learning_times, device):
        self.network, self.batch, self.nfe, self.f_learning_times = network, batch, nfe, f_learning_times
        self.teacher = small_teacher(network, device)
        published = published_training(self.teacher, nfe)
        state = torch.zeros(batch, *self.teacher.event_shape, device=device)
        forward = counted_flops(lambda: self.teacher(state, published.tau[:1].expand(batch)))
        functions = published_parts(published, batch)
        parts = {part: (function, PUBLISHED_CALLS[part]) for part, function in functions.items()}
        self.published = Side(parts, cycle_work(nfe, batch, f_learning_times) * forward)

    def prepare(self, name, changes):
        """The side of a technique, compiled and recorded; AssertionError where it is not equal to the published."""
        size = self.network, self.batch, self.nfe, self.f_learning_times
        ours = OurTraining(name, {"backend": "torch", **changes}, self.teacher, *size)
        ours.check(published_training(self.teacher, self.nfe))  # a new one: a check trains both sides
        functions, flops, moved = ours.parts(), None, None
        for _ in range(ours.warm_up):
            for function in functions.values():
                function()
        fresh = changes.get("rollout", {}).get("mode") == "fresh"
        if fresh:
            del functions["rollout"]  # it is within its updates, down to the lowest layer drawn
        if not ours.context.execution.fixed_shapes:
            moved = counted_of_parts(counted_bytes, functions, self.f_learning_times)
            counted = counted_of_parts(counted_flops, functions, self.f_learning_times)
            flops = self.published.flops if fresh else counted
        parts = {part: (function, CALLS[part]) for part, function in functions.items()}
        return Side(parts, flops, moved, ours.context.execution.seconds, ours.context)

    def seconds(self, of_parts):
        """Seconds of a cycle from those of its parts."""
        return cycle_sum(of_parts, self.f_learning_times)


class SamplingStudy:
    """Sampling with each technique."""

    what, unit, techniques = "sampling", "s", SAMPLING

    def __init__(self, network, images, nfe, device):
        self.network, self.images, self.nfe, self.device = network, images, nfe, device
        teacher = small_teacher(network, device)
        published = published_training(teacher, nfe)
        noise = noise_of_seeds(images, nfe, teacher.event_shape, device)
        use_full_float32()
        self.expected = published_sample(published, images, *noise)

        def draw():
            use_torch_defaults()
            published_sample(published, images)

        self.published = Side({"all": (draw, 1)}, counted_flops(draw))

    def prepare(self, name, changes):
        """The side of a technique, compiled and recorded; AssertionError where its images are not the published."""
        ours = OurSampling(self.network, self.nfe, self.device, **{"backend": "torch", **changes})
        draw = functools.partial(ours.draw, self.images, self.images)
        for _ in range(ours.warm_up):
            draw()
        difference, equal = ours.check(self.images, self.images, self.expected)
        assert equal, f"images differ by {difference:.2e} of the largest value"
        flops = moved = None
        if not ours.context.execution.fixed_shapes:
            flops, moved = counted_flops(draw), counted_bytes(draw)
        return Side({"all": (draw, 1)}, flops, moved, ours.context.execution.seconds, ours.context)

    def seconds(self, of_parts):
        """Seconds of all images."""
        return of_parts["all"]


def _attend_as_it_lies(qkv):
    """`pixel_attention` of q, k and v whose numbers may lie apart."""
    return F.scaled_dot_product_attention(*qkv.transpose(3, 4)).transpose(2, 3)


def _with_bias(conv, x, add=None):
    """`BeforeNorm.forward` where the convolution adds its bias itself."""
    return conv.convolved(x, conv.bias), add


def _norm_of_the_whole(norm, x, silu=False):
    """`JoiningNorm.forward` where sums and concatenations are made before it."""
    x = blocks.whole(x)
    return blocks.GroupNorm.forward(norm, x, silu), x


# technique -> what stands in its place where it is off
SWITCHES = {
    "attention": (ddpm, "pixel_attention", _attend_as_it_lies),
    "bias": (blocks.BeforeNorm, "forward", _with_bias),
    "upsampling": (prepared, "upsamples_by_3x3", lambda module: False),
    "biases": (prepared, "biases_in_one", lambda module: []),
    "table": (prepared.Prepared, "at", lambda ready, times: ready),
    "sums": (blocks.JoiningNorm, "forward", _norm_of_the_whole),
}


@contextlib.contextmanager
def switched_on(techniques):
    """Run with these of `SWITCHES` alone."""
    with contextlib.ExitStack() as stack:
        for name, (place, attribute, instead) in SWITCHES.items():
            if name not in techniques:
                stack.enter_context(mock.patch.object(place, attribute, instead))
        yield


class CallStudy:
    """One frozen call of the network with each technique; the published side has none of them."""

    what, unit, techniques = "call", "s", CALL

    def __init__(self, network, batch, device):
        self.network, self.device = network, device
        self.x = noise_of_seeds(batch, 2, small_teacher(network, device).event_shape, device)[0]
        self.t = torch.arange(batch, device=device)
        use_full_float32()
        call = self._call("fp32", ())
        self.expected = call()
        self.published = Side({"all": (call, 1)}, counted_flops(call))

    def _call(self, precision, techniques):
        module = small_teacher(self.network, self.device)
        module.precision = precision
        with switched_on(techniques):
            called = prepared.Prepared(module).at(self.t) if "weights" in techniques else module

        def call():
            with switched_on(techniques), torch.no_grad():
                return called(self.x, self.t)

        return call

    def prepare(self, name, changes):
        """The side of a technique; AssertionError where its prediction is not the published."""
        call = self._call(changes["precision"], changes["techniques"])
        difference = float((call() - self.expected).abs().max() / self.expected.abs().max())
        assert difference <= EQUAL[changes["precision"]], f"differs by {difference:.2e} of the largest value"
        return Side({"all": (call, 1)}, counted_flops(call))

    def seconds(self, of_parts):
        """Seconds of a call."""
        return of_parts["all"]


def rows_of(study, rounds, device, facts, advice):
    """The rows of a study, one as soon as it is there: the published side's, then a technique's each.

    A technique is timed in turn with the published side and with what it is added to. One that fails is a failed row,
    and what would be added to it is set against the published side alone. What is compiled or recorded does the work of
    what it is added to, which can be counted.
    """
    kept = {"published": study.published}

    def timed(names):
        """{name: seconds} of some of `kept`, in turn."""
        sides = {(name, part): given for name in names for part, given in kept[name].parts.items()}
        medians = {key: statistics.median(values) for key, values in timed_rounds(sides, device, rounds).items()}
        return {name: study.seconds({part: medians[name, part] for part in kept[name].parts}) for name in names}

    def row(name, against, seconds, **extras):
        side, compared = kept[name], {"against": against, "ratio_against": None}
        if against is not None:
            compared["ratio_against"] = seconds[against] / seconds[name]
        return Row(
            f"{study.what}: {name}",
            ours=seconds[name],
            published=seconds["published"],
            ratio=seconds["published"] / seconds[name],
            unit=study.unit,
            counted_ratio=side.flops and study.published.flops / side.flops,
            extras={"technique": name, **compared, "preparing_seconds": side.preparing, **extras},
            **facts,
        )

    def row_of_technique(name, against, changes):
        side = study.prepare(name, changes)
        if side.flops is None and against in kept:
            side = replace(side, flops=kept[against].flops, moved=kept[against].moved)
        kept[name] = side
        against = against if against in kept else None
        seconds = timed(dict.fromkeys(each for each in ("published", against, name) if each))
        extras = {} if side.moved is None else rates(side.flops, side.moved, seconds[name], side.context)
        return row(name, against, seconds, **extras)

    yield row("published", None, timed(["published"]))
    techniques = runnable(study.techniques, device)
    for index, (name, (against, changes)) in enumerate(techniques.items()):
        case = f"{study.what}: {name}"
        yield row_of(case, functools.partial(row_of_technique, name, against, changes), facts, advice)
        needed = {"published", *(other for other, _ in [*techniques.values()][index + 1 :])}
        for done in kept.keys() - needed:
            del kept[done]  # with its networks and recordings


def main(given=None):
    defaults = {"network": "cifar10", "width": 32, "batch": 16, "images": 64, "nfe": 10, "f_learning_times": 20}
    parser = command_line(__doc__, **defaults, rounds=4, json=None)
    parser.add_argument("--only", choices=("call", "sampling", "training"))
    arguments = parser.parse_args(given)
    device = choose_device("auto")
    facts = describe(device)
    settings = {
        "network": {"name": arguments.network, "channels": arguments.width},
        "batch": arguments.batch,
        "images": arguments.images,
        "nfe": arguments.nfe,
        "f_learning_times": arguments.f_learning_times,
    }
    network, batch, images, nfe, f_learning_times = settings.values()
    fewer, smaller = f"--images {images}; use fewer", f"--batch {batch}; use a smaller"
    studies = {
        "call": (CallStudy, (network, batch, device), CALL_ROUNDS * arguments.rounds, smaller),
        "sampling": (SamplingStudy, (network, images, nfe, device), arguments.rounds, fewer),
        "training": (TrainingStudy, (network, batch, nfe, f_learning_times, device), arguments.rounds, smaller),
    }
    rows = []
    for study, sizes, rounds, advice in [studies[arguments.only]] if arguments.only else studies.values():
        for row in rows_of(study(*sizes), rounds, device, facts, advice):
            rows.append(replace(row, extras={**row.extras, **settings}))
            write_rows(arguments.json, rows)  # after each, so that a run that is cut off leaves what it has
            print(f"{row.case}: {row.failed or f'x{row.ratio:.2f}'}", file=sys.stderr, flush=True)
    without = "; kernels and graphs need a GPU" if device.type == "cpu" else ""
    print(f"{arguments.network}, {arguments.width} channels, on {facts['device']}{without}")
    return print_rows(rows, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
