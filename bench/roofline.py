"""What an H100 should reach, on paper: sampling and a training cycle, term by term. Nothing was measured.

    python -m bench.roofline                    prints the tables and fills them into bench/roofline.md
    python -m bench.roofline --network celeba64 prints those of another network

`python -m bench.trace` measures the same terms on a GPU, and sets them beside these.

* Counted, on tensors without memory: every operation of a call of the network in bfloat16, forward and backward, with
  its floating-point operations and the bytes of its inputs and results. Group normalisation is one operation, as the
  kernel is, and attention another. A convolution's bias is one too: torch adds it after cuDNN's kernel.
* Assumed of the card: see `Card`.

An operation takes the longer of two times: its arithmetic at the product's rate, and its bytes at the copy's. A
convolution or product is cut into tiles, and the last wave of tiles leaves multiprocessors idle. Each operation waits
for its launch on top. So the model is neither a lower bound, since what lies in the second-level cache need not be read
from memory, nor an upper one, since it takes every kernel to be as good as the best.
"""

import math
import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.breakdown import REST, kind_of
from bench.cluster import F_LEARNING_TIMES, NFE
from bench.measure import moves_memory, tensor_bytes
from bench.options import command_line
from bench.shapes import CudnnLayouts
from bench.tables import filled, markdown, table_names
from hsivi_fast import ops
from hsivi_fast.kernels import adam_step
from hsivi_fast.nets import build_unet
from hsivi_fast.nets.prepared import CAST_BY_AUTOCAST, Prepared

REPORT = Path(__file__).resolve().parent / "roofline.md"
BATCHES = (16, 128, 512)
OPTIMIZER, CASTS = "optimizer, average, clipping", "casts, copies, padding"  # kinds of bench.breakdown
STEP_TRANSFERS = 11  # of an element of the parameters, beside the norm's one: see kernels/adam_step.py


@dataclass(frozen=True)
class Card:
    """An H100 SXM, per second, in bytes and seconds. ASSUMED: shares of its data sheet that are usual for such cards.

    product: operations of a large bfloat16 product, 81 % of the sheet's 989e12.
    copy: bytes read and written by a large copy, 90 % of the sheet's 3.35e12.
    eager, graph: from one operation to the next, launched by the host, and in a CUDA graph.
    multiprocessors: of the sheet; tile: rows and columns of the result that one of them computes at a time.
    """

    product: float = 798e12
    copy: float = 3.0e12
    eager: float = 4e-6
    graph: float = 1.5e-6
    multiprocessors: int = 132
    tile: int = 128

    def seconds(self, operation):
        """The longer of arithmetic and memory, without the launch."""
        return max(operation.flops / (self.product * self.filled(operation.outputs)), operation.bytes / self.copy)

    def filled(self, outputs):
        """The share of the multiprocessors that the tiles of a product keep busy; outputs: (rows, columns) or None."""
        if outputs is None:
            return 1.0
        tiles, wave = math.prod(-(-extent // self.tile) for extent in outputs), self.multiprocessors
        # A product of few tiles is cut along its sum too, into as many parts as fill the card once.
        return 1.0 if tiles < wave else tiles / (wave * -(-tiles // wave))


H100 = Card()


@dataclass(frozen=True)
class Operation:
    """An operation: its kind as of bench.breakdown, what it computes and moves, and the kernels that it launches.

    outputs: (rows, columns) of a product's result.
    """

    kind: str
    flops: int
    bytes: int
    launches: int = 1
    outputs: tuple | None = None


class _Operations(TorchDispatchMode):
    """Notes every operation that does something."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if moves_memory(function):
            formula = flop_registry.get(function._overloadpacket)
            flops = formula(*arguments, **(keywords or {}), out_val=result) if formula else 0
            moved = tensor_bytes(arguments, keywords, result)
            name = function._schema.name
            # To the input, to the weight and to the bias: a kernel each.
            launches = sum(arguments[-1]) if name == "aten::convolution_backward" else 1
            self.found.append(Operation(kind_of(name), flops, moved, launches, _product_extents(name, result)))
            if name == "aten::convolution" and arguments[2] is not None:
                self.found.append(Operation(REST, 0, 2 * tensor_bytes(result)))
        return result


def _product_extents(name, result):
    """(rows, columns) of the result of a forward convolution or product; None for others."""
    if name == "aten::convolution":
        return result.numel() // result.shape[1], result.shape[1]
    if name in ("aten::mm", "aten::addmm"):
        return tuple(result.shape)
    return None


@contextmanager
def as_on_a_gpu():
    """On tensors without memory: the kernels' operators, the flash kernel's attention, and cuDNN's memory formats."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    with (
        CudnnLayouts(),
        mock.patch.object(ops, "_resolve", lambda backend, device: "triton"),
        mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v: flash(q, k, v)[0]),
    ):
        yield


@dataclass(frozen=True)
class Counted:
    """Operations of a network's call with one batch, and its size.

    forward, with_input_backward: of frozen calls at known timesteps, see nets/prepared.py; their table is made once for
    all layers, and not counted. with_backward: of a training call.
    parameters: elements; tensors: how many they are in; event: numbers of an image.
    """

    forward: list
    with_backward: list
    with_input_backward: list
    parameters: int
    tensors: int
    event: int


def counted(network_name, batch):
    """The `Counted` of a network of `nets.NETWORKS`."""
    with torch.device("meta"):
        network = build_unet(network_name).to(torch.bfloat16).in_channels_last()
        x = torch.empty(batch, *network.event_shape, dtype=torch.bfloat16)
        t = torch.zeros(batch, dtype=torch.int64)

    def operations(function):
        with as_on_a_gpu(), _Operations() as found:
            function()
        return found.found

    def pulled_back():
        leaf = x.detach().requires_grad_(True)
        prediction = frozen(leaf, t)
        torch.autograd.grad(prediction, leaf, torch.empty_like(prediction))

    with_backward = operations(lambda: torch.autograd.backward(network(x, t), torch.empty_like(x)))
    with_backward += cast_operations(network)
    parameters = [parameter.numel() for parameter in network.parameters()]
    frozen = Prepared(network).at(torch.arange(NFE))
    with torch.no_grad():
        forward = operations(lambda: frozen(x, t))
    with_input_backward = operations(pulled_back)
    return Counted(forward, with_backward, with_input_backward, sum(parameters), len(parameters), x[0].numel())


def cast_operations(network):
    """A training call's casts of weights to bfloat16, and of their gradients back."""
    cast = [
        parameter.numel()
        for module in network.modules()
        if isinstance(module, CAST_BY_AUTOCAST)
        for parameter in module.parameters(recurse=False)
    ]
    return [Operation(CASTS, 0, (4 + 2) * size) for size in cast] * 2


def step_operations(batch, event):
    """The layer's step and what is around it in a call of the sampler: state, prediction and result in float32."""
    return [Operation("the method's own", 0, 3 * 4 * batch * event)]


def optimizer_operations(network):
    """A step: the norm, the addresses of the gradients, and the kernel."""
    size, tables = 4 * network.parameters, -(-network.tensors // adam_step.WRITTEN)
    addresses = [Operation(OPTIMIZER, 0, 8 * network.tensors // tables)] * tables
    return [Operation(OPTIMIZER, 0, size), *addresses, Operation(OPTIMIZER, 0, STEP_TRANSFERS * size)]


def call_operations(network, batch):
    """One of the K calls of the sampler or the rollout."""
    return network.forward + step_operations(batch, network.event)


def cycle_operations(network, batch):
    """A training cycle: the pool's rollout, the student's update and those of the score network."""
    # f B / K trajectories go through K layers: as many samples as f calls with a batch have.
    rolled = call_operations(network, batch) * F_LEARNING_TIMES
    student = network.with_backward + 2 * network.with_input_backward
    score_net = network.with_backward * F_LEARNING_TIMES
    return [*rolled, *student, *score_net, *optimizer_operations(network) * (1 + F_LEARNING_TIMES)]


def terms(operations, card=H100):
    """{kind: {launches, flops, bytes, seconds without launches}}, and all kinds together under "all"."""
    table = defaultdict(lambda: {"launches": 0, "flops": 0, "bytes": 0, "seconds": 0.0})
    for operation in operations:
        for kind in (operation.kind, "all"):
            row = table[kind]
            row["launches"] += operation.launches
            row["flops"] += operation.flops
            row["bytes"] += operation.bytes
            row["seconds"] += card.seconds(operation)
    return dict(table)


def whole(operations, launch, card=H100):
    """Seconds of operations: of each the longer of its own time and that of its launches."""
    return sum(max(card.seconds(operation), operation.launches * launch) for operation in operations)


def term_lines(operations):
    """Lines of the table of terms."""
    table = terms(operations)
    lines = []
    for kind, row in sorted(table.items(), key=lambda item: (item[0] == "all", -item[1]["seconds"])):
        share = row["flops"] / row["seconds"] / H100.product if row["seconds"] else 0.0
        cells = [row["launches"], f"{row['flops'] / 1e9:.0f}", f"{row['bytes'] / 1e9:.2f}"]
        lines.append([kind, *cells, f"{1e3 * row['seconds']:.2f}", f"{share:.0%}" if row["flops"] else "-"])
    return lines


TERMS = ["kind", "launches", "GFLOP", "GB", "ms without launches", "of the product's rate"]


def summary_lines(networks):
    """Lines of the table of rates, of {batch: `Counted`}."""
    lines = []
    for batch, network in networks.items():
        for what, operations, images in (
            (f"sampling, {NFE} evaluations", call_operations(network, batch) * NFE, batch),
            ("a training cycle", cycle_operations(network, batch), batch * F_LEARNING_TIMES),
        ):
            flops = sum(operation.flops for operation in operations)
            cells = []
            for launch in (H100.eager, H100.graph):
                seconds = whole(operations, launch)
                share = flops / seconds / H100.product
                cells += [f"{1e3 * seconds:.1f}", f"{images / seconds:.0f}", f"{share:.0%}"]
            launches = sum(operation.launches for operation in operations)
            lines.append([what, batch, launches, *cells])
    return lines


SUMMARY = [
    *("what", "batch", "launches"),
    *("ms, eager", "images/s", "of the product's rate", "ms, graph", "images/s", "of the product's rate"),
]


def tables(network_name):
    """{name of its place in the report: Markdown}."""
    networks = {batch: counted(network_name, batch) for batch in BATCHES}
    found = {"summary": markdown(SUMMARY, summary_lines(networks))}
    for batch, network in networks.items():
        found[f"call_{batch}"] = markdown(TERMS, term_lines(call_operations(network, batch)))
        update = network.with_backward + optimizer_operations(network)
        found[f"update_{batch}"] = markdown(TERMS, term_lines(update))
    return found


def main():
    parser = command_line(__doc__)
    parser.add_argument("--network", default="cifar10", help="one of cifar10, celeba64, imagenet64")
    arguments = parser.parse_args()
    found = tables(arguments.network)
    for name, table in found.items():
        print(f"{name}\n{table}")
    if arguments.network == parser.get_default("network"):
        document = REPORT.read_text()
        assert set(table_names(document)) == set(found)
        REPORT.write_text(filled(document, found.get))


if __name__ == "__main__":
    sys.exit(main())
