"""Few-step sampling of ours against the published sampler: the same network, noise and number of evaluations.

CIFAR-10's network at half width, 64 images, K = 10 takes six minutes on 2 cores, one of them compiling:

    python -m bench.sampling
    python -m bench.sampling --width 128 --images 512       at full width, for a GPU
    python -m bench.sampling --upstream PATH                against the published code itself, in a clone of yours

Both sides are interleaved in one run, medians. Before a case is timed, both sides draw images from the same noise, and
must agree: in float32 to 1e-4 of the largest value. The published side is then without TF32, which it is timed with
where torch has it by default: on a GPU, in convolutions.
"""

import functools
import statistics
import sys
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench.measure import (
    Row,
    counted_bytes,
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
from bench.published import published_sample
from bench.tables import Column, peak_megabytes
from bench.train_step import bench_config, published_training, runnable, small_teacher
from bench.upstream import upstream_sample
from hsivi_fast import ops
from hsivi_fast.build import build_context, choose_device, in_form_of
from hsivi_fast.execution import WARM_UP
from hsivi_fast.parallel.world import ALONE
from hsivi_fast.sampling.sampler import Sampler

FAST = {"precision": "bf16", "channels_last": True, "compile": True}
CASES = {  # name -> what is ours in it
    "sampling_fp32": {},
    "sampling_fp32_channels_last": {"channels_last": True},
    "sampling_tf32": {"precision": "tf32", "channels_last": True},
    "sampling_bf16_eager": {"precision": "bf16"},
    "sampling_bf16": FAST,
    "sampling_bf16_graphs": {**FAST, "cuda_graphs": True},
    "latency_bf16_graphs": {**FAST, "cuda_graphs": True},  # one image
}
CPU_BATCH = 16  # of ours on a CPU: what a layer of so many images works on stays in its cache
# Largest difference allowed, of the largest value: TF32 rounds to 10 bits where bfloat16 does to 7.
EQUAL = {"fp32": 1e-4, "tf32": 0.02, "bf16": 0.1}
COLUMNS = [
    Column("case", "{case}"),
    Column("ours s", "{ours:.2f}"),
    Column("range", "{ours_range[0]:.2f} to {ours_range[1]:.2f}"),
    Column("published s", "{published:.2f}"),
    Column("range", "{published_range[0]:.2f} to {published_range[1]:.2f}"),
    Column("ratio", "{ratio:.2f}"),
    Column("counted", "{counted_ratio:.2f}"),
    Column("difference", "{difference:.1e}"),
    Column("peak MB", peak_megabytes),
    Column("images/s", "{ours_images_per_second:.1f}"),
    Column("of a product's rate", "{utilisation:.0%}"),
    Column("of a copy's", "{share_of_copy:.0%}"),
    Column("preparing s", "{preparing_seconds:.0f}"),
]


def default_cases(device):
    """The cases that the device can run."""
    return list(runnable(CASES, device))


class OurSampling:
    """Our side of one case: a sampler whose student is a copy of the small teacher, and its eager twin.

    `warm_up`: how many calls compile and record it.
    """

    def __init__(self, network, nfe, device, **keys):
        self.config = bench_config(network, nfe, device=str(device), **keys)
        self.warm_up = WARM_UP + 1 if self.config.cuda_graphs else 1
        self.context = context = build_context(self.config, ALONE)
        student = in_form_of(self.config, small_teacher(network, context.device))
        log_gamma = torch.zeros(student.event_shape, device=context.device)
        self.sampler = Sampler(student, context.layers, log_gamma, context.execution)
        self.eager = Sampler(student, context.layers, log_gamma)

    def draw(self, images, batch):
        """Images of the seeds 0 .. images - 1."""
        use_modes_of(self.context)
        return self.sampler(range(images), batch_size=batch)

    def draw_eagerly(self, images, batch):
        """The same by the eager twin."""
        use_modes_of(self.context)
        return self.eager(range(images), batch_size=batch)

    def check(self, images, batch, expected):
        """Compare with the images `expected`.

        Returns (the largest difference, of the largest value; whether it is as small as the precision allows).
        """
        got = self.draw(images, batch)
        difference = float((got - expected).abs().max() / expected.abs().max())
        return difference, difference <= EQUAL[self.config.precision]


def noise_of_seeds(images, nfe, event_shape, device):
    """(x_K, noise [K - 1, B, *event]) that our sampler draws for the seeds 0 .. images - 1."""
    seeds = torch.arange(images, device=device)
    noise = torch.stack([ops.draw_noise(seeds, k, event_shape) for k in range(nfe, 1, -1)])
    return ops.draw_noise(seeds, 0, event_shape), noise


def measure(case, network, images, nfe, rounds, facts, upstream=None):
    """The row of one case."""
    images = 1 if case.startswith("latency") else images
    device = choose_device("auto")
    ours = OurSampling(network, nfe, device, name=case, **CASES[case])
    teacher = small_teacher(network, device)
    published = published_training(teacher, nfe, upstream)
    their_sample = upstream_sample if upstream else published_sample
    batch = min(images, CPU_BATCH) if device.type == "cpu" else images

    def draw_published():
        use_torch_defaults()
        return their_sample(published, images)

    sides = {"ours": functools.partial(ours.draw, images, batch), "published": draw_published}
    wait_for_turn([sides["ours"]], device)
    noise = noise_of_seeds(images, nfe, teacher.event_shape, device)
    use_full_float32()
    expected = their_sample(published, images, *noise)
    our_peak = warmed_up([sides["ours"]], ours.warm_up, device)
    published_peak = warmed_up([draw_published], 1, device)
    difference, equal = ours.check(images, batch, expected)
    if not equal:
        return Row(case, failed=f"images differ by {difference:.2e} of the largest value", **facts)
    seconds = timed_rounds({name: (function, 1) for name, function in sides.items()}, device, rounds)
    # What is compiled or recorded does the same products and convolutions as its eager twin, which can be counted.
    draw_eagerly = functools.partial(ours.draw_eagerly, images, batch)
    our_flops, our_bytes = counted_flops(draw_eagerly), counted_bytes(draw_eagerly)
    published_flops = counted_flops(draw_published)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    extras = {
        "ours_range": [min(seconds["ours"]), max(seconds["ours"])],
        "published_range": [min(seconds["published"]), max(seconds["published"])],
        "difference": difference,
        "ours_images_per_second": images / medians["ours"],
        "ours_peak_bytes": our_peak,
        "published_peak_bytes": published_peak,
        "joules_per_image": joules_per_image(sides["ours"], device, images),
        "ours_flops": our_flops,
        **rates(our_flops, our_bytes, medians["ours"], ours.context),
        "preparing_seconds": ours.context.execution.seconds,
        "baseline": "a clone of the published code" if upstream else "bench/published.py",
        "images": images,
        "batch": batch,
        "nfe": nfe,
        "network": network,
        "backend": ours.context.backend,
    }
    return Row(
        case,
        ours=medians["ours"],
        published=medians["published"],
        ratio=medians["published"] / medians["ours"],
        unit="s",
        counted_ratio=published_flops / our_flops,
        extras=extras,
        **facts,
    )


def main(given=None):
    defaults = {"network": "cifar10", "width": 64, "images": 64, "nfe": 10, "rounds": 4}
    parser = command_line(__doc__, **defaults, upstream=None, json=None)
    add_cases(parser, CASES, "all that the device can run")
    arguments = parser.parse_args(given)
    device = choose_device("auto")
    facts = describe(device)
    measure_case = functools.partial(
        measure,
        network={"name": arguments.network, "channels": arguments.width},
        images=arguments.images,
        nfe=arguments.nfe,
        rounds=arguments.rounds,
        facts=facts,
        upstream=arguments.upstream,
    )
    cases, advice = arguments.case or default_cases(device), f"--images {arguments.images}; use fewer"
    try:
        rows = run_cases(cases, measure_case, arguments.json, facts, advice)
    except ValueError as error:  # a clone that is none, a device that cannot do what a case needs
        parser.error(str(error))
    what = f"{arguments.network}, {arguments.width} channels, {arguments.images} images, K = {arguments.nfe}"
    print(f"{what}, on {facts['device']}")
    code = print_rows(rows, COLUMNS)
    print_headline(rows, device)
    return code


if __name__ == "__main__":
    sys.exit(main())
