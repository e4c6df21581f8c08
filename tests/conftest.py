"""Settings that every test shares, and the backend as a parameter."""

import os

import pytest
import torch
from devices import KERNEL_DEVICE

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# The subprocesses of some tests run beside this one: spinning threads would starve them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor would ask a compiler what the processor's own description says: three programs for each empty cache.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# A process of a test would compile every module of ours again where byte code is not kept: a tenth of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined, so before anything imports them
    from interpreting import spare_the_interpreter_work

    spare_the_interpreter_work()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_choices_from_outside(monkeypatch):
    """A launcher's variables around the test run must not look like our own, nor a backend chosen in another test."""
    from hsivi_fast import ops

    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    monkeypatch.setattr(ops, "_chosen", None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # torch's default is 10 bits in convolutions


@pytest.fixture(scope="module")
def no_report():
    """Trainings of this file end without their page: drawing it takes most of a short one's time."""
    from hsivi_fast.training import trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "write_report", lambda *arguments, **options: None)
        yield


@pytest.fixture
def traced_only(monkeypatch):
    """Have `compile=true` trace and derive the networks without making code of them, which takes a minute a network.

    The list of the graphs.
    """
    from torch._dynamo.backends.debugging import aot_eager

    from hsivi_fast.execution import Execution

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def compiled(self, network):
        if not self.compile:
            return network
        return torch.compile(network, dynamic=False, fullgraph=True, backend=backend)

    monkeypatch.setattr(Execution, "compiled", compiled)
    return graphs


@pytest.fixture(params=["torch", "triton"])
def backend_device(request):
    """The device to use while each backend in turn is the process's choice."""
    from hsivi_fast import ops

    device = "cpu" if request.param == "torch" else KERNEL_DEVICE
    ops.choose_backend(request.param, device)
    return device


# Three files run at a time: the longest start first, so that none of them is left for the end with a core idle.
# test_parity.py stands behind test_execution.py, whose compiled code it uses again.
LONGEST_FIRST = [
    "test_kernels_aot.py",
    "test_launch.py",
    "test_execution.py",
    "test_export.py",
    "test_faults.py",
    "test_kernels.py",
    "test_nets.py",
    "test_edm_networks.py",
    "test_class_runs.py",
    "test_latent_runs.py",
    "test_operators.py",
    "test_parity.py",
    "test_density_runs.py",
    "test_stops.py",
    "test_report.py",
    "test_start.py",
    "test_density_cli.py",
    "test_annealing.py",
    "test_reference.py",
    "test_resume_ranks.py",
    "test_hostile_sample.py",
    "test_writers.py",
    "test_evaluation.py",
    "test_inception.py",
    "test_cli.py",
    "test_improvement.py",
    "test_memory_estimate.py",
    "test_torch_files.py",
    "test_resume.py",
    "test_sampler.py",
    "test_bench_scripts.py",
    "test_bench_ablation.py",
    "test_bench_train_step.py",
    "test_golden_training.py",
    "test_command_line_faults.py",
    "test_journal.py",
]


def pytest_collection_modifyitems(items):
    """The order of files, and tests marked gpu: they need a CUDA device and are counted as skipped without one."""
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
