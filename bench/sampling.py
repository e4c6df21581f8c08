"""Few-step sampling of ours against the published sampler: the same network, seeds' worth of noise and number of evaluations.

    python -m bench.sampling                                CIFAR-10's network at half width, 64 images, K = 10: three minutes on 2 cores
    python -m bench.sampling --width 128 --images 512       at full width, for a GPU

Both sides are interleaved in one run, medians. Before a case is timed, both sides draw images from the same noise, and must agree: in float32 to 1e-4 of the largest value.
"""

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch

from hsivi_fast import ops
from hsivi_fast.config import config_from_dict
from hsivi_fast.method.schedule import make_schedule
from hsivi_fast.models import build_layer, prepare_device
from hsivi_fast.nets import build_unet
from hsivi_fast.sampler import Sampler

from .measure import counted_flops, describe, print_rows, run_cases, span, synchronized_seconds, use_torch_defaults
from .published import PublishedTraining, published_sample

CASES = {"sampling_fp32": {}, "sampling_bf16": {"precision": "bf16"}}
EQUAL = {"fp32": 1e-4, "bf16": 0.1}  # largest difference allowed, of the largest value


def measure(case, network, images, nfe, rounds, facts):
    """The row of one case."""
    config = config_from_dict({"network": network, "teacher": {"checkpoint": "random weights"}, "nfe": nfe, "eta": 0.2, "name": case, **CASES[case]})
    device, backend = prepare_device(config)
    torch.manual_seed(0)
    teacher = build_unet(network).to(device)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.9)  # a fresh network's predictions are as large as its input, and ten layers of that go far
    student, other = copy.deepcopy(teacher).requires_grad_(False), copy.deepcopy(teacher)
    student.precision = config.precision
    published = PublishedTraining(other, copy.deepcopy(teacher), teacher, make_schedule("linear", 1000, "quad", nfe), 0.2, False, True, [lambda step: 0.0] * 2)
    sampler = Sampler(student, build_layer(config, device), torch.zeros(student.event_shape, device=device))
    sides = {"ours": lambda: (prepare_device(config), sampler(range(images), batch_size=images))[1],
             "published": lambda: (use_torch_defaults(), published_sample(published, images))[1]}
    seeds = torch.arange(images, device=device)
    noise = torch.stack([ops.draw_noise(seeds, k, student.event_shape) for k in range(nfe, 1, -1)])
    expected = published_sample(published, images, ops.draw_noise(seeds, 0, student.event_shape), noise)
    difference = float((sides["ours"]() - expected).abs().max() / expected.abs().max())
    if not difference <= EQUAL[config.precision]:
        return {"case": case, "failed": f"images differ by {difference:.2e} of the largest value", **facts}
    flops = {name: counted_flops(function) for name, function in sides.items()}
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, function in sides.items():
            seconds[name].append(synchronized_seconds(function, device))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"case": case, "ours": medians["ours"], "published": medians["published"], "ratio": medians["published"] / medians["ours"], "unit": "s",
            "counted_ratio": flops["published"] / flops["ours"], "ours_range": [min(seconds["ours"]), max(seconds["ours"])],
            "published_range": [min(seconds["published"]), max(seconds["published"])], "difference": difference, "ours_images_per_second": images / medians["ours"],
            "images": images, "nfe": nfe, "network": network, "backend": backend, **facts}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=CASES, help="one case; may be repeated; all by default")
    parser.add_argument("--width", type=int, default=64, help="base channels of CIFAR-10's network; 128 is full width")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--nfe", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    arguments = parser.parse_args()
    network = {"name": "cifar10", "channels": arguments.width}
    facts = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows = run_cases(arguments.case or CASES, lambda case: measure(case, network, arguments.images, arguments.nfe, arguments.rounds, facts), arguments.json)
    print(f"{network['name']}, {arguments.width} channels, {arguments.images} images, K = {arguments.nfe}, on {facts['device']}")
    return print_rows(rows, {"case": lambda r: r["case"], "ours s": lambda r: f"{r['ours']:.2f}", "range": lambda r: span(r["ours_range"]), "published s": lambda r: f"{r['published']:.2f}",
                       "range ": lambda r: span(r["published_range"]), "ratio": lambda r: f"{r['ratio']:.2f}", "counted": lambda r: f"{r['counted_ratio']:.2f}", "difference": lambda r: f"{r['difference']:.1e}"})


if __name__ == "__main__":
    sys.exit(main())
