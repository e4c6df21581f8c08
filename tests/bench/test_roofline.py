"""The model of one card: its formulas at numbers worked out by hand, and what it counts of a network."""

import pytest
import torch

from bench import roofline
from bench.measure import counted_flops
from bench.roofline import Card, Operation, call_operations, counted, cycle_operations, terms, whole
from bench.shapes import CudnnLayouts
from bench.tables import table_names
from hsivi_fast.nets import build_unet
from hsivi_fast.nets.blocks import ConvBeforeNorm, ConvBeforeSum
from hsivi_fast.nets.ddpm import AttentionBlock
from hsivi_fast.nets.prepared import Prepared

SMALL = {"name": "cifar10", "channels": 32, "image_size": 8, "multipliers": [1, 2], "attention": [False, True]}
SMALL |= {"res_blocks": 1}
ROUND = Card(product=1000.0, copy=100.0, eager=4.0, graph=1.0, multiprocessors=4, tile=8)


@pytest.fixture(scope="module")
def small():
    return counted(SMALL, 2)


def test_an_operation_takes_the_longer_of_arithmetic_and_memory():
    assert ROUND.seconds(Operation("product", flops=5000, bytes=100)) == 5.0
    assert ROUND.seconds(Operation("product", flops=5000, bytes=700)) == 7.0
    # Six tiles on four multiprocessors are two waves, of which the second is half empty.
    assert ROUND.seconds(Operation("product", flops=3000, bytes=0, outputs=(17, 16))) == 4.0
    assert ROUND.filled((8, 8)) == 1.0


def test_an_operation_waits_for_its_launches():
    operations = [Operation("a", 5000, 0), Operation("b", 0, 100, launches=2)]
    assert whole(operations, ROUND.eager, ROUND) == 5.0 + 8.0
    assert whole(operations, ROUND.graph, ROUND) == 5.0 + 2.0
    table = terms(operations, ROUND)
    assert table["all"] == {"launches": 3, "flops": 5000, "bytes": 100, "seconds": 6.0}
    assert table["b"] == {"launches": 2, "flops": 0, "bytes": 100, "seconds": 1.0}


def _training_forward():
    network = build_unet(SMALL)
    return counted_flops(lambda: network(torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)))


def test_what_is_counted_of_a_network(small):
    network = build_unet(SMALL)
    x, t = torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    by_kind, frozen = terms(small.forward), Prepared(network).at(t)
    assert by_kind["all"]["flops"] == counted_flops(lambda: frozen(x, t))
    # The embedding of time and what the blocks make of it are a table.
    assert "matrix product" not in by_kind

    def count(kind):
        return sum(isinstance(module, kind) for module in network.modules())

    assert by_kind["convolution"]["launches"] == count(torch.nn.Conv2d)
    assert by_kind["attention"]["launches"] == count(AttentionBlock)
    assert by_kind["normalisation, SiLU"]["launches"] == count(torch.nn.GroupNorm)  # one kernel each
    sizes = [parameter.numel() for parameter in network.parameters()]
    assert (small.parameters, small.tensors) == (sum(sizes), len(sizes))


def test_a_step_of_the_optimizer_has_twelve_transfers(small):
    of_step = terms(roofline.optimizer_operations(small))["all"]
    assert of_step["bytes"] == pytest.approx(12 * 4 * small.parameters + 8 * small.tensors, abs=8)
    assert of_step["launches"] == 3


def test_bytes_are_of_bfloat16(small):
    (first,) = [each for each in small.forward if each.kind == "convolution"][:1]
    assert first.bytes == 2 * (2 * 3 * 64 + 32 * 3 * 9 + 32 + 2 * 32 * 64)
    assert first.outputs == (2 * 64, 32) and first.flops == 2 * 2 * 64 * 32 * 27


def test_a_bias_of_a_convolution_is_a_pass_over_its_result(small):
    """But for those that a normalisation adds."""
    index = next(index for index, each in enumerate(small.forward) if each.kind == "convolution")
    bias = small.forward[index + 1]
    assert (bias.kind, bias.launches, bias.bytes) == ("all else", 1, 2 * 2 * 2 * 32 * 64)
    network = build_unet(SMALL)
    left = sum(isinstance(module, (ConvBeforeNorm, ConvBeforeSum)) for module in network.modules())
    skips = sum(isinstance(getattr(module, "skip", None), torch.nn.Conv2d) for module in network.modules())
    convs = sum(isinstance(module, torch.nn.Conv2d) for module in network.modules())
    # The biases of skip connections are in those of the convolutions that they are added to. A bias and a sum stand
    # before each of the two changes of resolution. Two read the table, and one lays the image out.
    assert terms(small.forward)["all else"]["launches"] == convs - left - skips + 2 * 2 + 3


def test_convolutions_are_laid_out_as_on_a_gpu():
    """As tensors with memory are, and their gradients too."""
    for layout in (torch.channels_last, torch.contiguous_format):
        strides = []
        for device in ("cpu", "meta"):
            x = torch.empty(2, 4, 5, 6, device=device).to(memory_format=layout).requires_grad_()
            conv = torch.nn.Conv2d(4, 8, 3, device=device).to(memory_format=layout)
            with CudnnLayouts():
                y = conv(x)
                gradients = torch.autograd.grad(y, (x, *conv.parameters()), torch.empty_like(y))
            strides.append([tensor.stride() for tensor in (y, *gradients)])
        assert strides[0] == strides[1]


def test_a_backward_pass_is_two_forward_ones_and_to_the_input_one(small):
    forward, both, to_input = (
        terms(part)["all"]["flops"] for part in (small.forward, small.with_backward, small.with_input_backward)
    )
    trained = _training_forward()
    assert both == pytest.approx(3 * trained, rel=0.02) and to_input == pytest.approx(2 * forward, rel=0.02)
    assert 0.8 < forward / trained < 0.98  # a frozen call folds its upsampling


def test_a_cycle_has_its_rollout_and_updates(small):
    forward, cycle = (terms(part)["all"]["flops"] for part in (small.forward, cycle_operations(small, 2)))
    assert cycle == pytest.approx((20 + 2 * 2) * forward + (3 + 20 * 3) * _training_forward(), rel=0.02)
    assert len(call_operations(small, 2)) == len(small.forward) + 1


def test_the_report_has_a_table_of_every_batch_and_says_that_nothing_was_measured():
    document = roofline.REPORT.read_text()
    wanted = {f"{what}_{batch}" for what in ("call", "update") for batch in roofline.BATCHES}
    assert set(table_names(document)) == {"summary", *wanted}
    assert "Nothing here was timed" in document
    # 16 images of 12.44 GFLOP each, which is what bench.cluster counts, less what folded upsampling saves.
    (whole,) = [line for line in document.partition("<!-- table call_16 -->")[2].splitlines() if "| all |" in line][:1]
    assert whole.split(" | ")[2] == "185"
