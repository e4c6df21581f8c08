"""Settings that every test shares."""

import os

import pytest
import torch

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the subprocesses of some tests run beside this one: spinning threads would starve them
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_processes_from_outside(monkeypatch):
    """A launcher's variables around the test run must not look like our own."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def pytest_collection_modifyitems(items):
    """Tests marked gpu need a CUDA device and are counted as skipped without one."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
