"""Few-step sampling of ours against the published sampler: the same network, seeds' worth of noise and number of evaluations.

    python -m bench.sampling                                CIFAR-10's network at half width, 64 images, K = 10: six minutes on 2 cores, one of them compiling
    python -m bench.sampling --width 128 --images 512       at full width, for a GPU
    python -m bench.sampling --upstream PATH                against the published code itself, in a clone of yours

Both sides are interleaved in one run, medians. Before a case is timed, both sides draw images from the same noise, and must agree: in float32 to 1e-4 of the largest value.
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

from .measure import (
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
from .published import published_sample
from .train_step import published_training, small_teacher
from .upstream import upstream_sample

FAST = {"precision": "bf16", "channels_last": True, "compile": True}
CASES = {  # name -> what is ours in it
    "sampling_fp32": {},
    "sampling_fp32_channels_last": {"channels_last": True},
    "sampling_bf16_eager": {"precision": "bf16"},
    "sampling_bf16": FAST,
    "sampling_bf16_graphs": {**FAST, "cuda_graphs": True},
    "latency_bf16_graphs": {**FAST, "cuda_graphs": True},  # one image
}
CPU_BATCH = 16  # of ours on a CPU: what a layer of so many images works on stays in its cache
EQUAL = {"fp32": 1e-4, "bf16": 0.1}  # largest difference allowed, of the largest value


def default_cases(device):
    """The cases that the device can run."""
    return [name for name, changes in CASES.items() if device.type == "cuda" or not changes.get("cuda_graphs")]


def measure(case, network, images, nfe, rounds, facts, upstream=None):
    """The row of one case."""
    images = 1 if case.startswith("latency") else images
    config = config_from_dict(
        {
            "network": network,
            "teacher": {"checkpoint": "random weights"},
            "nfe": nfe,
            "eta": 0.2,
            "name": case,
            **CASES[case],
        }
    )
    device, backend = prepare_device(config)
    teacher = small_teacher(network, device)
    published, theirs = published_training(teacher, nfe, upstream), upstream_sample if upstream else published_sample
    student = in_form_of(config, small_teacher(network, device))
    layer, execution = build_layers(config, device), build_execution(config, device)
    log_gamma = torch.zeros(student.event_shape, device=device)
    sampler, eager = (Sampler(student, layer, log_gamma, *each) for each in ((execution,), ()))
    batch = min(images, CPU_BATCH) if device.type == "cpu" else images
    sides = {
        "ours": lambda: (prepare_device(config), sampler(range(images), batch_size=batch))[1],
        "published": lambda: (use_torch_defaults(), theirs(published, images))[1],
    }
    seeds = torch.arange(images, device=device)
    noise = torch.stack([ops.draw_noise(seeds, k, student.event_shape) for k in range(nfe, 1, -1)])
    expected = theirs(published, images, ops.draw_noise(seeds, 0, student.event_shape), noise)
    for _ in range(5 if config.cuda_graphs else 1):  # the last of them is replayed
        got = sides["ours"]()
    difference = float((got - expected).abs().max() / expected.abs().max())
    if not difference <= EQUAL[config.precision]:
        return {"case": case, "failed": f"images differ by {difference:.2e} of the largest value", **facts}
    sides["published"]()
    seconds = timed_rounds({name: (function, 1) for name, function in sides.items()}, device, rounds)
    # What is compiled or recorded does the same products and convolutions as its eager twin, on which they can be counted.
    flops = {
        "ours": counted_flops(lambda: eager(range(images), batch_size=batch)),
        "published": counted_flops(sides["published"]),
    }
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rate = product_rate(device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    return {
        "case": case,
        "ours": medians["ours"],
        "published": medians["published"],
        "ratio": medians["published"] / medians["ours"],
        "unit": "s",
        "counted_ratio": flops["published"] / flops["ours"],
        "ours_range": [min(seconds["ours"]), max(seconds["ours"])],
        "published_range": [min(seconds["published"]), max(seconds["published"])],
        "difference": difference,
        "ours_images_per_second": images / medians["ours"],
        "ours_peak_bytes": peak_bytes(sides["ours"], device),
        "published_peak_bytes": peak_bytes(sides["published"], device),
        "joules_per_image": joules_per_image(sides["ours"], device, images),
        "ours_flops": flops["ours"],
        "product_flops_per_second": rate,
        "utilisation": flops["ours"] / medians["ours"] / rate,
        "preparing_seconds": execution.seconds,
        "baseline": "a clone of the published code" if upstream else "bench/published.py",
        "images": images,
        "batch": batch,
        "nfe": nfe,
        "network": network,
        "backend": backend,
        **facts,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case",
        action="append",
        choices=CASES,
        help="one case; may be repeated; all that the device can run by default",
    )
    parser.add_argument("--width", type=int, default=64, help="base channels of CIFAR-10's network; 128 is full width")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--nfe", type=int, default=10)
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
            arguments.case or default_cases(device),
            lambda case: measure(
                case, network, arguments.images, arguments.nfe, arguments.rounds, facts, arguments.upstream
            ),
            arguments.json,
        )
    except ValueError as error:  # a clone that is none, a device that cannot do what a case needs
        parser.error(str(error))
    print(
        f"{network['name']}, {arguments.width} channels, {arguments.images} images, K = {arguments.nfe}, on {facts['device']}"
    )
    return print_rows(
        rows,
        {
            "case": lambda r: r["case"],
            "ours s": lambda r: f"{r['ours']:.2f}",
            "range": lambda r: span(r["ours_range"]),
            "published s": lambda r: f"{r['published']:.2f}",
            "range ": lambda r: span(r["published_range"]),
            "ratio": lambda r: f"{r['ratio']:.2f}",
            "counted": lambda r: f"{r['counted_ratio']:.2f}",
            "difference": lambda r: f"{r['difference']:.1e}",
            "peak MB": lambda r: f"{r['ours_peak_bytes'] / 1e6:.0f} / {r['published_peak_bytes'] / 1e6:.0f}",
            "images/s": lambda r: f"{r['ours_images_per_second']:.1f}",
            "of a product's rate": lambda r: f"{r['utilisation']:.0%}",
            "preparing s": lambda r: f"{r['preparing_seconds']:.0f}",
        },
    )


if __name__ == "__main__":
    sys.exit(main())
