"""What a run will need, before it is started: memory, and the work of its networks.

Counted on the meta device, where tensors have shapes and no bytes.
"""

import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..build import in_form_of
from ..nets import build_unet

MIB = 2**20


def estimate_run(config, world_size=1):
    """What a run of a configuration needs, as a flat dict.

    parameters: of one network.
    forward_flops: floating-point operations of one forward call with one image (products and convolutions).
    cycle_flops, training_flops: of a cycle of `train.f_learning_times` updates and of the whole training, over all
    processes.
    evaluations_per_update: forward calls with the whole batch that one update of the score network costs on average. A
    backward counts 2, an input-only one 1.
    *_bytes: on each of `world_size` processes, and their sum. With several processes gradients and optimizer state are
    divided as `distributed.zero` says (0 without DeepSpeed). Activations are those that autograd keeps of one backward
    with a process's micro-batch, without what a library's convolution takes for itself.

    Raises ValueError as `build_unet`, and where the batch does not divide.
    """
    settings, accumulation = config.train, config.distributed.accumulation
    micro_batches = world_size * accumulation
    if settings.batch_size % micro_batches:
        cut = f"{micro_batches} parts ({world_size} processes, accumulation {accumulation})"
        raise ValueError(f"train.batch_size: {settings.batch_size} does not divide into {cut}")
    with torch.device("meta"):
        network = in_form_of(config, build_unet(config.network))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    flops, activation_bytes = _forward_of_one(network)
    evaluations, pool_bytes = _cycle(config, math.prod(network.event_shape))
    cycles = settings.steps / settings.f_learning_times
    memory = _memory(config, world_size, weight_bytes=4 * parameters)
    memory["pool_bytes"] = pool_bytes
    # The student's update keeps most: its own graph, then f's and the teacher's.
    memory["activations_bytes"] = 3 * activation_bytes * settings.batch_size // micro_batches
    return {
        "parameters": parameters,
        "forward_flops": flops,
        "cycle_flops": evaluations * flops,
        "training_flops": round(evaluations * cycles * flops),
        "evaluations_per_update": evaluations / settings.f_learning_times / settings.batch_size,
        "world_size": world_size,
        "samples_per_rank": settings.batch_size // world_size,
        **memory,
        "memory_bytes": sum(memory.values()),
    }


def _cycle(config, event_size):
    """(forward calls with one image in one cycle, bytes of its pool)."""
    batch_size, updates, nfe = config.train.batch_size, config.train.f_learning_times, config.nfe
    if config.rollout.mode == "pooled":
        trajectories = -(-updates * batch_size // (nfe * config.rollout.redraw))
        rolled = trajectories * nfe
        kept = nfe + 1 + (nfe if config.rollout.redraw > 1 else 0)  # states, and means where they are used again
        pool_bytes = trajectories * event_size * 4 * kept
    else:  # at most: a rollout ends at the lowest layer that its batch needs
        rolled, pool_bytes = (updates + 1) * (nfe - 1) * batch_size + updates * batch_size, 0
    # f: forward and backward; the student likewise, and forward and input-only backward of f and the teacher.
    return rolled + batch_size * (3 * updates + 3 + 2 * 2), pool_bytes


def _memory(config, world_size, weight_bytes):
    """Bytes on each process that depend on the weights alone; weight_bytes: of one network in float32."""
    zero = config.distributed.zero if world_size > 1 else 0

    def share(stage):
        return 1 / world_size if zero >= stage else 1

    moments = 3 + (1 if zero else 0)  # DeepSpeed keeps its own copy of the weights that it updates
    memory = {
        "weights_bytes": weight_bytes * (2 * share(3) + 1),  # student, score network, teacher
        "gradients_bytes": weight_bytes * 2 * share(2),
        "optimizer_bytes": weight_bytes * 2 * moments * share(1),
        "averages_bytes": weight_bytes * 2 * share(3),
    }
    return {name: round(value) for name, value in memory.items()}


def _forward_of_one(network):
    """(floating-point operations, bytes kept for the backward) of one image in one forward call.

    Two images, halved: a batch of one has layouts of its own.
    """
    x = torch.zeros(2, *network.event_shape, device="meta", requires_grad=True)
    t = torch.zeros(2, dtype=torch.int64, device="meta")
    weights = {id(parameter) for parameter in network.parameters()}
    kept = {}

    def pack(tensor):
        # A weight is no activation, whatever view of it is kept.
        if id(tensor) not in weights and tensor.dim() and tensor.shape[0] == 2:
            kept[id(tensor.untyped_storage())] = tensor  # held, so that no other storage takes the number
        return tensor

    def unpack(tensor):
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        network(x, t)
    kept_bytes = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    return counter.get_total_flops() // 2, kept_bytes // 2


def estimate_text(config, world_size=1):
    """The estimate in words, for a terminal."""
    e = estimate_run(config, world_size)
    batch_size, steps = config.train.batch_size, config.train.steps
    rows = {
        "weights": "student, score network, teacher",
        "gradients": "",
        "optimizer": "Adam with amsgrad" + (f", ZeRO {config.distributed.zero}" if world_size > 1 else ""),
        "averages": "",
        "pool": "states of one rollout" + ("" if config.rollout.mode == "pooled" else ": none, each is used once"),
        "activations": "of the student's update",
    }
    memory = [f"  {name:<14} {e[f'{name}_bytes'] / MIB:8.1f} MiB   {what}".rstrip() for name, what in rows.items()]
    lines = [
        f"network          {e['parameters'] / 1e6:.1f} M parameters, "
        f"{e['forward_flops'] / 1e9:.3g} GFLOP a forward call with one image",
        f"processes        {world_size}, {e['samples_per_rank']} images each of every batch of {batch_size}",
        "memory           a process, in float32 weights (estimate; a library's workspace comes on top):",
        *memory,
        f"  in all         {e['memory_bytes'] / MIB:8.1f} MiB",
        f"work             {e['training_flops']:.3g} FLOP for {steps} updates; "
        f"{e['evaluations_per_update']:.2f} forward calls with the batch an update, all counted in",
        f"sampling         {config.nfe * e['forward_flops'] / 1e9:.3g} GFLOP an image",
    ]
    return "\n".join(lines)
