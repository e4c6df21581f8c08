"""Where the time of a training cycle and of sampling goes, by torch's profiler: shares of kinds of operators.

The kinds are convolutions, normalisation, copies, the method, the optimizer. CIFAR-10's network at half width, in
float32 and bfloat16, takes three minutes on 2 cores:

    python -m bench.breakdown
    python -m bench.breakdown --width 128         at full width, for a GPU

Eager calls: what is compiled is one kernel to the profiler.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch.profiler import ProfilerActivity, profile

from bench.measure import Row, describe, print_rows, use_modes_of, write_rows
from bench.options import command_line
from bench.tables import Column
from bench.train_step import OurTraining, small_teacher
from hsivi_fast.build import choose_device
from hsivi_fast.sampling.sampler import Sampler

NFE, F_LEARNING_TIMES, IMAGES = 10, 20, 64
OURS = "hsivi_fast::"
KINDS = {  # kind -> parts of operators' names, the first that fits
    "the method's own": (
        "hsivi_fast::affine",
        "hsivi_fast::denoising",
        "hsivi_fast::fisher",
        "hsivi_fast::draw",
        "philox",
    ),
    "convolution": ("convolution",),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "::bmm", "softmax"),
    "matrix product": ("::mm", "::addmm", "::linear"),
    "normalisation, SiLU": ("group_norm", "silu"),
    "optimizer, average, clipping": ("_fused_adam", "_foreach", "linalg_vector_norm"),
    "casts, copies, padding": ("copy_", "::cat", "pad", "clone", "contiguous", "upsample", "fill_", "zero_"),
}
REST = "all else"


def kind_of(name):
    """The kind of an operator."""
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind
    return REST


def shares(function, device):
    """({kind: share of the time}, seconds) of one call; operators inside an operator of ours are its own."""
    gpu = device.type == "cuda"
    function()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        function()
        if gpu:
            torch.cuda.synchronize(device)
    spent = dict.fromkeys((*KINDS, REST), 0.0)
    for event in profiler.events():
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        spent[kind_of(_name_for_kind(event))] += own / 1e6
    total = sum(spent.values())
    return {kind: seconds / total for kind, seconds in spent.items()}, total


def _name_for_kind(event):
    """The name of the operator of ours that an event is part of, or else its own."""
    ancestor = event
    while ancestor.cpu_parent is not None and not ancestor.name.startswith(OURS):
        ancestor = ancestor.cpu_parent
    return ancestor.name if ancestor.name.startswith(OURS) else event.name


def parts_of(precision, network, batch, device):
    """{part: function of nothing}: the parts of a training cycle, and sampling."""
    teacher = small_teacher(network, device)
    ours = OurTraining(precision, {"precision": precision}, teacher, network, batch, NFE, F_LEARNING_TIMES)
    context = ours.context
    log_gamma = torch.zeros(ours.student.network.event_shape, device=device)
    sampler = Sampler(context.teacher, context.layers, log_gamma)

    def sample():
        use_modes_of(context)
        sampler(range(IMAGES), batch_size=IMAGES)

    return {**ours.parts(), "sampling": sample}


def share_columns(kinds):
    """A column for each kind."""
    return [Column(kind, f"{{shares[{kind}]:.1%}}") for kind in kinds]


def main():
    arguments = command_line(__doc__, width=64, batch=16, json=None).parse_args()
    device = choose_device("auto")
    network, facts, rows = {"name": "cifar10", "channels": arguments.width}, describe(device), []
    for precision in ("fp32", "bf16"):
        for part, function in parts_of(precision, network, arguments.batch, device).items():
            kinds, seconds = shares(function, device)
            extras = {"seconds": seconds, "shares": kinds, "network": network, "batch": arguments.batch}
            rows.append(Row(f"{part}, {precision}", extras=extras, **facts))
    write_rows(arguments.json, rows)
    columns = [Column("part", "{case}"), Column("s", "{seconds:.2f}"), *share_columns((*KINDS, REST))]
    return print_rows(rows, columns)


if __name__ == "__main__":
    sys.exit(main())
