"""What a CPU cannot hold: the recommended way to run on a GPU, libraries of several processes, and a second GPU.

The first test runs without a GPU too, where graphs record operators and nothing is compiled.
"""

import dataclasses

import pytest
import torch
from operator_recording import OperatorRecording
from ranks import run_ranks
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.ops import joined_cases, method_cases, norm_cases
from hsivi_fast import load_config, ops, train
from hsivi_fast.build import build_context, build_score_net, build_student, in_form_of
from hsivi_fast.execution import EAGER, WARM_UP, CudaRecording, Execution, GraphedCall
from hsivi_fast.kernels import group_norm_silu as norm
from hsivi_fast.nets import build_unet
from hsivi_fast.nets.blocks import pixel_attention
from hsivi_fast.parallel.world import ALONE, meet_alone
from hsivi_fast.sampling.sampler import Sampler
from hsivi_fast.training.rollout import build_rollout
from hsivi_fast.training.updates import Updates
from hsivi_fast.training.zero import build_engine

# Three levels, so two convolutions of stride 2, with attention; of digits' shape.
NETWORK = ["network.name=digits", "network.channels=8"]
# Half of it, where the plain formulas of every operation are compiled too, which takes minutes.
SMALLER = ["network.multipliers=[1,2]", "network.attention=[false,true]", "network.res_blocks=0"]
RUN = ["train.batch_size=8", "train.f_learning_times=3", "precision=bf16", "channels_last=true"]
RUN += ["nfe=2", "spacing=quad", "eval.num_samples=0"]
SHORT = ["train.batch_size=4", "train.steps=4", "log_every=2", "device=cuda"]


def _losses(execution, device, settings):
    """Losses of 15 steps of a run, in which every call is replayed, and samples of the student after them."""
    config = load_config("digits", [*NETWORK, *RUN, f"device={device}", *settings])
    torch.manual_seed(0)
    teacher = in_form_of(config, build_unet(config.network)).to(device).eval().requires_grad_(False)
    context = dataclasses.replace(build_context(config, ALONE).with_teacher(teacher), execution=execution)
    student, score_net = (build_engine(context, build(context)) for build in (build_student, build_score_net))
    rollout, updates, losses = build_rollout(context, student.network), Updates(context, student, score_net), []
    rollout.start_cycle(0)
    for step in range(1, 16):
        if step % 3 == 0:
            losses.append(updates.student(rollout.student_batch(step), 1e-4)[0].mean())
            rollout.start_cycle(step // 3)
        losses.append(updates.score_net(rollout.score_net_batch(step), 1e-4)[0].mean())
    network = student.network.requires_grad_(False)
    sampler = Sampler(network, context.layers, network.log_scaled_gamma, execution)
    return torch.stack(losses), sampler(range(16 * (WARM_UP + 2)), 16)


@pytest.mark.parametrize(
    "device, compile, recording, settings",
    [
        pytest.param("cpu", False, OperatorRecording, ["backend=torch"], id="cpu"),
        pytest.param("cuda", True, CudaRecording, ["backend=triton"], id="cuda", marks=pytest.mark.gpu),
        pytest.param("cuda", True, CudaRecording, ["backend=torch", *SMALLER], id="cuda-torch", marks=pytest.mark.gpu),
    ],
)
def test_the_recommended_way_is_the_eager_one(device, compile, recording, settings):
    """bfloat16, channels_last, compiled, recorded; against eager calls in bfloat16, up to its rounding: compiled code
    rounds at other places.
    """
    losses, samples = _losses(Execution(device, compile, True, recording), device, settings)
    expected, eager = _losses(EAGER, device, settings)
    assert float((losses - expected).norm() / expected.norm()) < (0.05 if compile else 1e-3)
    # The way down amplifies rounding. How much depends on the machine: 0.002 and 0.004 were seen on two CPUs.
    assert float((samples - eager).norm() / eager.norm()) < (0.1 if compile else 0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_attention_is_one_kernel(layout):
    """Torch raises where none but its plain products would do."""
    images = torch.randn(2, 3 * 64, 16, 16, device="cuda", dtype=torch.bfloat16).to(memory_format=layout)
    qkv = images.unflatten(1, (3, 1, 64)).flatten(4).transpose(0, 1)  # [3, B, heads, d, N]
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        ours = pixel_attention(qkv)
    with sdpa_kernel(SDPBackend.MATH):
        plain = pixel_attention(qkv.float())
    assert float((ours.float() - plain).abs().max()) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_that_begin_between_16_bytes_give_the_same(dtype):
    """Eager, and in a graph that was recorded for a tensor which begins at 16 bytes."""
    memory = torch.randn(4 * 8 * 8 * 8 + 1, device="cuda").to(dtype)
    inputs = [memory[start : start + 4 * 8 * 8 * 8].view(4, 8, 8, 8) for start in (0, 1)]
    weight, bias = torch.randn(2, 8, device="cuda")

    def normalised(x):
        return norm.group_norm_silu(x, 2, weight, bias, 1e-5, True, None, None, None)[0]

    table, k = torch.tensor([0.0, 0.5, 2.0], device="cuda"), torch.tensor([1, 2, 1, 2], device="cuda")

    def stepped(x):
        return ops.affine_step(x, x, table, table, k, backend="triton")

    for function in (normalised, stepped):
        expected = [function(x.clone()) for x in inputs]
        assert all(torch.equal(function(x), wanted) for x, wanted in zip(inputs, expected))
        call = GraphedCall(function, CudaRecording("cuda"))
        for number in range(WARM_UP + 3):
            assert torch.equal(call(inputs[number % 2]), expected[number % 2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_operations_at_real_sizes_are_as_in_float64(dtype):
    """What a compiler makes of a kernel depends on its tile, so the tiles are those of CIFAR-10's network."""
    device, cases = torch.device("cuda"), []
    for layout in (torch.contiguous_format, torch.channels_last):
        for batch, per_pixel in ((128, True), (32, False)):
            cases += method_cases(device, (3, 32, 32), batch, dtype, per_pixel, layout)
    for size, channels in ((32, 128), (32, 384), (16, 256), (8, 512), (4, 256)):
        cases += norm_cases(device, size, channels, 32, 8, dtype, False, True, True)
    cases += joined_cases(device, 16, 256, 128, 32, 8, dtype, True)
    for case in cases:
        case.check()


def nccl_of_one():
    """(the backend, what its sum gives) in a group of one process."""
    device = torch.device("cuda", 0)
    meet_alone(device)
    value = torch.arange(4.0, device=device)
    torch.distributed.all_reduce(value)
    return torch.distributed.get_backend(), value.tolist()


@pytest.mark.gpu
def test_nccl_starts():
    (result,) = run_ranks(nccl_of_one, 1, on_gpus=True)
    assert result == ("nccl", [0.0, 1.0, 2.0, 3.0])


def losses_of_a_short_run(folder, settings):
    """The losses of the score network by log step; those of rank 0's folder on every rank."""
    return [record["loss_score_net"] for record in train(load_config("smoke", [*SHORT, *settings]), folder).metrics()]


@pytest.mark.gpu
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_deepspeed_on_a_gpu_is_the_plain_engine(zero, tmp_path):
    pytest.importorskip("deepspeed")
    settings = ["distributed.engine=deepspeed", f"distributed.zero={zero}"]
    (expected,) = run_ranks(losses_of_a_short_run, 1, tmp_path / "plain", [], on_gpus=True)
    (losses,) = run_ranks(losses_of_a_short_run, 1, tmp_path / "deepspeed", settings, on_gpus=True)
    assert losses == pytest.approx(expected, rel=1e-4)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.gpu
@two_gpus
def test_two_ranks_by_nccl_are_one(tmp_path):
    pytest.importorskip("deepspeed")
    (expected,) = run_ranks(losses_of_a_short_run, 1, tmp_path / "one", [], on_gpus=True)
    for losses in run_ranks(losses_of_a_short_run, 2, tmp_path / "two", [], on_gpus=True):
        assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.gpu
@two_gpus
def test_a_run_on_the_second_gpu_is_that_on_the_first(no_report, tmp_path):
    """While the first one is the current one."""
    torch.cuda.set_device(0)
    runs = []
    for device in ("cuda:0", "cuda:1"):
        settings = [*SHORT, f"device={device}", "cuda_graphs=true", "train.steps=8"]
        runs.append(train(load_config("smoke", settings), tmp_path / device).metrics())
    torch.cuda.set_device(0)
    assert [record["loss_score_net"] for record in runs[1]] == pytest.approx(
        [record["loss_score_net"] for record in runs[0]], rel=1e-5
    )
