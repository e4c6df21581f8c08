"""What each technique is worth by itself: one row a technique, against the same thing without it.

Rows that lost stay in the table. Single frozen calls, training and sampling of CIFAR-10's network at quarter width take
13 minutes on 2 cores, half of them compiling:

    python -m bench.ablation
    python -m bench.ablation --width 128    at full width, for a GPU

All variants are interleaved in one run, and each must agree with the published side before it is timed.
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

from bench.measure import Row, counted_flops, describe, print_rows, timed_rounds, use_torch_defaults, write_rows
from bench.options import command_line
from bench.published import cycle_work, published_sample
from bench.sampling import EQUAL, WARM_UP, OurSampling, noise_of_seeds
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
from hsivi_fast.build import choose_device
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
}
# technique -> (what it is added to, precision, what of `SWITCHES` is on): one call of the network by itself.
CALL = {
    "attention by pixels": ("published", "fp32", ("attention",)),
    "bias left to the norm": ("attention by pixels", "fp32", ("attention", "bias")),
    "upsampling folded": ("bias left to the norm", "fp32", ("attention", "bias", "weights", "upsampling")),
    "bf16 by autocast": ("published", "bf16", ()),
    "attention by pixels, bf16": ("bf16 by autocast", "bf16", ("attention",)),
    "bias left to the norm, bf16": ("attention by pixels, bf16", "bf16", ("attention", "bias")),
    "weights ready, bf16": ("bias left to the norm, bf16", "bf16", ("attention", "bias", "weights")),
    "upsampling folded, bf16": (
        "weights ready, bf16",
        "bf16",
        ("attention", "bias", "weights", "upsampling"),
    ),
}
CALL_ROUNDS = 5  # of a call to one of a cycle: it takes a moment, and what it gains is little
COLUMNS = [
    Column("case", "{case}"),
    Column("s", "{ours:.2f}"),
    Column("against", "{against}", needs="against"),
    Column("x against", "{ratio_against:.2f}", needs="ratio_against"),
    Column("x published", "{ratio:.2f}"),
    Column("counted", "{counted_ratio:.2f}"),
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
class Measured:
    """What was measured of some techniques.

    seconds: {technique or "published": seconds}; preparing: {technique: seconds of compiling and recording}.
    counted_ratio: {technique: published work by its own}.
    """

    seconds: dict
    preparing: dict
    counted_ratio: dict

    def rows(self, what, unit, techniques):
        """The rows of `what`, training or sampling: the published side first."""
        rows = [self._row(what, unit, "published", 1.0, against=None, ratio_against=None, preparing_seconds=0.0)]
        for name, (against, *_) in techniques.items():
            if name in self.preparing:
                compared = {"against": against, "ratio_against": self.seconds[against] / self.seconds[name]}
                preparing = self.preparing[name]
                row = self._row(what, unit, name, self.counted_ratio[name], **compared, preparing_seconds=preparing)
                rows.append(row)
        return rows

    def _row(self, what, unit, name, counted_ratio, **extras):
        return Row(
            f"{what}: {name}",
            ours=self.seconds[name],
            published=self.seconds["published"],
            ratio=self.seconds["published"] / self.seconds[name],
            unit=unit,
            counted_ratio=counted_ratio,
            extras={"technique": name, **extras},
        )


def training_rows(network, batch, nfe, f_learning_times, rounds, device):
    """Rows of a training cycle; the published side is one of them."""
    teacher = small_teacher(network, device)
    published = published_training(teacher, nfe)
    sides = {}
    for part, function in published_parts(published, batch).items():
        sides["published", part] = (function, PUBLISHED_CALLS[part])
    state = torch.zeros(batch, *teacher.event_shape, device=device)
    forward = counted_flops(lambda: teacher(state, published.tau[:1].expand(batch)))
    published_work = cycle_work(nfe, batch, f_learning_times) * forward
    work, preparing = {}, {}
    for name, (_, changes) in runnable(TRAINING, device).items():
        ours = OurTraining(name, {"backend": "torch", **changes}, teacher, network, batch, nfe, f_learning_times)
        ours.check(published_training(teacher, nfe))  # a new one: a check trains both sides
        parts = ours.parts()
        for _ in range(WARM_UP if changes.get("cuda_graphs") else 1):
            for function in parts.values():
                function()
        fresh = changes.get("rollout", {}).get("mode") == "fresh"
        if fresh:
            del parts["rollout"]  # it is within its updates
            work[name] = published_work
        elif changes.keys() <= {"rollout"}:  # the others do the work of `pooled`
            work[name] = counted_of_parts(counted_flops, parts, f_learning_times)
        preparing[name] = ours.context.execution.seconds
        for part, function in parts.items():
            sides[name, part] = (function, CALLS[part])
    medians = {side: statistics.median(values) for side, values in timed_rounds(sides, device, rounds).items()}
    seconds = {}
    for name in ("published", *preparing):
        seconds[name] = cycle_sum(
            {part: value for (of, part), value in medians.items() if of == name}, f_learning_times
        )
    counted_ratio = {name: published_work / work.get(name, work.get("pooled")) for name in preparing}
    return Measured(seconds, preparing, counted_ratio).rows("training", "s a cycle", TRAINING)


def _attend_as_it_lies(qkv):
    """`pixel_attention` of q, k and v whose numbers may lie apart."""
    return F.scaled_dot_product_attention(*qkv.transpose(3, 4)).transpose(2, 3)


def _with_bias(conv, x, add=None):
    """`BeforeNorm.forward` where the convolution adds its bias itself."""
    return conv.convolved(x, conv.bias), add


# technique -> what stands in its place where it is off
SWITCHES = {
    "attention": (ddpm, "pixel_attention", _attend_as_it_lies),
    "bias": (blocks.BeforeNorm, "forward", _with_bias),
    "upsampling": (prepared, "upsamples_by_3x3", lambda module: False),
}


@contextlib.contextmanager
def switched_on(techniques):
    """Run with these of `SWITCHES` alone."""
    with contextlib.ExitStack() as stack:
        for name, (place, attribute, instead) in SWITCHES.items():
            if name not in techniques:
                stack.enter_context(mock.patch.object(place, attribute, instead))
        yield


def call_rows(network, batch, rounds, device):
    """Rows of one frozen call of the network; the published side has none of the techniques."""
    use_torch_defaults()
    x = noise_of_seeds(batch, 2, small_teacher(network, device).event_shape, device)[0]
    t = torch.arange(batch, device=device)
    sides, work, expected = {}, {}, None
    for name, (_, precision, techniques) in {"published": (None, "fp32", ()), **CALL}.items():
        module = small_teacher(network, device)
        module.precision = precision
        with switched_on(techniques):
            called = prepared.Prepared(module) if "weights" in techniques else module

        def call(called=called, techniques=techniques):
            with switched_on(techniques), torch.no_grad():
                return called(x, t)

        result = call()
        expected = result if expected is None else expected
        difference = float((result - expected).abs().max() / expected.abs().max())
        assert difference <= EQUAL[precision], f"{name}: differs by {difference:.2e} of the largest value"
        sides[name], work[name] = (call, 1), counted_flops(call)
    seconds = {name: statistics.median(values) for name, values in timed_rounds(sides, device, rounds).items()}
    counted_ratio = {name: work["published"] / work[name] for name in CALL}
    return Measured(seconds, dict.fromkeys(CALL, 0.0), counted_ratio).rows("call", "s", CALL)


def sampling_rows(network, images, nfe, rounds, device):
    """Rows of sampling; the published side is one of them."""
    teacher = small_teacher(network, device)
    published = published_training(teacher, nfe)
    expected = published_sample(published, images, *noise_of_seeds(images, nfe, teacher.event_shape, device))

    def draw_published():
        use_torch_defaults()
        published_sample(published, images)

    sides, preparing, work = {"published": (draw_published, 1)}, {}, None
    for name, (_, changes) in runnable(SAMPLING, device).items():
        ours = OurSampling(network, nfe, **{"backend": "torch", **changes})
        difference, equal = ours.check(images, images, expected)
        assert equal, f"{name}: images differ by {difference:.2e} of the largest value"
        preparing[name] = ours.context.execution.seconds
        work = work or counted_flops(lambda ours=ours: ours.eager(range(images), batch_size=images))
        sides[name] = (functools.partial(ours.draw, images, images), 1)
    seconds = {name: statistics.median(values) for name, values in timed_rounds(sides, device, rounds).items()}
    counted_ratio = dict.fromkeys(preparing, counted_flops(draw_published) / work)  # all of ours do the same work
    return Measured(seconds, preparing, counted_ratio).rows("sampling", "s", SAMPLING)


def main():
    parser = command_line(__doc__, width=32, batch=16, images=64, nfe=10, f_learning_times=20, rounds=4, json=None)
    parser.add_argument("--only", choices=("call", "sampling", "training"))
    arguments = parser.parse_args()
    device = choose_device("auto")
    facts = describe(device)
    settings = {
        "network": {"name": "cifar10", "channels": arguments.width},
        "batch": arguments.batch,
        "images": arguments.images,
        "nfe": arguments.nfe,
        "f_learning_times": arguments.f_learning_times,
    }
    network, batch, images, nfe, f_learning_times = settings.values()
    rows = []
    if arguments.only in (None, "call"):
        rows += call_rows(network, batch, CALL_ROUNDS * arguments.rounds, device)
    if arguments.only in (None, "sampling"):
        rows += sampling_rows(network, images, nfe, arguments.rounds, device)
    if arguments.only in (None, "training"):
        rows += training_rows(network, batch, nfe, f_learning_times, arguments.rounds, device)
    rows = [replace(row, extras={**row.extras, **settings}, **facts) for row in rows]
    write_rows(arguments.json, rows)
    without = "; kernels and graphs need a GPU" if device.type == "cpu" else ""
    print(f"cifar10, {arguments.width} channels, on {facts['device']}{without}")
    return print_rows(rows, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
