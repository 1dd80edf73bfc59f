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


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in its own hook
def pytest_collection_modifyitems(items):
    # With `-n 2 --dist loadgroup` a file stays in one process, for what its tests share; and process groups, of which
    # each has as many processes as it has ranks, follow one another. They take longest, so they begin at once.
    items.sort(key=lambda item: PROCESS_GROUPS not in item.path.parents)
    for item in items:
        group = "process groups" if PROCESS_GROUPS in item.path.parents else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    reason = missing_gpu(torch.cuda.is_available(), has_kernels("cuda"))
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def repository():
    """Root of the source tree."""
    return Path(__file__).parent.parent
