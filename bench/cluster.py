"""A model of a training cycle on many GPUs: computed from counted work and bytes and from data sheets. Nothing that it says was measured.

    python -m bench.cluster        prints the report and writes it to bench/scaling.md

A cycle is `F_UPDATES` updates of the score network and one of the student, on a pool that the ranks roll in equal shares and gather (`pooled`, redraw 1).

Counted, on tensors without memory: floating-point operations of matrix products and convolutions, parameters, the size of an event. Known from the code:
which collectives a cycle has and what they carry. From data sheets: the rates of an H100 and its links. Assumed: the share of the peak rate that the networks
reach.

A collective over W ranks takes a latency for each of its calls and the time in which a ring sends its bytes: (W-1)/W of the tensor for a reduce-scatter or an
all-gather, twice that for an all-reduce (Thakur, Rabenseifner and Gropp 2005; for the ZeRO stages Rajbhandari et al. 2020, arXiv 1910.02054, section 7).
"""

import argparse
import math
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hsivi_fast.nets import build_unet

from .measure import counted_flops

REPORT = Path(__file__).parent / "scaling.md"
GPUS = (8, 64, 512)
F_UPDATES, NFE, CHUNK = 20, 10, 4096  # f_learning_times and K of the published runs; rollout.chunk's default
FLOAT = 4  # bytes: weights, gradients and the pool are float32 in every precision of a run
PUBLISHED = {
    "cifar10": (16, 128),
    "celeba64": (16, 128),
    "imagenet64": (32, 2048),
}  # network -> (samples a GPU, batch) of the published settings
POOL_LIMIT = 10e9  # bytes of pool on every GPU that the report calls too many; a choice, as are the next two
LARGEST_SHARE = 0.2  # of a cycle that communication may take where a batch is recommended
NEAR = 0.05  # stages whose times differ by less than this are called equal: the model knows no better
DEEPSPEED = "0.19.8"  # whose code was read for what its stages send and allocate


@dataclass(frozen=True)
class Cluster:
    """The machines: rates per second, bytes, seconds. One number, one source."""

    node: int = 8  # GPUs; DGX H100 and HGX H100
    bf16: float = 989e12  # operations, dense (half of the 1,979 with sparsity); NVIDIA H100 data sheet, SXM
    tf32: float = 495e12  # operations, dense (half of the 989 with sparsity); the same
    precision: str = "bf16"  # which of the two rates is used
    utilisation: float = (
        0.30  # share of that rate which the networks reach. ASSUMED: nothing of this project has been timed on a GPU
    )
    memory: float = 80e9  # bytes; NVIDIA H100 data sheet, SXM
    memory_bandwidth: float = 3.35e12  # bytes; the same. Optimizer and average are taken to run at all of it
    nvlink: float = 450e9  # bytes in one direction (900 GB/s in both); the same, NVLink 4
    nic: float = 50e9  # bytes in one direction; 400 Gb/s, one ConnectX-7 a GPU; NVIDIA DGX H100 data sheet
    rails: int = 1  # NICs of a node that leave at once with a rank's bytes: 1, a single ring (pessimistic), up to `node`, a ring through each (what NCCL tries)
    # Latencies in seconds: NCCL's own tuning constants, protocol Simple, as torch/_inductor/comm_analysis.py (torch 2.14) has them: `baseLat`, `hwLat`.
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
        """Bytes per second that a rank of a ring sends: NVLink's within a node, and where the ring leaves it, what goes through its NICs."""
        return self.nvlink if self.nodes(world_size) == 1 else min(self.nvlink, self.rails * self.nic)

    def latency(self, operation, world_size):
        """Seconds of one collective beside its bytes, as NCCL estimates them: a ring's steps; for an all-reduce a tree's, where they are fewer."""
        if world_size == 1:
            return 0.0
        nodes, rounds = self.nodes(world_size), 2 if operation == "all_reduce" else 1
        between = rounds * (nodes - 1)
        ring = (rounds * (world_size - 1) - between) * self.ring_step_nvlink + between * self.step_network
        tree = 2 * ((world_size / nodes - 1) * self.tree_step_nvlink + math.log2(nodes) * self.step_network)
        return self.start + (min(ring, tree) if operation == "all_reduce" else ring)


H100 = Cluster()


# ---- what is sent -----------------------------------------------------------------------------------------------------

# `reduces` is one reduce for each rank's part of the gradients, one after the other: how DeepSpeed can send no more than a reduce-scatter in ZeRO 1 and 2.
TIMES_THE_TENSOR = {"all_reduce": 2, "reduce_scatter": 1, "reduces": 1, "all_gather": 1, "all_to_all": 1}


@dataclass(frozen=True)
class Collective:
    """One kind of collective of a cycle: `times` operations on `floats` float32 numbers, each in `calls` calls, at best hidden behind a pass."""

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
        return self.times * self.calls * cluster.latency(self.operation, world_size) + self.sent(
            world_size
        ) / cluster.bandwidth(world_size)


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

    parameters_*: how many parameters; pool_floats: numbers in the whole pool; zero: DeepSpeed's stage; accumulation: micro-batches an update; rollout_calls:
    calls of the student that a rank makes for its share of the pool; reduction: how ZeRO 1 and 2 average gradients, `reduce_scatter`, or what DeepSpeed has in
    its place (deepspeed/runtime/zero/stage_1_and_2.py, `average_tensor`): `all_reduce` of whole buckets, its default, or `reduces`, with
    use_multi_rank_bucket_allreduce off.
    """
    found = []
    reduction = {0: "all_reduce", 3: "reduce_scatter"}.get(zero, reduction)
    for name, parameters, updates in (
        ("student", parameters_student, 1),
        ("score_net", parameters_score_net, f_learning_times),
    ):
        buckets, fetches = (-(-parameters // size) for size in (cluster.bucket, cluster.prefetch))
        reductions = updates * (
            accumulation if zero >= 2 else 1
        )  # ZeRO 2 and 3 keep no whole gradient, so they average each micro-batch's
        calls = buckets * (world_size if reduction == "reduces" else 1)
        found.append(Collective("gradients", reduction, parameters, reductions, calls, f"{name} backward"))
        if zero in (1, 2):
            found.append(
                Collective("parameters", "all_gather", parameters, updates)
            )  # after the step, before anything can use them
        if zero == 3:
            passes = [(f"{name} forward", updates * accumulation), (f"{name} backward", updates * accumulation)]
            # Of the student in the rollout, and of the score network in the student's update; the teacher is whole everywhere.
            passes += (
                [("rollout", rollout_calls)]
                if name == "student"
                else [("frozen forward", accumulation), ("frozen backward", accumulation)]
            )
            found += [
                Collective("parameters", "all_gather", parameters, times, fetches, behind) for behind, times in passes
            ]
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
    """Bytes that each rank sends in a cycle with ring algorithms, {"gradients", "parameters", "pool"}; arguments as of `collectives`."""
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


# ---- what is computed and kept ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """What was counted of a network, for one sample: operations of a forward, and in forwards, of one with its backward and with an input-only backward."""

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
        x, t = (
            torch.empty(1, *network.event_shape, requires_grad=True),
            torch.zeros(1, dtype=torch.int64),
        )  # [1, *event]
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
        return -(-math.ceil(F_UPDATES * self.batch / NFE) // self.gpus)

    @property
    def pool_floats(self):
        """Numbers in the whole pool: K + 1 states of each trajectory."""
        return (NFE + 1) * self.gpus * self.trajectories * self.network.event

    @property
    def own_floats(self):
        """Numbers of the samples that a GPU's own updates take from the pool in a cycle."""
        return (F_UPDATES + 1) * self.samples * self.network.event

    def passes(self):
        """{pass: its work on a GPU in a cycle, in forwards of one sample}. A backward is two forwards, one to the input alone is one."""
        return {
            "rollout": NFE * self.trajectories,
            "student forward": self.samples,
            "frozen forward": 2 * self.samples,
            "frozen backward": 2 * self.samples,
            "student backward": 2 * self.samples,
            "score_net forward": F_UPDATES * self.samples,
            "score_net backward": 2 * F_UPDATES * self.samples,
        }

    @property
    def rollout_calls(self):
        """Calls of the student that a GPU makes for its share of the pool."""
        return NFE * -(-self.trajectories // CHUNK)

    def collectives(self, zero, reduction="reduce_scatter", spread=False, cluster=H100):
        """Those of a cycle, without accumulation. spread: each GPU is sent only its own samples of the pool, which is not built."""
        found = collectives(*self._numbers, zero, F_UPDATES, 1, self.rollout_calls, reduction, cluster)
        return [*found[:-1], Collective("pool", "all_to_all", self.own_floats)] if spread else found

    def sent(self, zero, reduction, accumulation=1):
        """`sent_per_cycle` of this case."""
        return sent_per_cycle(*self._numbers, zero, F_UPDATES, accumulation, self.rollout_calls, reduction)

    @property
    def _numbers(self):
        return self.network.student_parameters, self.network.parameters, self.pool_floats, self.gpus


def update_bytes(parameters, world_size, zero):
    """Bytes of memory that one update moves on a GPU beside the networks' passes.

    Clipping reads each gradient twice and writes it; Adam with amsgrad reads parameter, gradient and three moments and writes all but the gradient; with ZeRO
    each rank does that for its part. The average reads itself and the parameter and writes itself: all of it, but in ZeRO 3.
    """
    clip_and_adam, average = 3 + 9, 3
    return (
        FLOAT * parameters * (clip_and_adam / (world_size if zero else 1) + average / (world_size if zero == 3 else 1))
    )


def state_bytes(parameters, world_size, zero):
    """Bytes of one trained network on a GPU: parameter, gradient, three moments, average, and with ZeRO DeepSpeed's master copy of the parameter."""
    whole, sharded = {0: (6, 0), 1: (3, 4), 2: (2, 5), 3: (0, 7)}[zero]
    return FLOAT * parameters * (whole + sharded / world_size)


def memory(case, zero, cluster=H100):
    """{part: bytes on a GPU}; activations are not counted.

    buckets: what DeepSpeed allocates to collect gradients in, of `reduce_bucket_size` whatever the network's size: for one network at a time with ZeRO 1 and 2,
    for both all the time with ZeRO 3. gathered: a network's parameters while ZeRO 3 calls it. pool: the whole, and the share of it that the GPU rolls.
    """
    network = case.network
    trained = (network.student_parameters, network.parameters)
    return {
        "states": sum(state_bytes(parameters, case.gpus, zero) for parameters in trained)
        + FLOAT * network.parameters,  # the teacher's
        "buckets": FLOAT * cluster.bucket * (0, 1, 1, 2)[zero],
        "gathered": FLOAT * network.student_parameters if zero == 3 else 0,
        "pool": FLOAT * (case.pool_floats + (case.pool_floats // case.gpus if case.gpus > 1 else 0)),
    }


def cycle(case, zero, reduction="reduce_scatter", cluster=H100, spread=False):
    """Seconds of a cycle: {compute, update, gradients, parameters, pool, no_overlap, full_overlap}, and `share`, communication's in `no_overlap`.

    no_overlap is the sum. full_overlap hides each collective behind its pass as far as that lasts; what has no pass (the pool, and the parameters that ZeRO 1
    and 2 gather after a step) is never hidden. spread: as of `Case.collectives`.
    """
    network = case.network
    passes = {name: forwards * network.forward_flops / cluster.rate() for name, forwards in case.passes().items()}
    moved = update_bytes(network.student_parameters, case.gpus, zero) + F_UPDATES * update_bytes(
        network.parameters, case.gpus, zero
    )
    update = moved / cluster.memory_bandwidth
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
    """The pool's alternative, not built: each GPU keeps the trajectories that it rolled and is sent its own samples. {sent, memory: bytes of a GPU, seconds}."""
    collective = case.collectives(0, spread=True)[-1]
    kept = FLOAT * (case.pool_floats // case.gpus + case.own_floats)
    return {"sent": collective.sent(case.gpus), "memory": kept, "seconds": collective.seconds(case.gpus, cluster)}


# ---- what follows -----------------------------------------------------------------------------------------------------


def needed_samples(network, gpus, share, cluster=H100, spread=False):
    """The least number of samples a GPU from which communication takes at most `share` of a cycle (ZeRO 0, no overlap); None where no batch reaches that.

    Work and communication both grow linearly with the samples, of which each has F_UPDATES / NFE trajectories exactly.
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
    """GPUs from which on gathering the pool takes longer than the networks' work, at any batch: both grow with the batch, but the pool with the GPUs too."""
    case = Case(network, 1, 1)
    compute = sum(case.passes().values()) * network.forward_flops / cluster.rate()
    return 1 + math.ceil(compute * cluster.bandwidth(cluster.node + 1) / (FLOAT * case.pool_floats))


def pool_limit_batch(network, limit=POOL_LIMIT):
    """The largest batch of an update whose pool has at most so many bytes."""
    return int(limit // (FLOAT * (NFE + 1) * network.event)) * NFE // F_UPDATES


# What DeepSpeed has today, smallest stage first: ZeRO stage and how its gradients are averaged. ZeRO 2 differs from ZeRO 1 only in the gradients' memory.
WAYS = [(0, "all_reduce"), (1, "all_reduce"), (1, "reduces"), (2, "all_reduce"), (2, "reduces"), (3, "reduce_scatter")]


def advice(case, cluster=H100):
    """What to use: {way, seconds, if_hidden, seconds_if_hidden, memory, others, samples}, or None where nothing fits into memory.

    way: (ZeRO stage, reduction), the first that fits and is at most `NEAR` slower than the fastest, without overlap. if_hidden: the same where all overlap
    works, which DeepSpeed does not try in ZeRO 0. others: {way: how much longer it takes than `way`}, without overlap. memory: bytes of `way`, without
    activations. samples: of a GPU, from which on communication takes at most `LARGEST_SHARE`; None where no batch gets there.
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


# ---- the report: every number in its text is computed -----------------------------------------------------------------

# ZeRO 1 has the first of these only on paper; ZeRO 2 takes as long as ZeRO 1.
STAGES = [
    (0, "all_reduce", "0"),
    (1, "reduce_scatter", "1, as a reduce-scatter (not in DeepSpeed)"),
    (1, "all_reduce", "1, DeepSpeed's default"),
    (1, "reduces", "1, single reduces"),
    (2, "all_reduce", "2, DeepSpeed's default"),
    (3, "reduce_scatter", "3"),
]


def milliseconds(seconds):
    return (
        f"{1e3 * seconds:.2f}"
        if seconds < 0.01
        else f"{1e3 * seconds:.1f}"
        if seconds < 0.1
        else f"{1e3 * seconds:,.0f}"
    )


def bounds(times):
    return f"{milliseconds(times['no_overlap'])} / {milliseconds(times['full_overlap'])}"


def gigabytes(count):
    return f"{count / 1e9:.2f}" if count < 10e9 else f"{count / 1e9:.1f}"


def megabytes(count):
    return f"{count / 1e6:,.0f}" if count >= 10e6 or not count else f"{count / 1e6:.1f}"


def way_name(way):
    return f"{way[0]}, single reduces" if way[1] == "reduces" else str(way[0])


def join(words):
    """ "a, b and c"."""
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}" if first else last


def of_each(networks, value):
    """ "1 (cifar10), 2 (celeba64) and 3 (imagenet64)"."""
    return join(f"{value(network)} ({network.name})" for network in networks)


def prose(text):
    """Headings, paragraphs and lists of a text, filled to the width of the house."""
    blocks = []
    for block in textwrap.dedent(text).strip().split("\n\n"):
        items = [" ".join(item.split()) for item in block.replace("\n- ", "\0- ").split("\0")]
        blocks.append(
            "\n".join(
                item
                if item.startswith("#")
                else textwrap.fill(
                    item,
                    150,
                    subsequent_indent="  " if item.startswith("- ") else "",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                for item in items
            )
        )
    return "\n\n".join(blocks) + "\n\n"


def markdown(titles, rows):
    """A Markdown table."""
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in (titles, ["---"] * len(titles), *rows)) + "\n"


def report(networks, cluster=H100):
    """The whole report as Markdown, from the counted networks."""
    cases = [Case(network, gpus, PUBLISHED[network.name][0]) for network in networks for gpus in GPUS]  # weak scaling
    rails = replace(cluster, rails=cluster.node)
    return (
        "".join(
            [
                _beginning(networks, cluster, rails),
                _step_times(networks, cases, cluster),
                _stages(networks, cases, cluster),
                _domination(networks, cases, cluster, rails),
                _pool(networks, cases, cluster, rails),
                _memory(cases, cluster),
                _sensitivity(networks, cases, cluster, rails),
                _advice(networks, cases, cluster, rails),
            ]
        ).rstrip("\n")
        + "\n"
    )


def _beginning(networks, cluster, rails):
    work = Case(networks[0], 1, 1).passes()
    student, score_net = (
        sum(value for name, value in work.items() if name.startswith(names))
        for names in (("student", "frozen"), "score_net")
    )
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
    rows = [
        [
            n.name,
            f"{n.forward_flops / 1e9:.2f}",
            f"{n.with_backward:.3f}",
            f"{n.with_input_backward:.3f}",
            f"{n.parameters / 1e6:.2f}",
            f"{n.event:,}",
            megabytes(FLOAT * n.parameters),
            f"{sum(work.values()) * n.forward_flops / 1e12:.2f}",
        ]
        for n in networks
    ]
    latencies = {
        operation: ", ".join(milliseconds(cluster.latency(operation, gpus)) for gpus in GPUS)
        for operation in ("all_reduce", "all_gather")
    }
    far = cluster.node + 1
    return (
        prose(f"""
        # A training cycle on {join(GPUS)} GPUs: a model, not a measurement

        `python -m bench.cluster` computes all of this from counted work and bytes, the data sheets of an H100 SXM, and one assumption. **Nothing here was
        timed: this project has not run on a GPU, let alone on {GPUS[-1]}.** It says where time would go and what to try first, not how fast it is.

        A cycle is {F_UPDATES} updates of the score network and one of the student, K = {NFE}. Its pool, {F_UPDATES} B / {NFE} trajectories of {NFE + 1}
        states for a batch of B, is rolled in equal shares and gathered, so that every GPU has all of it (`pooled`, redraw 1). {cluster.node} GPUs a node,
        NVLink within it, one NIC of {8 * cluster.nic / 1e9:.0f} Gb/s a GPU between nodes. Images/s counts, as in the README, the samples of the score
        network's updates.

        ## Counted

        On tensors without memory, for one sample: operations of matrix products and convolutions. A cycle is {sum(work.values())} forwards a sample:
        {work["rollout"]} for the rollout, {student} for the student's update (its forward and backward, and forward and input-only backward of score network
        and teacher), {score_net} for the score network's. A backward counts two forwards, an input-only one one; the counted ratios say how good these units
        are.
        """)
        + markdown(titles, rows)
        + prose(f"""
        ## Assumed

        - **The networks reach {cluster.utilisation:.0%} of the peak rate** ({cluster.bf16 / 1e12:.0f} TFLOP/s, dense bfloat16), at any batch. No data sheet
        has this number; the sensitivity table has half and one and a half of it. With one or two samples a GPU it is surely too high, so strong scaling is
        worse than shown.
        - Clipping, Adam and the average run at all of the memory's {cluster.memory_bandwidth / 1e12:.2f} TB/s.
        - Collectives are rings: {cluster.nvlink / 1e9:.0f} GB/s a direction within a node, and **over more than one node {cluster.bandwidth(far) / 1e9:.0f}
        GB/s, one NIC**. That is the pessimistic end: NCCL tries to run a ring through each NIC of a node, which could give up to
        {rails.bandwidth(far) / 1e9:.0f} GB/s. The sensitivity table and the advice have that other end too; the truth is between, and it changes the
        conclusions.
        - A collective also takes NCCL's own latency estimate (protocol Simple). On {join(GPUS)} GPUs: {latencies["all_reduce"]} ms for an all-reduce (ring or
        tree), {latencies["all_gather"]} ms for an all-gather or reduce-scatter (ring).
        - Gradients, parameters and pool travel as float32, in bfloat16 runs too.
        - No overlap is the sum of all parts. Full overlap hides gradients behind their backward (and ZeRO 3's parameters behind their pass); the pool is
        never hidden. DeepSpeed averages the gradients of ZeRO 0 only after the backward, so there full overlap is what another engine could do.
        - Not in it: activations; operations other than products and convolutions; the host, which with batches as small as these may be the limit; other
        traffic, slow ranks, failures; saving.
        """)
    )


def _step_times(networks, cases, cluster):
    titles = [
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

    def row(network, gpus, batch):
        if gpus > batch:
            return [network.name, gpus, "below one: not possible", batch, *["-"] * (len(titles) - 4)]
        case, published = Case(network, gpus, batch // gpus), PUBLISHED[network.name][0]
        way = advice(case, cluster)["way"]
        times = cycle(case, *way, cluster)
        both = times["no_overlap"], times["full_overlap"]
        alone = (
            cycle(Case(network, 1, published), 0, cluster=cluster)["no_overlap"] / published
        )  # a sample's seconds on one GPU that waits for nobody
        return [
            network.name,
            gpus,
            case.samples,
            f"{batch:,}",
            way_name(way),
            *(milliseconds(times[part]) for part in ("compute", "update")),
            milliseconds(times["gradients"] + times["parameters"]),
            milliseconds(times["pool"]),
            bounds(times),
            " / ".join(f"{batch * F_UPDATES / seconds:,.0f}" for seconds in both),
            " / ".join(f"{alone * case.samples / seconds:.0%}" for seconds in both),
            f"{times['share']:.0%}",
        ]

    return (
        prose(f"""
        ## Weak scaling: the published samples a GPU

        {of_each(networks, lambda network: PUBLISHED[network.name][0])} samples a GPU, with the stage that is advised below ("1" is DeepSpeed's default way of
        it). Images/s and efficiency: no / full overlap. Efficiency is images/s a GPU against one GPU with the published samples and ZeRO 0 that waits for
        nobody; where ZeRO shares out Adam's work, or more samples share it, it can be more than all.
        """)
        + markdown(titles, [row(case.network, case.gpus, case.batch) for case in cases])
        + prose("""
        ## Strong scaling: the published batch
        """)
        + markdown(titles, [row(network, gpus, PUBLISHED[network.name][1]) for network in networks for gpus in GPUS])
    )


def _stages(networks, cases, cluster):
    middle, parts = [case for case in cases if case.gpus == GPUS[1]], 4  # of the accumulation that is shown
    largest = max(networks, key=lambda network: network.parameters)
    of_updates = {
        zero: sum(middle[0].sent(zero, "all_reduce")[kind] for kind in ("gradients", "parameters")) for zero in (0, 1)
    }
    rows = []
    for case in middle:
        for zero, reduction, title in STAGES:
            sent, accumulated = case.sent(zero, reduction), case.sent(zero, reduction, parts)
            rows.append(
                [
                    case.network.name,
                    title,
                    *(megabytes(value) for value in (*sent.values(), sum(sent.values()), sum(accumulated.values()))),
                ]
            )
    times = [
        [
            network.name,
            title,
            *(bounds(cycle(case, zero, reduction, cluster)) for case in cases if case.network is network),
        ]
        for network in networks
        for zero, reduction, title in STAGES
        if zero != 2
    ]
    return (
        prose(f"""
        ## What each stage sends

        MB that a GPU sends in a cycle, on {GPUS[1]} GPUs with the published samples a GPU. ZeRO 1 and 2 are meant to reduce-scatter gradients, but
        **DeepSpeed {DEEPSPEED} all-reduces whole buckets by default (`use_multi_rank_bucket_allreduce`) and gathers the parameters besides:
        {of_updates[1] / of_updates[0]:.1f} times what ZeRO 0 sends for an update**. With that switched off it makes one reduce for each rank's part ("single
        reduces"): the bytes of a reduce-scatter, and the latency of as many collectives as there are ranks. With accumulation, ZeRO 2 and 3 average every
        micro-batch.
        """)
        + markdown(["network", "ZeRO", "gradients", "parameters", "pool", "all", f"all, accumulation {parts}"], rows)
        + prose("""
        Milliseconds of a cycle with the published samples a GPU, no / full overlap:
        """)
        + markdown(["network", "ZeRO", *(f"{gpus} GPUs" for gpus in GPUS)], times)
        + prose(f"""
        ZeRO 2 takes as long as ZeRO 1. ZeRO 3 and single reduces are upper bounds: DeepSpeed keeps small parameters whole, and gathered ones where it expects
        to use them again soon, which may save the gathering in the backward; and NCCL has a protocol of less latency for small pieces.

        Full overlap is out of reach with DeepSpeed's default bucket of {cluster.bucket / 1e6:.0f} million numbers: the largest network here has
        {largest.parameters / 1e6:.0f} million, so all gradients leave in one piece after the backward. It takes `overlap_comm: true` and a
        `reduce_bucket_size` of a fraction of the network.
        """)
    )


def _domination(networks, cases, cluster, rails):
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
    rows = [
        [
            network.name,
            PUBLISHED[network.name][0],
            *(samples(network, gpus, cluster) for gpus in GPUS),
            samples(network, GPUS[-1], cluster, True),
            *(samples(network, gpus, rails) for gpus in GPUS[1:]),
        ]
        for network in networks
    ]
    shares = {case: cycle(case, 0, cluster=cluster)["share"] for case in cases}
    dominated = [
        f"{case.network.name} on {case.gpus} GPUs ({share:.0%})" for case, share in shares.items() if share > 0.5
    ]
    return (
        prose(f"""
        ## Where communication dominates

        Two numbers of samples a GPU: from which on communication takes less than the rest of a cycle, and at most {LARGEST_SHARE:.0%} of it (ZeRO 0, no
        overlap). "never": gathering the pool grows with the batch too, so no batch gets there.
        """)
        + markdown(titles, rows)
        + (
            prose(f"""
        With the published samples a GPU, communication takes more than half of a cycle for {join(dominated)}.
        """)
            if dominated
            else ""
        )
    )


def _pool(networks, cases, cluster, rails):
    rows = []
    for case in cases:
        times, other = cycle(case, 0, cluster=cluster), all_to_all(case, cluster)
        rows.append(
            [
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
        )
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

    def limit(network):
        batch, samples = pool_limit_batch(network), PUBLISHED[network.name][0]
        return f"{batch:,} ({network.name}: more than {batch // samples:,} GPUs with {samples} samples)"

    return (
        prose(f"""
        ## The pool

        It has {NFE + 1} states of {F_UPDATES} B / {NFE} trajectories for the whole batch B, on every GPU. With the same samples a GPU, its bytes and the time
        to gather it grow with the number of GPUs:
        """)
        + markdown(titles, rows)
        + prose(f"""
        **The pool passes {POOL_LIMIT / 1e9:.0f} GB on every GPU above a batch of {join(limit(network) for network in networks)}.** From
        {of_each(networks, lambda network: f"{pool_limit_gpus(network, cluster):,}")} GPUs on gathering it takes longer than all work of the networks,
        whatever the batch; with a ring through each NIC from {join(f"{pool_limit_gpus(network, rails):,}" for network in networks)}.

        **The alternative, not built, is an all-to-all** that sends a GPU only the {F_UPDATES + 1} B / W states of its own updates (W GPUs) and leaves
        trajectories where they were rolled. What a GPU holds and sends does not grow with the number of GPUs then, as the columns on the right say (their
        time is latency). Every rank knows all seeds and the order of the pool, so it would change no result.
        """)
    )


def _memory(cases, cluster):
    kept = {case: [memory(case, zero, cluster) for zero in range(4)] for case in cases}
    titles = [
        "network",
        "GPUs",
        *(f"states, ZeRO {zero}" for zero in range(4)),
        *(f"all, ZeRO {zero}" for zero in range(4)),
        "of it the pool",
    ]
    rows = [
        [
            case.network.name,
            case.gpus,
            *(gigabytes(each["states"]) for each in stages),
            *(gigabytes(sum(each.values())) for each in stages),
            gigabytes(stages[0]["pool"]),
        ]
        for case, stages in kept.items()
    ]
    fits = max(sum(each.values()) for stages in kept.values() for each in stages) <= cluster.memory
    saved, bucket = max(stages[0]["states"] - stages[3]["states"] for stages in kept.values()), FLOAT * cluster.bucket
    return (
        prose(f"""
        ## Memory

        GB on a GPU. For each trained network: parameter {FLOAT} bytes, gradient {FLOAT}, Adam with amsgrad {3 * FLOAT}, average {FLOAT}; the teacher {FLOAT}.
        ZeRO 1 shards Adam's and a master copy of the parameter ({FLOAT} more) that DeepSpeed makes, ZeRO 2 the gradient too, ZeRO 3 everything (and holds one
        network gathered). In "all" are DeepSpeed's gradient buckets of {gigabytes(bucket)} GB by default, one at a time in ZeRO 1 and 2 and one for each
        network in ZeRO 3, and the pool with a GPU's own share of it. **Activations are not counted.**
        """)
        + markdown(titles, rows)
        + (
            prose(f"""
        Everything fits into {cluster.memory / 1e9:.0f} GB in every stage. Sharding saves at most {gigabytes(saved)} GB, of which the default buckets take
        {gigabytes(bucket)} back in ZeRO 1 and 2 and {gigabytes(2 * bucket)} in ZeRO 3.
        """)
            if fits
            else ""
        )
    )


def _sensitivity(networks, cases, cluster, rails):
    far = [case for case in cases if case.gpus > cluster.node]
    shares = cluster.utilisation / 2, cluster.utilisation, 1.5 * cluster.utilisation
    variants = {
        f"{cluster.precision}, {share:.0%} of the peak rate": replace(cluster, utilisation=share) for share in shares
    }
    variants[f"tf32 ({cluster.tf32 / 1e12:.0f} TFLOP/s), {cluster.utilisation:.0%}"] = replace(
        cluster, precision="tf32"
    )
    variants[f"{cluster.precision}, {cluster.utilisation:.0%}, a ring through each of {cluster.node} NICs"] = rails
    rows = []
    for title, other in variants.items():
        times = [cycle(case, 0, cluster=other) for case in far]
        rows.append([title, *(f"{bounds(each)}, {each['share']:.0%}" for each in times)])

    def alone(network):
        samples = PUBLISHED[network.name][0]
        return f"{F_UPDATES * samples / cycle(Case(network, 1, samples), 0, cluster=cluster)['no_overlap']:,.0f}"

    return (
        prose("""
        ## How much depends on the assumptions

        A cycle in ms, no / full overlap, and communication's share without overlap; ZeRO 0, the published samples a GPU:
        """)
        + markdown(["assumed", *(f"{case.network.name}, {case.gpus} GPUs" for case in far)], rows)
        + prose(f"""
        One GPU alone would make {of_each(networks, alone)} images/s: the assumed share of the peak rate, said in another way.
        """)
    )


def _advice(networks, cases, cluster, rails):
    chosen = {case: advice(case, cluster) for case in cases}

    def row(case, each):
        compared = {
            way: more
            for way, more in each["others"].items()
            if way[0] not in (2, each["way"][0]) and way[1] != "reduces"
        }
        samples = [needed_samples(case.network, case.gpus, LARGEST_SHARE, links) for links in (cluster, rails)]
        return [
            case.network.name,
            case.gpus,
            way_name(each["way"]),
            f"{gigabytes(each['memory'])} GB before activations",
            ", ".join(f"ZeRO {way_name(way)} {more:+.0%}" for way, more in compared.items()),
            f"{way_name(each['if_hidden'])} ({each['seconds_if_hidden'] / each['seconds'] - 1:+.0%})",
            way_name(advice(case, rails)["way"]),
            case.samples,
            *("none" if least is None else max(least, case.samples) for least in samples),
        ]

    def named(wanted):
        return join(f"{case.network.name} on {case.gpus}" for case in wanted)

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
    stages = sorted({each["way"][0] for each in chosen.values()})
    lines = [
        f"- **ZeRO {zero}** for {named(case for case in cases if chosen[case]['way'][0] == zero)} GPUs."
        for zero in stages
    ]
    far = [case for case in cases if case.gpus > cluster.node]
    gains = {case: 1 - cycle(case, 1, "all_reduce", cluster)["full_overlap"] / chosen[case]["seconds"] for case in far}
    gains = {case: f"{gain:.0%}" for case, gain in gains.items() if gain > NEAR}
    if gains:
        lines.append(
            f"""- ZeRO 1 with `overlap_comm` and small buckets is worth a trial for {named(gains)} GPUs: at best {join(gains.values())} less."""
        )
    stuck = [case for case in cases if chosen[case]["samples"] is None]
    if stuck:
        spread, with_rails = (
            [needed_samples(network, GPUS[-1], LARGEST_SHARE, *how) for network in networks]
            for how in ((cluster, True), (rails,))
        )
        lines.append(f"""- For {named(stuck)} GPUs no batch brings communication to {LARGEST_SHARE:.0%} of a cycle. The pool's all-to-all comes first there,
            and then {join(spread)} samples a GPU; if NCCL does use all NICs, {join(with_rails)} are enough as it is.""")
    slower = [chosen[case]["others"][1, "reduces"] + 1 for case in far]
    lines.append(f"""- `use_multi_rank_bucket_allreduce: false` at most within a node: over more, its reduces make a cycle {min(slower):.1f} to {max(slower):.0f}
        times as long.""")
    return (
        prose(f"""
        ## What it says to use

        The smallest stage that fits into {cluster.memory / 1e9:.0f} GB and is at most {NEAR:.0%} slower than the fastest, without overlap; what the others
        take against it; and the same if all overlap worked (with ZeRO 3 the least likely: its hooks take the host's time, and it goes neither with `compile`
        nor with graphs). Samples a GPU: from which on communication takes at most {LARGEST_SHARE:.0%} (ZeRO 0, no overlap), but no fewer than published.
        **How larger batches than the published ones train was not tried.**
        """)
        + markdown(titles, [row(case, each) for case, each in chosen.items()])
        + prose("\n".join(lines))
    )


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    text = report([counted(name) for name in PUBLISHED])
    REPORT.write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
