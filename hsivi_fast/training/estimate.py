"""What a run will need, before it is started: memory, and the work of its networks. Counted on the meta device, where tensors have shapes and no bytes."""

import math

import torch

from ..build import in_form_of
from ..nets import build_unet

MIB = 2**20


def estimate_run(config, world_size=1):
    """What a run of a configuration needs, as a flat dict.

    parameters: of one network; forward_flops: floating-point operations of one forward call with one image (products and convolutions);
    training_flops, cycle_flops: of the whole training and of one cycle of `train.f_learning_times` updates, over all processes; evaluations_per_update: forward
    calls with the whole batch that one update of the score network costs on average (a backward counts 2, an input-only one 1);
    *_bytes: on each of `world_size` processes, and their sum. With several processes gradients and optimizer state are divided as `distributed.zero` says (0 without DeepSpeed).
    Activations are those that autograd keeps of one backward with a process's part of the batch, without what a library's convolution takes for itself.
    Raises ValueError as `build_unet`, and where the batch does not divide.
    """
    settings, every, nfe = config.train, config.train.f_learning_times, config.nfe
    parts = world_size * config.distributed.accumulation
    if settings.batch_size % parts:
        raise ValueError(
            f"train.batch_size: {settings.batch_size} does not divide into {parts} parts ({world_size} processes, accumulation {config.distributed.accumulation})"
        )
    with torch.device("meta"):
        network = in_form_of(config, build_unet(config.network))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    flops, saved = _forward_of_one(network)
    event = math.prod(network.event_shape)

    if config.rollout.mode == "pooled":
        trajectories = -(-every * settings.batch_size // (nfe * config.rollout.redraw))
        rolled = trajectories * nfe  # forward calls with one image, a cycle
        pool = trajectories * event * 4 * (nfe + 1 + (nfe if config.rollout.redraw > 1 else 0))
    else:  # at most: a rollout ends at the lowest layer that its batch needs
        rolled, pool = (every + 1) * (nfe - 1) * settings.batch_size + every * settings.batch_size, 0
    # f: forward and backward; the student likewise, and forward and input-only backward of f and the teacher.
    cycle = rolled + settings.batch_size * (3 * every + 3 + 2 * 2)
    cycles = settings.steps / every

    zero = config.distributed.zero if world_size > 1 else 0
    share = lambda stage: 1 / world_size if zero >= stage else 1
    weights = 4 * parameters  # bytes
    memory = {
        "weights_bytes": weights * (2 * share(3) + 1),  # student, score network, teacher
        "gradients_bytes": weights * 2 * share(2),
        "optimizer_bytes": weights
        * 2
        * (3 + (1 if zero else 0))
        * share(1),  # DeepSpeed keeps its own copy of the weights that it updates
        "averages_bytes": weights * 2 * share(3),
        "pool_bytes": pool,
        # The student's update keeps most: its own graph, then f's and the teacher's.
        "activations_bytes": 3 * saved * settings.batch_size // parts,
    }
    memory = {name: round(value) for name, value in memory.items()}
    return {
        "parameters": parameters,
        "forward_flops": flops,
        "cycle_flops": cycle * flops,
        "training_flops": round(cycle * cycles * flops),
        "evaluations_per_update": cycle / every / settings.batch_size,
        "world_size": world_size,
        "samples_per_rank": settings.batch_size // world_size,
        **memory,
        "memory_bytes": sum(memory.values()),
    }


def _forward_of_one(network):
    """(floating-point operations, bytes kept for the backward) of one image in one forward call.

    Two images, halved: a batch of one has layouts of its own.
    """
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.zeros(2, *network.event_shape, device="meta", requires_grad=True)
    t = torch.zeros(2, dtype=torch.int64, device="meta")
    own = {id(parameter) for parameter in network.parameters()}
    kept = {}

    def pack(tensor):
        if (
            id(tensor) not in own and tensor.dim() and tensor.shape[0] == 2
        ):  # a weight is no activation, whatever view of it is kept
            kept[id(tensor.untyped_storage())] = tensor  # held, so that no other storage takes the number
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        network(x, t)
    return counter.get_total_flops() // 2, sum(tensor.numel() * tensor.element_size() for tensor in kept.values()) // 2


def estimate_text(config, world_size=1):
    """The estimate in words, for a terminal."""
    e = estimate_run(config, world_size)
    gib = lambda name: f"{e[name] / MIB:8.1f} MiB"
    return "\n".join(
        [
            f"network          {e['parameters'] / 1e6:.1f} M parameters, {e['forward_flops'] / 1e9:.3g} GFLOP a forward call with one image",
            f"processes        {world_size}, {e['samples_per_rank']} images each of every batch of {config.train.batch_size}",
            "memory           a process, in float32 weights (estimate; a library's workspace comes on top):",
            f"  weights        {gib('weights_bytes')}   student, score network, teacher",
            f"  gradients      {gib('gradients_bytes')}",
            f"  optimizer      {gib('optimizer_bytes')}   Adam with amsgrad"
            + (f", ZeRO {config.distributed.zero}" if world_size > 1 else ""),
            f"  averages       {gib('averages_bytes')}",
            f"  pool           {gib('pool_bytes')}   states of one rollout"
            + ("" if config.rollout.mode == "pooled" else ": none, each is used once"),
            f"  activations    {gib('activations_bytes')}   of the student's update",
            f"  in all         {gib('memory_bytes')}",
            f"work             {e['training_flops']:.3g} FLOP for {config.train.steps} updates; {e['evaluations_per_update']:.2f} forward calls with the batch an update, all counted in",
            f"sampling         {config.nfe * e['forward_flops'] / 1e9:.3g} GFLOP an image",
        ]
    )
