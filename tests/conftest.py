"""Settings that every test shares."""

import os

import pytest
import torch

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
torch.set_num_threads(min(2, os.cpu_count() or 1))


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
