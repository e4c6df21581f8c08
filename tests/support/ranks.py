"""Several CPU ranks on this machine, without a launcher: forked from a server that has imported everything once."""

import contextlib
import gc
import multiprocessing
import os
import socket
import sys
import time
import traceback

CONTEXT = multiprocessing.get_context("forkserver")
# What a rank would import when it first needs it, for seconds: the compiler with the first optimizer, for example.
PRELOADED = [
    "hsivi_fast.training.trainer",
    "hsivi_fast.training.estimate",
    "omegaconf",
    "sklearn.datasets",
    "torch._inductor.compile_fx",
    "torch.utils.tensorboard",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]


def free_port():
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(function, size, *arguments, timeout=180, on_gpus=False):
    """[function(*arguments) of each rank], called in processes with a launcher's environment.

    function: of a test module's top level; its result has to be picklable. AssertionError with the traceback of the
    first rank that failed, or with the exit code of one that ended without a result. Trainings draw no report.
    on_gpus: in new processes, since CUDA does not go through a fork.
    """

    def task(rank, pipe, environment):
        return _rank, (pipe, environment, function, arguments)

    processes, pipes = _start(size, task, on_gpus)
    results, deadline = [], time.monotonic() + timeout
    try:
        for rank, (process, pipe) in enumerate(zip(processes, pipes)):
            assert pipe.poll(max(deadline - time.monotonic(), 0)), f"rank {rank} of {size}: nothing after {timeout} s"
            try:
                succeeded, value = pipe.recv()
            except EOFError:
                process.join(10)
                raise AssertionError(f"rank {rank} of {size} ended with exit code {process.exitcode}") from None
            assert succeeded, f"rank {rank} of {size}:\n{value}"
            results.append(value)
    finally:
        _end(processes, 20 if len(results) == size else 1)
    return results


def command_on_ranks(folder, size, arguments, fault=None, environment=None, timeout=90):
    """[(exit code, what it printed)] of `hsivi` on each rank.

    arguments: a list, or a function from the rank to one; fault: for faulty_rank.py; environment: {name: value} over
    the launcher's, for all ranks. Output goes through files in `folder`. Trainings draw no report.
    """
    outputs = [folder / f"rank_{rank}.txt" for rank in range(size)]

    def task(rank, pipe, launcher):
        given = arguments(rank) if callable(arguments) else arguments
        return _command, ({**launcher, **(environment or {})}, str(outputs[rank]), given, fault)

    processes, _ = _start(size, task)
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    codes = [process.exitcode for process in processes]
    _end(processes, 0)
    return [(code, output.read_text().replace("\r", "\n")) for code, output in zip(codes, outputs)]


def seconds_since_the_kill(output):
    """What has passed since faulty_rank.py said that it ends its process."""
    (line,) = [line for line in output.splitlines() if line.startswith("KILLED")]
    return time.time() - float(line.split()[1])


def _start(size, task, on_gpus=False):
    context = multiprocessing.get_context("spawn") if on_gpus else CONTEXT
    os.environ["DS_ACCELERATOR"] = "cuda" if on_gpus else "cpu"
    CONTEXT.set_forkserver_preload(PRELOADED)
    port, processes, pipes = free_port(), [], []
    for rank in range(size):
        mine, theirs = context.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        target, arguments = task(rank, theirs, environment)
        processes.append(context.Process(target=target, args=arguments))
        processes[-1].start()
        theirs.close()
        pipes.append(mine)
    return processes, pipes


def _end(processes, patience):
    for process in processes:
        process.join(patience)
        if process.is_alive():
            process.kill()


def _rank(pipe, environment, function, arguments):
    _become(environment)
    try:
        result = True, function(*arguments)
    except BaseException:
        result = False, traceback.format_exc()
    with contextlib.suppress(BrokenPipeError):
        pipe.send(result)
    pipe.close()


def _command(environment, output, arguments, fault):
    _become(environment)
    with open(output, "wb", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if fault:
        import faulty_rank

        faulty_rank.install(fault)
    from hsivi_fast import cli
    from hsivi_fast.parallel import liveness

    # Patience for slow networks and busy interpreters; here it would be the test's whole time.
    liveness.BEAT, liveness.SILENT_IN_TROUBLE, cli.RANK_0_SPEAKS = 0.3, 3.0, 1.0
    cli.main(arguments)


def _become(environment):
    import torch

    from hsivi_fast.training import trainer

    gc.freeze()  # what is preloaded stays: DeepSpeed collects often, and each look at all of it takes half a second
    os.environ.update(environment)
    torch.set_num_threads(1)
    trainer.write_report = lambda *arguments, **options: None  # it takes longer than the trainings of tests
