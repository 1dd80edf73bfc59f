"""What all Python tests share. They run against the package that is installed, or with PYTHONPATH=python and
SLUICE_LIBRARY=... against the working tree."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from support.devices import missing_gpu

import torch_sluice
from torch_sluice.accumulate.operators import has_kernels

PROCESS_GROUPS = Path(__file__).parent / "parallel"

# No deadline: nothing here asserts on time. Derandomised, so that a run can be repeated.
settings.register_profile("sluice", deadline=None, derandomize=True)
settings.load_profile("sluice")


def pytest_report_header():
    return f"torch {torch.__version__}, operators from {torch_sluice.library_path()}"


def pytest_collection_modifyitems(items):
    # Of two processes each takes a file after the other. Process groups take longest, so they begin at once.
    items.sort(key=lambda item: PROCESS_GROUPS not in item.path.parents)
    reason = missing_gpu(torch.cuda.is_available(), has_kernels("cuda"))
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def repository():
    """Root of the source tree."""
    return Path(__file__).parent.parent
