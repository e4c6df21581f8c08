"""What each technique is worth by itself: one row a technique, against the same thing without it; rows that lost stay in the table.

    python -m bench.ablation                training and sampling, CIFAR-10's network at quarter width: 13 minutes on 2 cores, half of them compiling
    python -m bench.ablation --width 128    at full width, for a GPU

All variants are interleaved in one run, and each must agree with the published side before it is timed.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

from hsivi_fast import ops
from hsivi_fast.build import build_execution, build_layers, in_form_of, prepare_device
from hsivi_fast.config import config_from_dict
from hsivi_fast.sampling.sampler import Sampler

from .measure import counted_flops, describe, table, timed_rounds, use_torch_defaults, write_rows
from .published import cycle_work, published_sample
from .sampling import EQUAL
from .train_step import (
    CALLS,
    PUBLISHED_CALLS,
    OurTraining,
    cycle_sum,
    published_parts,
    published_training,
    small_teacher,
)

BF16, LAST, COMPILE, GRAPHS, FUSED = (
    {"precision": "bf16"},
    {"channels_last": True},
    {"compile": True},
    {"cuda_graphs": True},
    {"backend": "triton"},
)
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
WARM_UP = 5  # calls: with graphs, the last is replayed


def runnable(techniques, device):
    """Those that the device can run; kernels and graphs need a GPU."""
    return {
        name: row
        for name, row in techniques.items()
        if device.type == "cuda" or not row[1].get("cuda_graphs") and row[1].get("backend") != "triton"
    }


def training_rows(network, batch, nfe, f_updates, rounds, device):
    """Rows of a training cycle; the published side is one of them."""
    teacher = small_teacher(network, device)
    published = published_training(teacher, nfe)
    sides = {
        ("published", part): (function, PUBLISHED_CALLS[part])
        for part, function in published_parts(published, batch).items()
    }
    state = torch.zeros(batch, *teacher.event_shape, device=device)
    forward = counted_flops(lambda: teacher(state, published.tau[:1].expand(batch)))
    work, preparing, made = {"published": cycle_work(nfe, batch, f_updates) * forward}, {}, {}
    for name, (_, changes) in runnable(TRAINING, device).items():
        ours = OurTraining(name, {"backend": "torch", **changes}, teacher, network, batch, nfe, f_updates)
        ours.check(published_training(teacher, nfe))  # a new one: a check trains both sides
        parts = ours.parts()
        for function in list(parts.values()) * (WARM_UP if changes.get("cuda_graphs") else 1):
            function()
        if "fresh" in name:  # its rollout is within its updates
            del parts["rollout"]
        if not ours.execution.fixed_shapes and (
            changes.get("rollout") or not changes
        ):  # the others do the work of `pooled`
            work[name] = (
                cycle_sum({part: counted_flops(function) for part, function in parts.items()}, f_updates)
                if changes.get("rollout", {}).get("mode") != "fresh"
                else work["published"]
            )
        made[name], preparing[name] = ours, ours.execution.seconds
        sides |= {(name, part): (function, CALLS[part]) for part, function in parts.items()}
    seconds = timed_rounds(sides, device, rounds)
    totals = {}
    for name in ("published", *made):
        totals[name] = cycle_sum(
            {part: statistics.median(values) for (of, part), values in seconds.items() if of == name}, f_updates
        )
    return _rows("training", TRAINING, totals, work, "pooled", preparing, "s a cycle")


def sampling_rows(network, images, nfe, rounds, device):
    """Rows of sampling; the published side is one of them."""
    teacher = small_teacher(network, device)
    published = published_training(teacher, nfe)
    seeds = torch.arange(images, device=device)
    noise = torch.stack([ops.draw_noise(seeds, k, teacher.event_shape) for k in range(nfe, 1, -1)])
    expected = published_sample(published, images, ops.draw_noise(seeds, 0, teacher.event_shape), noise)
    sides, preparing = {"published": (lambda: (use_torch_defaults(), published_sample(published, images)), 1)}, {}
    for name, (_, changes) in runnable(SAMPLING, device).items():
        config = config_from_dict(
            {
                "network": network,
                "teacher": {"checkpoint": "random weights"},
                "nfe": nfe,
                "eta": 0.2,
                "backend": "torch",
                **changes,
            }
        )
        prepare_device(config)
        student = in_form_of(config, small_teacher(network, device))
        execution = build_execution(config, device)
        sampler = Sampler(
            student, build_layers(config, device), torch.zeros(student.event_shape, device=device), execution
        )
        draw = lambda config=config, sampler=sampler: (
            prepare_device(config),
            sampler(range(images), batch_size=images),
        )[1]
        for _ in range(WARM_UP if config.cuda_graphs else 1):
            got = draw()
        difference = float((got - expected).abs().max() / expected.abs().max())
        assert difference <= EQUAL[config.precision], f"{name}: images differ by {difference:.2e} of the largest value"
        preparing[name], sides[name] = execution.seconds, (draw, 1)
    totals = {name: statistics.median(values) for name, values in timed_rounds(sides, device, rounds).items()}
    return _rows("sampling", SAMPLING, totals, {"published": 1}, "published", preparing, "s")


def _rows(what, techniques, totals, work, same_work, preparing, unit):
    rows = [
        {
            "case": f"{what}: published",
            "technique": "published",
            "against": None,
            "ours": totals["published"],
            "published": totals["published"],
            "ratio": 1.0,
            "unit": unit,
            "counted_ratio": 1.0,
            "ratio_against": None,
            "preparing_seconds": 0.0,
        }
    ]
    for name, (against, _) in techniques.items():
        if name in totals:
            rows.append(
                {
                    "case": f"{what}: {name}",
                    "technique": name,
                    "against": against,
                    "ours": totals[name],
                    "published": totals["published"],
                    "ratio": totals["published"] / totals[name],
                    "unit": unit,
                    "counted_ratio": work["published"] / work.get(name, work.get(same_work, 1)),
                    "ratio_against": totals[against] / totals[name],
                    "preparing_seconds": preparing[name],
                }
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("training", "sampling"))
    parser.add_argument("--width", type=int, default=32, help="base channels of CIFAR-10's network; 128 is full width")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--nfe", type=int, default=10)
    parser.add_argument("--f-learning-times", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = {"name": "cifar10", "channels": arguments.width}
    rows = []
    if arguments.only != "training":
        rows += sampling_rows(network, arguments.images, arguments.nfe, arguments.rounds, device)
    if arguments.only != "sampling":
        rows += training_rows(
            network, arguments.batch, arguments.nfe, arguments.f_learning_times, arguments.rounds, device
        )
    facts = {
        "network": network,
        "batch": arguments.batch,
        "images": arguments.images,
        "nfe": arguments.nfe,
        "f_learning_times": arguments.f_learning_times,
        **describe(device),
    }
    rows = [{**row, **facts} for row in rows]
    if arguments.json:
        write_rows(arguments.json, rows)
    print(
        f"cifar10, {arguments.width} channels, on {facts['device']}; kernels and graphs need a GPU"
        if device.type == "cpu"
        else f"cifar10, {arguments.width} channels, on {facts['device']}"
    )
    print(
        table(
            rows,
            {
                "case": lambda r: r["case"],
                "s": lambda r: f"{r['ours']:.2f}",
                "against": lambda r: r["against"] or "-",
                "x against": lambda r: f"{r['ratio_against']:.2f}" if r["against"] else "-",
                "x published": lambda r: f"{r['ratio']:.2f}",
                "counted": lambda r: f"{r['counted_ratio']:.2f}",
                "preparing s": lambda r: f"{r['preparing_seconds']:.0f}",
            },
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
