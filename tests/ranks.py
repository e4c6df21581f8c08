"""Several CPU ranks on this machine, without a launcher: forked from a server that has imported everything once."""

import contextlib
import multiprocessing
import os
import socket
import time
import traceback

CONTEXT = multiprocessing.get_context("forkserver")


def free_port():
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(function, size, *arguments, timeout=180):
    """[function(*arguments) of each rank], called in processes with a launcher's environment; AssertionError with the traceback of the first that failed.

    function: of a test module's top level; its result has to be picklable. A rank that ended without a result is reported with its exit code.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    CONTEXT.set_forkserver_preload(["hsivi_fast.trainer", "hsivi_fast.report", "deepspeed", "torch.utils.tensorboard", "sklearn.datasets"])
    port, processes, pipes = free_port(), [], []
    for rank in range(size):
        mine, theirs = CONTEXT.Pipe(duplex=False)
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(CONTEXT.Process(target=_rank, args=(theirs, environment, function, arguments)))
        processes[-1].start()
        theirs.close()
        pipes.append(mine)
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
        for process in processes:
            process.join(20 if len(results) == size else 1)
            if process.is_alive():
                process.kill()
    return results


def _rank(pipe, environment, function, arguments):
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        result = True, function(*arguments)
    except BaseException:
        result = False, traceback.format_exc()
    with contextlib.suppress(BrokenPipeError):
        pipe.send(result)
    pipe.close()
