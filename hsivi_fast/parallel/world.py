"""The processes of one run: who is there, what share each has, and what they send each other.

A launcher starts a run once per process, and sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. `connect` makes a
`World` of them. Without these variables there is one process, `ALONE`, and nothing below sends anything. Rank 0 alone
reads and writes the run's folder.
"""

import contextlib
import datetime
import os
import socket
import time

import torch
import torch.distributed as dist

from .interrupt import Interrupted
from .liveness import Liveness
from .seeds import Seeds

MOST_PROCESSES = 1_000_000
LAUNCHER = "start the run with a launcher, as in `deepspeed launch/train.py`"  # advice in messages

_world, _met = None, False  # of this process, once connected


class World:
    """One process among `size`; `rank` counts over all machines, `local_rank` within this one.

    device: this process's; store: rank 0's key-value store at `address`; control: the group that agreements of the
    hosts go through. Collectives must be reached by all ranks in the same order.
    """

    def __init__(self, rank=0, size=1, local_rank=0, device=None, store=None, address=None, control=None):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.device = device or torch.device("cpu")
        self.store, self.address, self.control = store, address, control  # the store is rank 0's to keep alive
        self.marks, self.doing, self.detail, self.trouble = 0, "starting", "", False

    @property
    def is_main(self):
        """Whether this is rank 0, which owns the run's folder and speaks for all."""
        return self.rank == 0

    def shard(self, count):
        """This rank's slice of `count` things; ValueError where they cannot be cut into equal parts."""
        share = samples_per_rank("count", count, self.size)
        return slice(self.rank * share, (self.rank + 1) * share)

    def share(self, items):
        """This rank's share of a sequence that need not be cut evenly, as a slice: a range stays one.

        Each rank has equally many items; where they run out, the last one is repeated.
        """
        if self.size == 1:
            return items
        size = -(-len(items) // self.size)
        share = items[self.rank * size : (self.rank + 1) * size]
        missing = size - len(share)
        return Seeds(share, [items[-1]] * missing) if missing else share

    def counted(self, count):
        """How many of this rank's `share` of `count` items are no repetitions."""
        size = -(-count // self.size)
        return min(max(count - self.rank * size, 0), size)

    def mark(self, doing):
        """Note that the main thread has got further, and to what: costs nothing and is read by the liveness thread."""
        self.marks, self.doing, self.detail = self.marks + 1, doing, ""

    def mark_detail(self, detail):
        """Note that it has got further within what it does."""
        self.marks, self.detail = self.marks + 1, f", {detail}"

    def counting(self, on_batch):
        """`on_batch(n)` for a sampler of which each rank draws a share.

        It is told of all ranks' samples, and marks progress too.
        """

        def told(n):
            self.mark_detail(f"{n} samples more")
            if on_batch:
                on_batch(n * self.size)

        return told

    # Tensors on the run's device

    def sum(self, tensor):
        """The sum over ranks of a tensor, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor, into=None):
        """Tensors of one shape from all ranks, [size, *shape].

        into: a contiguous tensor of that shape to be filled.
        """
        if self.size == 1:
            return tensor[None] if into is None else into.copy_(tensor[None])
        into = tensor.new_empty(self.size, *tensor.shape) if into is None else into
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.14's name, and an older one
        gather(into.view(self.size * tensor.shape[0], *tensor.shape[1:]) if tensor.ndim else into, tensor.contiguous())
        return into

    def gather_shares(self, tensor, count):
        """The results [share, ...] of all ranks' shares as one tensor [count, ...]."""
        return tensor if self.size == 1 else self.gather(tensor).flatten(0, 1)[:count]

    def broadcast(self, tensors):
        """Overwrite tensors by rank 0's, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    # Values on the host

    def from_main(self, function):
        """What `function` returns on rank 0, where alone it is called, on every rank.

        The value has to be picklable and small.
        """
        if self.size == 1:
            return function()
        values = [function() if self.is_main else None]
        dist.broadcast_object_list(values, 0, group=self.control)
        return values[0]

    def tensors_from_main(self, function):
        """{name: tensor on the CPU} that `function` returns on rank 0, where alone it is called, on every rank."""
        if self.size == 1:
            return function()
        read = function() if self.is_main else None
        described = self.from_main(lambda: [(name, value.shape, value.dtype) for name, value in read.items()])
        tensors = {}
        for name, shape, dtype in described:
            value = read[name].to(self.device) if self.is_main else torch.empty(shape, dtype=dtype, device=self.device)
            dist.broadcast(value, 0)
            tensors[name] = value.cpu()
        return tensors

    def all(self, value):
        """A small picklable value from each rank, as a list."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def greatest(self, number):
        """The greatest of one int from each rank, on the host, without waiting for the device."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    # Life and death

    @contextlib.contextmanager
    def watched(self, timeout):
        """Within it the ranks watch each other, and an error on one of them ends all.

        Rank 0 raises or prints it, the others leave silently.
        timeout: seconds that a main thread may take from one `mark` to the next.
        """
        if self.size == 1:
            yield
            return
        liveness = Liveness(self, timeout)
        try:
            yield
            self.mark("ending")
            self.from_main(lambda: None)
            liveness.stopped.set()
            # Rank 0 takes the store with it when it leaves: by then nobody may look there any more.
            dist.barrier(group=self.control)
        except Interrupted:  # all ranks have agreed on it
            raise
        except BaseException as error:
            liveness.end_by(error)
            raise
        finally:
            liveness.stop()


ALONE = World()


def samples_per_rank(what, count, size):
    """count / size, the share of each rank; ValueError where it is not whole, naming `what` was to be split."""
    if count % size:
        raise ValueError(f"{what}: {count} cannot be split over {size} processes; use a multiple of {size}")
    return count // size


def processes():
    """How many processes a launcher has started for this run: 1 without one."""
    return _from_environment("WORLD_SIZE", 1, least=1, most=MOST_PROCESSES)


def connect(config):
    """The `World` of this process: alone, or connected to the others that the launcher has started.

    Called again, it gives the same one. Raises ValueError where the master cannot be reached, ranks do not come within
    `distributed.connect_timeout` seconds, or a rank's device is not there.
    """
    global _world
    if _world is not None:
        return _world
    size = processes()
    if size == 1:
        return ALONE
    rank, local_rank = _from_environment("RANK"), _from_environment("LOCAL_RANK", 0, least=0, most=MOST_PROCESSES)
    if not 0 <= rank < size:
        raise ValueError(f"RANK: {rank} is not below WORLD_SIZE, {size}; {LAUNCHER}")
    address, store = _reach_master(rank, config.distributed.connect_timeout)
    try:
        _meet(rank, size, config.distributed.connect_timeout, address, store)
        device = _agreed_device(config.device, local_rank, rank, size, store)
    except RuntimeError as error:  # the store lives in rank 0's process
        reason = str(error).splitlines()[0]
        raise ValueError(f"master {address}: rank 0 has left before all had met ({reason})") from None
    timeout = datetime.timedelta(seconds=config.distributed.timeout)
    group = {"store": dist.PrefixStore("group", store), "rank": rank, "world_size": size, "timeout": timeout}
    dist.init_process_group(_collectives(device), **group)
    # Agreements of the hosts never wait for a device, so they have a group of their own there.
    control = dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else None
    _world = World(rank, size, local_rank, device, store, address, control)
    return _world


def _collectives(device):
    """torch's name of the library that sends tensors on a kind of device."""
    return "nccl" if device.type == "cuda" else "gloo"


def meet_alone(device):
    """Say to DeepSpeed on what kind of device it works, and in a process that has met no others make a group of one."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when it is imported
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # which DeepSpeed takes for the number of the GPU
        dist.init_process_group(_collectives(device), store=dist.HashStore(), rank=0, world_size=1)


def connected():
    """Whether this process is one of several and has reached rank 0, which speaks for it then."""
    return _met


def disconnect():
    """Let go of the other processes, at the end of a command."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _from_environment(name, default=None, least=None, most=None):
    text = os.environ.get(name, default)
    if text is None:
        raise ValueError(f"{name}: not set, and WORLD_SIZE is; {LAUNCHER}")
    try:
        number = int(text)
    except ValueError:
        raise ValueError(f"{name}: {text[:80]!r} in the environment is not a number; {LAUNCHER}") from None
    if least is not None and not least <= number <= most:
        raise ValueError(f"{name}: {number} in the environment is not between {least} and {most}; {LAUNCHER}")
    return number


def _agreed_device(name, local_rank, rank, size, store):
    """This rank's device, if all ranks have found one.

    Otherwise the ValueError of the first that has not, on all of them.
    """
    try:
        device, problem = _device(name, local_rank), ""
    except ValueError as error:
        device, problem = None, str(error)
    store.set(f"device/{rank}", problem)
    problems = [(other, text) for other in range(size) if (text := store.get(f"device/{other}").decode())]
    if problems:
        _all_have_read(rank, size, store)
        bad_rank, text = problems[0]
        # What all ranks say is not one rank's.
        raise ValueError(text if len(problems) == size else f"rank {bad_rank}: {text}")
    return device


def _all_have_read(rank, size, store):
    """Keep rank 0, and the store with it, until the others know why it leaves.

    Not for long, should one of them be gone.
    """
    store.set(f"read/{rank}", "")
    deadline, keys = time.monotonic() + 5, [f"read/{other}" for other in range(size)]
    while rank == 0 and time.monotonic() < deadline and not store.check(keys):
        time.sleep(0.05)


def _device(name, local_rank):
    """A rank's own device: the GPU of its number on this machine, or the CPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        problem = f"{name!r} is one device and there are several processes"
        raise ValueError(f"device: {problem}; use auto or cuda, which give each its own")
    count = torch.cuda.device_count()
    if local_rank >= count:
        problem = f"process {local_rank} of this machine has no GPU, it has {count}"
        raise ValueError(f"device: {problem}; start as many processes as there are GPUs")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _reach_master(rank, timeout):
    """(address, store): the key-value store that rank 0 serves at MASTER_ADDR and MASTER_PORT."""
    global _met
    host = os.environ.get("MASTER_ADDR")
    if not host:
        raise ValueError(f"MASTER_ADDR: not set, and WORLD_SIZE is; {LAUNCHER}")
    port = _from_environment("MASTER_PORT", least=1, most=65535)
    address = f"{host}:{port}"
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun serves one by itself
    try:
        store = dist.TCPStore(host, port, None, serves, datetime.timedelta(seconds=timeout), wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        if serves:
            said = str(error).splitlines()[0]
            problem = f"rank {rank} cannot serve it; is the address in use, or another machine's? {said}"
        else:
            late = f"it did not answer within {timeout:g} s (distributed.connect_timeout)"
            problem = f"rank {rank} cannot reach it; {late}"
        raise ValueError(f"master {address}: {problem}".strip()) from None
    _met = True
    return address, store


def _meet(rank, size, timeout, address, store):
    """Return when all ranks have come to the store."""
    store.set(f"here/{rank}", socket.gethostname())
    deadline, missing = time.monotonic() + timeout, list(range(size))
    while missing := [other for other in missing if not store.check([f"here/{other}"])]:
        if time.monotonic() > deadline:
            late = f"did not come within {timeout:g} s (distributed.connect_timeout)"
            raise ValueError(f"master {address}: {_ranks(missing)} {late}")
        time.sleep(0.05)


def _ranks(numbers):
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"
