"""What a run will need, before it is started: memory, and the work of its networks.

Counted on the meta device, where tensors have shapes and no bytes. `check_memory` and `check_disk` compare it with the
machine, before anything is allocated or written.
"""

import math

import torch

from ..config import phases_of
from ..nets import build_unet
from ..nets.prepared import Prepared
from ..parallel.machine import memory_of, refuse_beyond_disk, refuse_beyond_memory
from .start import parts_of, path_knots

MIB = 2**20

# The share of the estimated activations that counts when a run is refused: an estimate must not forbid what runs, and a
# compiler keeps fewer than autograd does. CIFAR-10's and CelebA-64's networks took 0.8 to 1 of it on a CPU.
SURELY_KEPT = {"eager": 0.75, "compiled": 0.4}
CHECKPOINT_WEIGHTS = 10  # copies of the weights in a checkpoint: of two networks weights, averages, three moments


def estimate_run(config, world_size=1):
    """What a run of a configuration needs, as a flat dict.

    parameters: of one network.
    forward_flops: floating-point operations of one forward call with one image (products and convolutions).
    cycle_flops, start_flops, training_flops: of a cycle of `train.f_learning_times` updates, of the start with its
    paths and the score network's head start, and of the whole training, over all processes.
    evaluations_per_update: forward calls with the whole batch that one update of the score network costs on average. A
    backward counts 2, an input-only one 1.
    event_size: numbers of one image or point.
    *_bytes: on each of `world_size` processes, and their sum. With several processes gradients and optimizer state are
    divided as `distributed.zero` says (0 without DeepSpeed). Activations are those that autograd keeps of one backward
    with a process's micro-batch in float32, without what a library's convolution takes for itself. noise_scale_bytes:
    log_gamma with its gradient, moments and average.

    Raises ValueError as `build_unet`, and where the batch does not divide.
    """
    settings, accumulation = config.train, config.distributed.accumulation
    micro_batches = world_size * accumulation
    if settings.batch_size % micro_batches:
        cut = f"{micro_batches} parts ({world_size} processes, accumulation {accumulation})"
        raise ValueError(f"train.batch_size: {settings.batch_size} does not divide into {cut}")
    parameters, prepared_bytes, flops, activation_bytes, event_size = _network_needs(config)
    evaluations, pool_bytes = _cycle(config, event_size)
    cycles = settings.steps / settings.f_learning_times
    memory = _memory(config, world_size, weight_bytes=4 * parameters, prepared_bytes=prepared_bytes)
    memory["noise_scale_bytes"] = 6 * 4 * _noise_scale_size(config, event_size)
    memory["pool_bytes"] = pool_bytes
    memory["paths_bytes"] = _path_bytes(config, event_size, world_size)
    phases = phases_of(config)
    start = _start_evaluations(config, event_size, phases.start, phases.head)
    # The student's update keeps most: its own graph, then f's and the teacher's.
    memory["activations_bytes"] = 3 * activation_bytes * settings.batch_size // micro_batches
    return {
        "parameters": parameters,
        "event_size": event_size,
        "forward_flops": flops,
        "cycle_flops": evaluations * flops,
        "training_flops": round((evaluations * cycles + start) * flops),
        "start_flops": start * flops,
        "evaluations_per_update": evaluations / settings.f_learning_times / settings.batch_size,
        "world_size": world_size,
        "samples_per_rank": settings.batch_size // world_size,
        **memory,
        "memory_bytes": sum(memory.values()),
    }


def _network_needs(config):
    """(parameters, bytes of a `Prepared` copy, operations of a forward call with one image, bytes that it keeps,
    numbers of an image).
    """
    with torch.device("meta"):
        network = build_unet(config.network)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    of_forward = _forward_of_one(network)  # in float32: no autocast knows the meta device
    network.precision = config.precision
    return parameters, Prepared(network).own_bytes, *of_forward, math.prod(network.event_shape)


def _path_bytes(config, event_size, world_size):
    """Of the teacher's paths that are held at once."""
    if phases_of(config).start == 0:
        return 0
    if config.target is not None:
        count = config.start.trajectories
        paired = 16 * count**2 if event_size > 1 else 0  # distances of all pairs, in float32 and in float64
        return 2 * config.nfe * count * event_size * 4 + paired
    path_knots(config)  # refuses a top that cannot be
    held = parts_of(config, event_size)[1] * (config.nfe + 1) * event_size * 4
    return held if world_size == 1 else held + held // world_size  # and what a process rolls of it


def evaluations_until(config, step):
    """Forward calls with one image that a run has made by this step of its one counter, as `estimate_run` counts."""
    *_, event_size = _network_needs(config)
    phases = phases_of(config)
    updates = min(step, phases.start)
    head = min(step - updates, phases.head)
    cycle, _ = _cycle(config, event_size)
    cycles = (step - updates - head) / config.train.f_learning_times
    return round(_start_evaluations(config, event_size, updates, head) + cycle * cycles)


def gradient_evaluations(config, bridge):
    """Of the target's gradient, in a whole run: of its bridge, and of the score network's and the student's updates.

    The score network has the auxiliary score in it. In an update of the student that and the teacher's are called, and
    each is pulled back, which counts as another evaluation.
    """
    phases, settings = phases_of(config), config.train
    of_student = (phases.head + phases.train) // settings.f_learning_times - phases.head // settings.f_learning_times
    rows = 2 * phases.head + phases.train + 4 * of_student
    return bridge.evaluations + rows * settings.batch_size


def _start_evaluations(config, event_size, updates, head):
    """Of so many updates of the start, with their paths, and of the score network's head start after it."""
    settings, evaluations = config.start, 0
    if updates:
        if config.target is None:  # a bridge is found by calls of its target, and of no network
            parts, count = parts_of(config, event_size)
            rolled = -(-updates * parts // settings.updates)
            evaluations = rolled * count * config.nfe * settings.substeps * _calls_of_teacher(config)
        evaluations += 3 * updates * (settings.batch_size or config.train.batch_size)
    # Of the head start: as a cycle, without the student's update and with one call of the teacher.
    cycle, _ = _cycle(config, event_size)
    batch_size = config.train.batch_size
    of_student = _of_student_update(config) * batch_size
    of_teacher = _calls_of_teacher(config) * batch_size
    return evaluations + round(head * ((cycle - of_student) / config.train.f_learning_times + of_teacher))


def _noise_scale_size(config, event_size):
    return (config.nfe if config.gamma.per_step else 1) * (event_size if config.gamma.per_pixel else 1)


def check_memory(config, world_size, device):
    """ValueError, in one line, where a run needs more than all the memory of the device that a process trains on.

    It names what takes most and what to lower.
    """
    if _is_small(config, config.train.batch_size, config.train.f_learning_times, device):
        return
    e = estimate_run(config, world_size)
    needs = {key: e[key] for key in e if key.endswith("_bytes") and key != "memory_bytes"}
    needs["activations_bytes"] = _surely_kept(config, e["activations_bytes"])
    settings = config.train
    largest = max(needs, key=needs.get)
    what, advice = {
        "activations_bytes": (
            f"train.batch_size: {settings.batch_size}",
            "lower it or the network's sizes, raise distributed.accumulation, or start more processes",
        ),
        "paths_bytes": (
            f"start.trajectories: {config.start.trajectories} over nfe {config.nfe}",
            "lower it, or start more processes",
        ),
        "pool_bytes": (
            f"train.f_learning_times: {settings.f_learning_times} with train.batch_size {settings.batch_size}",
            "lower one of them, or choose rollout.mode=fresh",
        ),
        "noise_scale_bytes": (f"nfe: {config.nfe} with gamma.per_step", "lower it, or choose gamma.per_pixel=false"),
    }.get(largest, (f"network: {e['parameters']} parameters", "lower network.channels or network.res_blocks"))
    refuse_beyond_memory(what, sum(needs.values()), device, advice)


def check_teacher_memory(config, device):
    """`check_memory` of a teacher's training."""
    if _is_small(config, config.teacher_train.batch_size, 1, device):
        return
    parameters, _, _, activation_bytes, _ = _network_needs(config)
    batch_size = config.teacher_train.batch_size
    weights, activations = 6 * 4 * parameters, _surely_kept(config, activation_bytes * batch_size)
    what, advice = f"teacher_train.batch_size: {batch_size}", "lower it or the network's sizes"
    if weights > activations:
        what, advice = f"network: {parameters} parameters", "lower network.channels or network.res_blocks"
    refuse_beyond_memory(what, weights + activations, device, advice)


def _is_small(config, batch_size, updates, device):
    """Whether a run fits in any case, by a bound that needs no forward call: the first one on the meta device takes
    torch a second, which a small run need not wait for.
    """
    with torch.device("meta"):
        network = build_unet(config.network)
    modules = sum(1 for _ in network.modules())
    event_size, pixels = math.prod(network.event_shape), math.prod(network.event_shape[1:])
    widest = 2 * max(parameter.shape[0] for parameter in network.parameters())  # two are joined on the way up
    heads = getattr(config.network, "heads", None) or 4
    activations = 3 * batch_size * modules * max(widest * pixels, heads * pixels**2)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    pool = (updates * batch_size + config.nfe) * 2 * (event_size + 1) * (
        1 + 1 / config.nfe
    ) + config.nfe * event_size * 4
    noise_scale = 6 * _noise_scale_size(config, event_size)
    paths = _path_bytes(config, event_size, 1) // 4
    return 4 * (activations + 19 * parameters + pool + paths + noise_scale) < memory_of(device)


def _surely_kept(config, activation_bytes):
    share = SURELY_KEPT["compiled" if config.compile else "eager"] * (0.5 if config.precision == "bf16" else 1)
    return round(activation_bytes * share)


def check_disk(config, path):
    """ValueError, in one line, where not even the first checkpoint of a run has room on the disk of `path`."""
    with torch.device("meta"):
        network = build_unet(config.network)
    parameters, event_size = sum(p.numel() for p in network.parameters()), math.prod(network.event_shape)
    size = 4 * (CHECKPOINT_WEIGHTS * parameters + CHECKPOINT_WEIGHTS // 2 * _noise_scale_size(config, event_size))
    refuse_beyond_disk(f"outdir {str(path)!r}: one checkpoint", size, path, "make room, or choose another --outdir")


def _cycle(config, event_size):
    """(forward calls with one image in one cycle, bytes of its pool)."""
    batch_size, updates, nfe = config.train.batch_size, config.train.f_learning_times, config.nfe
    if config.rollout.mode == "pooled":
        trajectories = -(-updates * batch_size // (nfe * config.rollout.redraw))
        rolled = trajectories * nfe
        uses_means = config.rollout.redraw > 1 or config.objective.match == "windows"
        kept = nfe + 1 + (nfe if uses_means else 0)  # states, and means where they are noised anew
        transitions = trajectories * nfe * config.rollout.redraw
        pool_bytes = trajectories * event_size * 4 * kept + 8 * transitions  # with the order that they are taken in
    else:  # at most: a rollout ends at the lowest layer that its batch needs
        rolled, pool_bytes = (updates + 1) * (nfe - 1) * batch_size + updates * batch_size, 0
    # f: forward and backward; the student likewise, and forward and input-only backward of f and the teacher.
    return rolled + batch_size * (3 * updates + _of_student_update(config)), pool_bytes


def _of_student_update(config):
    """Forward calls with one image in an update of the student."""
    return 3 + 2 + 2 * _calls_of_teacher(config)


def _calls_of_teacher(config):
    """Calls of its network for one noise: a guided teacher makes two, see `GuidedTeacher`."""
    return 1 if config.teacher.guidance is None else 2


def _memory(config, world_size, weight_bytes, prepared_bytes):
    """Bytes on each process that depend on the weights alone.

    weight_bytes: of one network in float32; prepared_bytes: of the weights that a `Prepared` copy has for itself.
    """
    zero = config.distributed.zero if world_size > 1 else 0

    def share(stage):
        return 1 / world_size if zero >= stage else 1

    moments = 3 + (1 if zero else 0)  # DeepSpeed keeps its own copy of the weights that it updates
    memory = {
        "weights_bytes": weight_bytes * (2 * share(3) + 1),  # student, score network, teacher
        "gradients_bytes": weight_bytes * 2 * share(2),
        "optimizer_bytes": weight_bytes * 2 * moments * share(1),
        "averages_bytes": weight_bytes * 2 * share(3),
        "prepared_bytes": prepared_bytes * (1 if zero == 3 else 3),  # the teacher, and what no process has in pieces
    }
    return {name: round(value) for name, value in memory.items()}


def _forward_of_one(network):
    """(floating-point operations, bytes kept for the backward) of one image in one forward call.

    Two images, halved: a batch of one has layouts of its own.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here: a training imports this module, and rarely counts

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


def _parts_text(config, event_size):
    if not phases_of(config).start:
        return "for a start: none"
    parts, count = parts_of(config, event_size)
    return f"for the start: {parts * count} trajectories" + (f" in {parts} parts" if parts > 1 else "")


def estimate_text(config, world_size=1):
    """The estimate in words, for a terminal."""
    e = estimate_run(config, world_size)
    batch_size, steps = config.train.batch_size, config.train.steps
    rows = {
        "weights": "student, score network, teacher",
        "gradients": "",
        "optimizer": "Adam with amsgrad" + (f", ZeRO {config.distributed.zero}" if world_size > 1 else ""),
        "averages": "",
        "prepared": "weights ready for calls without their gradients",
        "noise_scale": "log_gamma",
        "pool": "states of one rollout" + ("" if config.rollout.mode == "pooled" else ": none, each is used once"),
        "paths": f"of the teacher, {_parts_text(config, e['event_size'])}",
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
        f"  the start      {e['start_flops']:.3g} FLOP of it",
        f"sampling         {config.nfe * e['forward_flops'] / 1e9:.3g} GFLOP an image",
    ]
    return "\n".join(lines)
