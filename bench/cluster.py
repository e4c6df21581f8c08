"""A model of a training cycle on many GPUs: computed from counted work and from data sheets. Nothing was measured.

    python -m bench.cluster        prints the tables and fills them into bench/scaling.md

A cycle is `F_LEARNING_TIMES` updates of the score network and one of the student, on a pool that the ranks roll in
equal shares and gather (`pooled`, redraw 1).

* Counted, on tensors without memory: floating-point operations of matrix products and convolutions, parameters, the
  size of an event.
* Known from the code: which collectives a cycle has and what they carry.
* From data sheets: the rates of an H100 and its links.
* Assumed: the share of the peak rate that the networks reach.

A collective over W ranks takes a latency for each of its calls and the time in which a ring sends its bytes: (W-1)/W of
the tensor for a reduce-scatter or an all-gather, twice that for an all-reduce (Thakur, Rabenseifner and Gropp 2005; for
the ZeRO stages Rajbhandari et al. 2020, arXiv 1910.02054, section 7).
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench.measure import counted_flops
from bench.options import command_line
from bench.tables import filled, markdown, table_names
from hsivi_fast.nets import build_unet

REPORT = Path(__file__).resolve().parent / "scaling.md"
GPUS = (8, 64, 512)
F_LEARNING_TIMES, NFE, CHUNK = 20, 10, 4096  # f_learning_times and K of the published runs; rollout.chunk's default
FLOAT = 4  # bytes: weights, gradients and the pool are float32 in every precision of a run
# network -> (samples a GPU, batch) of the published settings
PUBLISHED = {"cifar10": (16, 128), "celeba64": (16, 128), "imagenet64": (32, 2048)}
POOL_LIMIT = 10e9  # bytes of pool on every GPU that the report calls too many; a choice, as are the next two
LARGEST_SHARE = 0.2  # of a cycle that communication may take where a batch is recommended
NEAR = 0.05  # stages whose times differ by less than this are called equal: the model knows no better


@dataclass(frozen=True)
class Cluster:
    """The machines: rates per second, bytes, seconds. One number, one source."""

    node: int = 8  # GPUs; DGX H100 and HGX H100
    bf16: float = 989e12  # operations, dense (half of the 1,979 with sparsity); NVIDIA H100 data sheet, SXM
    tf32: float = 495e12  # operations, dense (half of the 989 with sparsity); the same
    precision: str = "bf16"  # which of the two rates is used
    # Share of that rate which the networks reach. ASSUMED: nothing of this project has been timed on a GPU.
    utilisation: float = 0.30
    memory: float = 80e9  # bytes; NVIDIA H100 data sheet, SXM
    memory_bandwidth: float = 3.35e12  # bytes; the same. Optimizer and average are taken to run at all of it
    nvlink: float = 450e9  # bytes in one direction (900 GB/s in both); the same, NVLink 4
    nic: float = 50e9  # bytes in one direction; 400 Gb/s, one ConnectX-7 a GPU; NVIDIA DGX H100 data sheet
    # NICs of a node that leave at once with a rank's bytes: from 1, a single ring (pessimistic), up to `node`, a ring
    # through each (what NCCL tries).
    rails: int = 1
    # Latencies in seconds: NCCL's own tuning constants, protocol Simple, as torch/_inductor/comm_analysis.py (torch
    # 2.14) has them: `baseLat`, `hwLat`.
    start: float = 8.4e-6
    ring_step_nvlink: float = 3.4e-6
    tree_step_nvlink: float = 4.0e-6
    step_network: float = 14.0e-6
    # Elements, deepspeed/runtime/zero/config.py: `reduce_bucket_size` and `stage3_prefetch_bucket_size`.
    bucket: int = 500_000_000
    prefetch: int = 50_000_000

    def rate(self):
        """Operations per second that a network is taken to reach."""
        return self.utilisation * getattr(self, self.precision)

    def nodes(self, world_size):
        """Machines of so many GPUs."""
        return -(-world_size // self.node)

    def bandwidth(self, world_size):
        """Bytes per second that a rank of a ring sends: NVLink's within a node, beyond it what goes through NICs."""
        return self.nvlink if self.nodes(world_size) == 1 else min(self.nvlink, self.rails * self.nic)

    def latency(self, operation, world_size):
        """Seconds of one collective beside its bytes, as NCCL estimates them.

        They are a ring's steps; for an all-reduce a tree's, where they are fewer.
        """
        if world_size == 1:
            return 0.0
        nodes, rounds = self.nodes(world_size), 2 if operation == "all_reduce" else 1
        between = rounds * (nodes - 1)
        ring = (rounds * (world_size - 1) - between) * self.ring_step_nvlink + between * self.step_network
        tree = 2 * ((world_size / nodes - 1) * self.tree_step_nvlink + math.log2(nodes) * self.step_network)
        return self.start + (min(ring, tree) if operation == "all_reduce" else ring)


H100 = Cluster()


# ---- what is sent ----------------------------------------------------------------------------------------------------

# `reduces` is one reduce for each rank's part of the gradients, one after the other: how DeepSpeed can send no more
# than a reduce-scatter in ZeRO 1 and 2.
TIMES_THE_TENSOR = {"all_reduce": 2, "reduce_scatter": 1, "reduces": 1, "all_gather": 1, "all_to_all": 1}


@dataclass(frozen=True)
class Collective:
    """One kind of collective of a cycle: `times` operations on `floats` float32 numbers, each in `calls` calls.

    At best it is hidden behind a pass.
    """

    kind: str  # gradients, parameters or pool
    operation: str  # of TIMES_THE_TENSOR
    floats: int
    times: int = 1
    calls: int = 1
    behind: str | None = None  # of Case.passes

    def sent(self, world_size):
        """Bytes that each rank sends in a cycle."""
        return self.times * TIMES_THE_TENSOR[self.operation] * (world_size - 1) / world_size * FLOAT * self.floats

    def seconds(self, world_size, cluster):
        """Seconds in a cycle."""
        waiting = self.times * self.calls * cluster.latency(self.operation, world_size)
        return waiting + self.sent(world_size) / cluster.bandwidth(world_size)


def collectives(
    parameters_student,
    parameters_score_net,
    pool_floats,
    world_size,
    zero,
    f_learning_times,
    accumulation=1,
    rollout_calls=NFE,
    reduction="reduce_scatter",
    cluster=H100,
):
    """The collectives of a cycle, as a list.

    parameters_*: how many parameters; pool_floats: numbers in the whole pool; zero: DeepSpeed's stage.
    accumulation: micro-batches an update; rollout_calls: calls of the student that a rank makes for its share of the
    pool.
    reduction: how ZeRO 1 and 2 average gradients, `reduce_scatter`, or what DeepSpeed has in its place
    (deepspeed/runtime/zero/stage_1_and_2.py, `average_tensor`): `all_reduce` of whole buckets, its default, or
    `reduces`, with use_multi_rank_bucket_allreduce off.
    """
    found = []
    reduction = {0: "all_reduce", 3: "reduce_scatter"}.get(zero, reduction)
    for name, parameters, updates in (
        ("student", parameters_student, 1),
        ("score_net", parameters_score_net, f_learning_times),
    ):
        buckets, fetches = (-(-parameters // size) for size in (cluster.bucket, cluster.prefetch))
        # ZeRO 2 and 3 keep no whole gradient, so they average each micro-batch's.
        reductions = updates * (accumulation if zero >= 2 else 1)
        calls = buckets * (world_size if reduction == "reduces" else 1)
        found.append(Collective("gradients", reduction, parameters, reductions, calls, f"{name} backward"))
        if zero in (1, 2):  # after the step, before anything can use them
            found.append(Collective("parameters", "all_gather", parameters, updates))
        if zero == 3:
            passes = [(f"{name} forward", updates * accumulation), (f"{name} backward", updates * accumulation)]
            # Of the student in the rollout, and of the score network in the student's update. The teacher is whole
            # everywhere.
            if name == "student":
                passes.append(("rollout", rollout_calls))
            else:
                passes += [("frozen forward", accumulation), ("frozen backward", accumulation)]
            for behind, times in passes:
                found.append(Collective("parameters", "all_gather", parameters, times, fetches, behind))
    found.append(Collective("pool", "all_gather", pool_floats))
    return found


def sent_per_cycle(
    parameters_student,
    parameters_score_net,
    pool_floats,
    world_size,
    zero,
    f_learning_times,
    accumulation=1,
    rollout_calls=NFE,
    reduction="reduce_scatter",
):
    """Bytes that each rank sends in a cycle with ring algorithms, {"gradients", "parameters", "pool"}.

    The arguments are those of `collectives`.
    """
    sent = dict.fromkeys(("gradients", "parameters", "pool"), 0.0)
    for each in collectives(
        parameters_student,
        parameters_score_net,
        pool_floats,
        world_size,
        zero,
        f_learning_times,
        accumulation,
        rollout_calls,
        reduction,
    ):
        sent[each.kind] += each.sent(world_size)
    return sent


# ---- what is computed and kept ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """What was counted of a network, for one sample.

    forward_flops: operations of a forward; with_backward, with_input_backward: in forwards, those of one with its
    backward, and with an input-only backward.
    """

    name: str
    forward_flops: int
    parameters: int
    event: int  # floats of an image
    with_backward: float
    with_input_backward: float

    @property
    def student_parameters(self):
        """The network's and log_gamma's, one a pixel and shared by the layers, as published."""
        return self.parameters + self.event


def counted(name):
    """The `Network` of a name of `nets.NETWORKS`, counted on tensors without memory."""
    with torch.device("meta"):
        network = build_unet(name)
        x = torch.empty(1, *network.event_shape, requires_grad=True)  # [1, *event]
        t = torch.zeros(1, dtype=torch.int64)  # [1]
    forward = counted_flops(lambda: network(x, t))
    with_backward = counted_flops(lambda: network(x.detach(), t).sum().backward())
    network.requires_grad_(False)
    with_input_backward = counted_flops(lambda: torch.autograd.grad(network(x, t).sum(), x))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Network(name, forward, parameters, x.numel(), with_backward / forward, with_input_backward / forward)


@dataclass(frozen=True)
class Case:
    """A network's training on `gpus` GPUs with `samples` of each update's batch on each."""

    network: Network
    gpus: int
    samples: int

    @property
    def batch(self):
        return self.gpus * self.samples

    @property
    def trajectories(self):
        """How many a GPU rolls: ceil(f_learning_times B / K), split and filled up to equal shares."""
        return -(-math.ceil(F_LEARNING_TIMES * self.batch / NFE) // self.gpus)

    @property
    def pool_floats(self):
        """Numbers in the whole pool: K + 1 states of each trajectory."""
        return (NFE + 1) * self.gpus * self.trajectories * self.network.event

    @property
    def own_floats(self):
        """Numbers of the samples that a GPU's own updates take from the pool in a cycle."""
        return (F_LEARNING_TIMES + 1) * self.samples * self.network.event

    def passes(self):
        """{pass: its work on a GPU in a cycle, in forwards of one sample}.

        A backward is two forwards, one to the input alone is one.
        """
        return {
            "rollout": NFE * self.trajectories,
            "student forward": self.samples,
            "frozen forward": 2 * self.samples,
            "frozen backward": 2 * self.samples,
            "student backward": 2 * self.samples,
            "score_net forward": F_LEARNING_TIMES * self.samples,
            "score_net backward": 2 * F_LEARNING_TIMES * self.samples,
        }

    @property
    def rollout_calls(self):
        """Calls of the student that a GPU makes for its share of the pool."""
        return NFE * -(-self.trajectories // CHUNK)

    def collectives(self, zero, reduction="reduce_scatter", spread=False, cluster=H100):
        """Those of a cycle, without accumulation.

        spread: each GPU is sent only its own samples of the pool, which is not built.
        """
        found = collectives(*self._numbers, zero, F_LEARNING_TIMES, 1, self.rollout_calls, reduction, cluster)
        return [*found[:-1], Collective("pool", "all_to_all", self.own_floats)] if spread else found

    def sent(self, zero, reduction, accumulation=1):
        """`sent_per_cycle` of this case."""
        return sent_per_cycle(*self._numbers, zero, F_LEARNING_TIMES, accumulation, self.rollout_calls, reduction)

    @property
    def _numbers(self):
        return self.network.student_parameters, self.network.parameters, self.pool_floats, self.gpus


def update_bytes(parameters, world_size, zero):
    """Bytes of memory that one update moves on a GPU beside the networks' passes.

    Clipping reads each gradient twice and writes it. Adam with amsgrad reads parameter, gradient and three moments and
    writes all but the gradient. With ZeRO each rank does that for its part. The average reads itself and the parameter
    and writes itself: all of it, but in ZeRO 3.
    """
    clip_and_adam = (3 + 9) / (world_size if zero else 1)
    average = 3 / (world_size if zero == 3 else 1)
    return FLOAT * parameters * (clip_and_adam + average)


def state_bytes(parameters, world_size, zero):
    """Bytes of one trained network on a GPU.

    They are parameter, gradient, three moments, average, and with ZeRO DeepSpeed's master copy of the parameter.
    """
    whole, sharded = {0: (6, 0), 1: (3, 4), 2: (2, 5), 3: (0, 7)}[zero]
    return FLOAT * parameters * (whole + sharded / world_size)


def memory(case, zero, cluster=H100):
    """{part: bytes on a GPU}; activations are not counted.

    buckets: what DeepSpeed allocates to collect gradients in, of `reduce_bucket_size` whatever the network's size: for
    one network at a time with ZeRO 1 and 2, for both all the time with ZeRO 3.
    gathered: a network's parameters while ZeRO 3 calls it.
    pool: the whole, and the share of it that the GPU rolls.
    """
    network = case.network
    trained = (network.student_parameters, network.parameters)
    teacher = FLOAT * network.parameters
    return {
        "states": sum(state_bytes(parameters, case.gpus, zero) for parameters in trained) + teacher,
        "buckets": FLOAT * cluster.bucket * (0, 1, 1, 2)[zero],
        "gathered": FLOAT * network.student_parameters if zero == 3 else 0,
        "pool": FLOAT * (case.pool_floats + (case.pool_floats // case.gpus if case.gpus > 1 else 0)),
    }


def cycle(case, zero, reduction="reduce_scatter", cluster=H100, spread=False):
    """Seconds of a cycle: {compute, update, gradients, parameters, pool, no_overlap, full_overlap, share}.

    no_overlap is the sum. full_overlap hides each collective behind its pass as far as that lasts; what has no pass
    (the pool, and the parameters that ZeRO 1 and 2 gather after a step) is never hidden. share: communication's, of
    `no_overlap`. spread: as of `Case.collectives`.
    """
    network = case.network
    passes = {name: forwards * network.forward_flops / cluster.rate() for name, forwards in case.passes().items()}
    of_student = update_bytes(network.student_parameters, case.gpus, zero)
    of_score_net = F_LEARNING_TIMES * update_bytes(network.parameters, case.gpus, zero)
    update = (of_student + of_score_net) / cluster.memory_bandwidth
    times, hidden = dict.fromkeys(("gradients", "parameters", "pool"), 0.0), dict.fromkeys(passes, 0.0)
    for each in case.collectives(zero, reduction, spread, cluster):
        seconds = each.seconds(case.gpus, cluster)
        times[each.kind] += seconds
        if each.behind:
            hidden[each.behind] += seconds
    compute, communication = sum(passes.values()), sum(times.values())
    no_overlap = compute + update + communication
    saved = sum(min(passes[name], hidden[name]) for name in passes)
    return {
        "compute": compute,
        "update": update,
        **times,
        "no_overlap": no_overlap,
        "full_overlap": no_overlap - saved,
        "share": communication / no_overlap,
    }


def all_to_all(case, cluster=H100):
    """The pool's alternative, not built: each GPU keeps the trajectories that it rolled and is sent its own samples.

    {sent, memory: bytes of a GPU, seconds}.
    """
    collective = case.collectives(0, spread=True)[-1]
    kept = FLOAT * (case.pool_floats // case.gpus + case.own_floats)
    return {"sent": collective.sent(case.gpus), "memory": kept, "seconds": collective.seconds(case.gpus, cluster)}


# ---- what follows ----------------------------------------------------------------------------------------------------


def needed_samples(network, gpus, share, cluster=H100, spread=False):
    """The least number of samples a GPU from which communication takes at most `share` of a cycle.

    With ZeRO 0 and no overlap; None where no batch reaches that. Work and communication both grow linearly with the
    samples, of which each has F_LEARNING_TIMES / NFE trajectories exactly.
    """

    def parts(samples):
        times = cycle(Case(network, gpus, samples), 0, cluster=cluster, spread=spread)
        return times["compute"] + times["update"], times["gradients"] + times["pool"]

    (work, sent), (work_of_two, sent_of_two) = parts(1), parts(2)
    allowed = share / (1 - share)  # communication to work
    slope = allowed * (work_of_two - work) - (sent_of_two - sent)
    lacking = sent - allowed * work  # at one sample
    if lacking <= 0:
        return 1
    return 1 + math.ceil(lacking / slope) if slope > 0 else None


def pool_limit_gpus(network, cluster=H100):
    """GPUs from which on gathering the pool takes longer than the networks' work, at any batch.

    Both grow with the batch, but the pool with the GPUs too.
    """
    case = Case(network, 1, 1)
    compute = sum(case.passes().values()) * network.forward_flops / cluster.rate()
    return 1 + math.ceil(compute * cluster.bandwidth(cluster.node + 1) / (FLOAT * case.pool_floats))


def pool_limit_batch(network, limit=POOL_LIMIT):
    """The largest batch of an update whose pool has at most so many bytes."""
    return int(limit // (FLOAT * (NFE + 1) * network.event)) * NFE // F_LEARNING_TIMES


# What DeepSpeed has today, smallest stage first: ZeRO stage and how its gradients are averaged. ZeRO 2 differs from
# ZeRO 1 only in the gradients' memory.
WAYS = [(0, "all_reduce"), (1, "all_reduce"), (1, "reduces"), (2, "all_reduce"), (2, "reduces"), (3, "reduce_scatter")]


def advice(case, cluster=H100):
    """What to use, a dict; None where nothing fits into memory.

    way: (ZeRO stage, reduction), the first that fits and is at most `NEAR` slower than the fastest, without overlap.
    seconds: its cycle's; memory: its bytes, without activations.
    if_hidden, seconds_if_hidden: the same where all overlap works, which DeepSpeed does not try in ZeRO 0.
    others: {way: how much longer it takes than `way`}, without overlap.
    samples: of a GPU, from which on communication takes at most `LARGEST_SHARE`; None where no batch gets there.
    """
    needed = {way: sum(memory(case, way[0], cluster).values()) for way in WAYS}
    times = {way: cycle(case, *way, cluster) for way in WAYS if needed[way] <= cluster.memory}
    if not times:
        return None

    def first(seconds):
        return next(way for way in seconds if seconds[way] <= (1 + NEAR) * min(seconds.values()))

    seconds = {way: parts["no_overlap"] for way, parts in times.items()}
    hidden = {way: parts["full_overlap" if way[0] else "no_overlap"] for way, parts in times.items()}
    way, if_hidden = first(seconds), first(hidden)
    others = {other: seconds[other] / seconds[way] - 1 for other in seconds}
    return {
        "way": way,
        "seconds": seconds[way],
        "if_hidden": if_hidden,
        "seconds_if_hidden": hidden[if_hidden],
        "memory": needed[way],
        "others": others,
        "samples": needed_samples(case.network, case.gpus, LARGEST_SHARE, cluster),
    }


# ---- the tables of bench/scaling.md ----------------------------------------------------------------------------------

# ZeRO 1 has the first of these only on paper; ZeRO 2 takes as long as ZeRO 1.
STAGES = [
    (0, "all_reduce", "0"),
    (1, "reduce_scatter", "1, as a reduce-scatter (not in DeepSpeed)"),
    (1, "all_reduce", "1, DeepSpeed's default"),
    (1, "reduces", "1, single reduces"),
    (2, "all_reduce", "2, DeepSpeed's default"),
    (3, "reduce_scatter", "3"),
]
ACCUMULATION = 4  # micro-batches in the table of what is sent


@dataclass(frozen=True)
class Study:
    """What the tables are about: the counted networks, on the machines of `cluster`."""

    networks: tuple
    cluster: Cluster = H100

    @property
    def rails(self):
        """The same machines with a ring through each NIC of a node."""
        return replace(self.cluster, rails=self.cluster.node)

    @property
    def cases(self):
        """Weak scaling: the published samples a GPU."""
        return [Case(network, gpus, PUBLISHED[network.name][0]) for network in self.networks for gpus in GPUS]

    @property
    def far_cases(self):
        """Those of them that need more than one node."""
        return [case for case in self.cases if case.gpus > self.cluster.node]


def milliseconds(seconds):
    """Seconds as text in ms."""
    if seconds < 0.01:
        return f"{1e3 * seconds:.2f}"
    return f"{1e3 * seconds:.1f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def bounds(times):
    """A cycle's ms without and with full overlap."""
    return f"{milliseconds(times['no_overlap'])} / {milliseconds(times['full_overlap'])}"


def gigabytes(count):
    """Bytes as text in GB."""
    return f"{count / 1e9:.2f}" if count < 10e9 else f"{count / 1e9:.1f}"


def megabytes(count):
    """Bytes as text in MB."""
    return f"{count / 1e6:,.0f}" if count >= 10e6 or not count else f"{count / 1e6:.1f}"


def way_name(way):
    """A ZeRO stage and its reduction as text."""
    return f"{way[0]}, single reduces" if way[1] == "reduces" else str(way[0])


def counted_table(study):
    """What was counted of the networks."""
    work = sum(Case(study.networks[0], 1, 1).passes().values())
    titles = [
        "network",
        "forward, GFLOP",
        "with backward, forwards",
        "with input-only backward, forwards",
        "parameters, million",
        "event, floats",
        "gradients in float32, MB",
        "a cycle, TFLOP a sample",
    ]

    def line(network):
        return [
            network.name,
            f"{network.forward_flops / 1e9:.2f}",
            f"{network.with_backward:.3f}",
            f"{network.with_input_backward:.3f}",
            f"{network.parameters / 1e6:.2f}",
            f"{network.event:,}",
            megabytes(FLOAT * network.parameters),
            f"{work * network.forward_flops / 1e12:.2f}",
        ]

    return markdown(titles, [line(network) for network in study.networks])


def work_table(study):
    """The work of a cycle, in forwards of one sample."""
    work = Case(study.networks[0], 1, 1).passes()
    names = {
        "rollout": ("rollout",),
        "the student's update": ("student", "frozen"),
        "the score network's updates": ("score_net",),
        "a cycle": ("",),
    }
    lines = []
    for title, begins in names.items():
        lines.append([title, sum(value for name, value in work.items() if name.startswith(begins))])
    return markdown(["part", "forwards a sample"], lines)


def assumed_table(study):
    """The numbers that everything is computed from."""
    cluster, far = study.cluster, study.cluster.node + 1

    def latencies(operation):
        return ", ".join(milliseconds(cluster.latency(operation, gpus)) for gpus in GPUS) + " ms"

    on = f"on {', '.join(map(str, GPUS))} GPUs"
    lines = [
        ["GPUs a node", cluster.node],
        ["peak rate, dense bfloat16", f"{cluster.bf16 / 1e12:.0f} TFLOP/s"],
        ["**share of it that the networks reach**", f"**{cluster.utilisation:.0%}**"],
        ["memory of a GPU", f"{cluster.memory / 1e9:.0f} GB at {cluster.memory_bandwidth / 1e12:.2f} TB/s"],
        ["a NIC, one a GPU", f"{8 * cluster.nic / 1e9:.0f} Gb/s"],
        ["a ring within a node, NVLink, a direction", f"{cluster.nvlink / 1e9:.0f} GB/s"],
        ["a ring over more than one node, one NIC", f"{cluster.bandwidth(far) / 1e9:.0f} GB/s"],
        ["the same with a ring through each NIC", f"{study.rails.bandwidth(far) / 1e9:.0f} GB/s"],
        [f"latency of an all-reduce (ring or tree) {on}", latencies("all_reduce")],
        [f"latency of an all-gather or reduce-scatter (ring) {on}", latencies("all_gather")],
    ]
    return markdown(["what", "value"], lines)


STEP_TITLES = [
    "network",
    "GPUs",
    "samples a GPU",
    "batch",
    "ZeRO",
    "networks, ms",
    "clipping, Adam, average, ms",
    "gradients and parameters sent, ms",
    "pool sent, ms",
    "cycle, ms: no / full overlap",
    "images/s",
    "efficiency",
    "communication, no overlap",
]


def weak_scaling_table(study):
    """Step times with the published samples a GPU."""
    lines = [_step_line(case.network, case.gpus, case.batch, study.cluster) for case in study.cases]
    return markdown(STEP_TITLES, lines)


def strong_scaling_table(study):
    """Step times with the published batch."""
    lines = []
    for network in study.networks:
        batch = PUBLISHED[network.name][1]
        lines += [_step_line(network, gpus, batch, study.cluster) for gpus in GPUS]
    return markdown(STEP_TITLES, lines)


def _step_line(network, gpus, batch, cluster):
    if gpus > batch:
        return [network.name, gpus, "below one: not possible", batch, *["-"] * (len(STEP_TITLES) - 4)]
    case, published = Case(network, gpus, batch // gpus), PUBLISHED[network.name][0]
    way = advice(case, cluster)["way"]
    times = cycle(case, *way, cluster)
    both = times["no_overlap"], times["full_overlap"]
    # A sample's seconds on one GPU that waits for nobody.
    alone = cycle(Case(network, 1, published), 0, cluster=cluster)["no_overlap"] / published
    return [
        network.name,
        gpus,
        case.samples,
        f"{batch:,}",
        way_name(way),
        milliseconds(times["compute"]),
        milliseconds(times["update"]),
        milliseconds(times["gradients"] + times["parameters"]),
        milliseconds(times["pool"]),
        bounds(times),
        " / ".join(f"{batch * F_LEARNING_TIMES / seconds:,.0f}" for seconds in both),
        " / ".join(f"{alone * case.samples / seconds:.0%}" for seconds in both),
        f"{times['share']:.0%}",
    ]


def sent_table(study):
    """What each stage sends, on the middle number of GPUs."""
    lines = []
    for case in study.cases:
        if case.gpus == GPUS[1]:
            lines += [_sent_line(case, *stage) for stage in STAGES]
    titles = ["network", "ZeRO", "gradients", "parameters", "pool", "all", f"all, accumulation {ACCUMULATION}"]
    return markdown(titles, lines)


def _sent_line(case, zero, reduction, title):
    sent = case.sent(zero, reduction)
    accumulated = sum(case.sent(zero, reduction, ACCUMULATION).values())
    return [case.network.name, title, *map(megabytes, (*sent.values(), sum(sent.values()), accumulated))]


def stage_times_table(study):
    """A cycle's time in each stage."""
    lines = []
    for network in study.networks:
        cases = [case for case in study.cases if case.network is network]
        for zero, reduction, title in STAGES:
            if zero != 2:
                times = [bounds(cycle(case, zero, reduction, study.cluster)) for case in cases]
                lines.append([network.name, title, *times])
    return markdown(["network", "ZeRO", *(f"{gpus} GPUs" for gpus in GPUS)], lines)


def needed_samples_table(study):
    """Samples a GPU from which on communication takes less than the rest of a cycle, and at most `LARGEST_SHARE`."""

    def samples(network, gpus, links, spread=False):
        each = [needed_samples(network, gpus, share, links, spread) for share in (0.5, LARGEST_SHARE)]
        return ", ".join("never" if value is None else str(value) for value in each)

    titles = [
        "network",
        "published",
        *(f"{gpus} GPUs" for gpus in GPUS),
        f"{GPUS[-1]} GPUs, pool by all-to-all",
        *(f"{gpus} GPUs, a ring through each NIC" for gpus in GPUS[1:]),
    ]
    lines = []
    for network in study.networks:
        line = [network.name, PUBLISHED[network.name][0]]
        line += [samples(network, gpus, study.cluster) for gpus in GPUS]
        line.append(samples(network, GPUS[-1], study.cluster, spread=True))
        line += [samples(network, gpus, study.rails) for gpus in GPUS[1:]]
        lines.append(line)
    return markdown(titles, lines)


def dominated_table(study):
    """Where communication takes more than half of a cycle."""
    lines = []
    for case in study.cases:
        share = cycle(case, 0, cluster=study.cluster)["share"]
        if share > 0.5:
            lines.append([case.network.name, case.gpus, f"{share:.0%}"])
    return markdown(["network", "GPUs", "communication, no overlap"], lines)


def pool_table(study):
    """The pool's size and time, and those of its alternative."""
    titles = [
        "network",
        "GPUs",
        "batch",
        "pool on every GPU, GB",
        "gathered in, ms",
        "of a cycle, ZeRO 0",
        "all-to-all: on a GPU, MB",
        "sent by a GPU, MB",
        "in, ms",
    ]

    def line(case):
        times, other = cycle(case, 0, cluster=study.cluster), all_to_all(case, study.cluster)
        return [
            case.network.name,
            case.gpus,
            f"{case.batch:,}",
            gigabytes(FLOAT * case.pool_floats),
            milliseconds(times["pool"]),
            f"{times['pool'] / times['no_overlap']:.0%}",
            megabytes(other["memory"]),
            megabytes(other["sent"]),
            milliseconds(other["seconds"]),
        ]

    return markdown(titles, [line(case) for case in study.cases])


def pool_limits_table(study):
    """Where the pool becomes too large, or its gathering too long."""
    titles = [
        "network",
        f"{POOL_LIMIT / 1e9:.0f} GB: above a batch of",
        "with the published samples a GPU: more GPUs than",
        "longer than the networks: from so many GPUs on",
        "the same with a ring through each NIC",
    ]

    def line(network):
        batch, samples = pool_limit_batch(network), PUBLISHED[network.name][0]
        limits = [f"{pool_limit_gpus(network, links):,}" for links in (study.cluster, study.rails)]
        return [network.name, f"{batch:,}", f"{batch // samples:,} ({samples} samples)", *limits]

    return markdown(titles, [line(network) for network in study.networks])


def memory_table(study):
    """What the stages keep on a GPU."""
    titles = [
        "network",
        "GPUs",
        *(f"states, ZeRO {zero}" for zero in range(4)),
        *(f"all, ZeRO {zero}" for zero in range(4)),
        "of it the pool",
    ]

    def line(case):
        stages = [memory(case, zero, study.cluster) for zero in range(4)]
        states = [gigabytes(each["states"]) for each in stages]
        whole = [gigabytes(sum(each.values())) for each in stages]
        return [case.network.name, case.gpus, *states, *whole, gigabytes(stages[0]["pool"])]

    return markdown(titles, [line(case) for case in study.cases])


def sensitivity_table(study):
    """A cycle under other assumptions."""
    cluster, half = study.cluster, study.cluster.utilisation / 2
    variants = {
        f"{cluster.precision}, {share:.0%} of the peak rate": replace(cluster, utilisation=share)
        for share in (half, cluster.utilisation, 3 * half)
    }
    title = f"tf32 ({cluster.tf32 / 1e12:.0f} TFLOP/s), {cluster.utilisation:.0%}"
    variants[title] = replace(cluster, precision="tf32")
    title = f"{cluster.precision}, {cluster.utilisation:.0%}, a ring through each of {cluster.node} NICs"
    variants[title] = study.rails
    lines = []
    for title, other in variants.items():
        times = [cycle(case, 0, cluster=other) for case in study.far_cases]
        lines.append([title, *(f"{bounds(each)}, {each['share']:.0%}" for each in times)])
    return markdown(["assumed", *(f"{case.network.name}, {case.gpus} GPUs" for case in study.far_cases)], lines)


def alone_table(study):
    """What one GPU would make."""

    def images_per_second(network):
        samples = PUBLISHED[network.name][0]
        times = cycle(Case(network, 1, samples), 0, cluster=study.cluster)
        return f"{F_LEARNING_TIMES * samples / times['no_overlap']:,.0f}"

    lines = [[network.name, images_per_second(network)] for network in study.networks]
    return markdown(["network", "images/s of one GPU"], lines)


def advice_table(study):
    """What to use for each network and number of GPUs."""
    titles = [
        "network",
        "GPUs",
        "ZeRO",
        "memory",
        "others",
        "if all overlap worked",
        "ZeRO, a ring through each NIC",
        "published samples a GPU",
        "samples a GPU",
        "samples a GPU, a ring through each NIC",
    ]

    def line(case):
        chosen = advice(case, study.cluster)
        compared = []
        for way, more in chosen["others"].items():
            if way[0] not in (2, chosen["way"][0]) and way[1] != "reduces":
                compared.append(f"ZeRO {way_name(way)} {more:+.0%}")
        samples = []
        for links in (study.cluster, study.rails):
            least = needed_samples(case.network, case.gpus, LARGEST_SHARE, links)
            samples.append("none" if least is None else max(least, case.samples))
        return [
            case.network.name,
            case.gpus,
            way_name(chosen["way"]),
            f"{gigabytes(chosen['memory'])} GB before activations",
            ", ".join(compared),
            f"{way_name(chosen['if_hidden'])} ({chosen['seconds_if_hidden'] / chosen['seconds'] - 1:+.0%})",
            way_name(advice(case, study.rails)["way"]),
            case.samples,
            *samples,
        ]

    return markdown(titles, [line(case) for case in study.cases])


def overlap_table(study):
    """Where ZeRO 1 with all overlap would be faster than what is advised."""
    lines = []
    for case in study.far_cases:
        hidden = cycle(case, 1, "all_reduce", study.cluster)["full_overlap"]
        gain = 1 - hidden / advice(case, study.cluster)["seconds"]
        if gain > NEAR:
            lines.append([case.network.name, case.gpus, f"{gain:.0%}"])
    return markdown(["network", "GPUs", "less time, at best"], lines)


def no_batch_table(study):
    """Where no batch brings communication to `LARGEST_SHARE` of a cycle, and what would."""
    lines = []
    for case in study.cases:
        if advice(case, study.cluster)["samples"] is None:
            spread = needed_samples(case.network, case.gpus, LARGEST_SHARE, study.cluster, spread=True)
            with_rails = needed_samples(case.network, case.gpus, LARGEST_SHARE, study.rails)
            lines.append([case.network.name, case.gpus, spread, with_rails])
    titles = ["network", "GPUs", "samples a GPU, pool by all-to-all", "samples a GPU, a ring through each NIC"]
    return markdown(titles, lines)


TABLES = {
    "counted": counted_table,
    "work": work_table,
    "assumed": assumed_table,
    "weak_scaling": weak_scaling_table,
    "strong_scaling": strong_scaling_table,
    "sent": sent_table,
    "stage_times": stage_times_table,
    "needed_samples": needed_samples_table,
    "dominated": dominated_table,
    "pool": pool_table,
    "pool_limits": pool_limits_table,
    "memory": memory_table,
    "sensitivity": sensitivity_table,
    "alone": alone_table,
    "advice": advice_table,
    "overlap": overlap_table,
    "no_batch": no_batch_table,
}


def with_tables(document, study):
    """The document with every table as the model has it."""
    return filled(document, lambda name: TABLES[name](study))


def main():
    command_line(__doc__).parse_args()
    document, study = REPORT.read_text(), Study(tuple(counted(name) for name in PUBLISHED))
    for name in table_names(document):
        print(f"{name}\n\n{TABLES[name](study)}")
    REPORT.write_text(with_tables(document, study))
    return 0


if __name__ == "__main__":
    sys.exit(main())
