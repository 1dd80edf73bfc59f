"""The kinds of device that tests run on, and why a GPU may be missing."""

import pytest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def missing_gpu(has_device: bool, has_kernels: bool) -> str | None:
    """Why tests on a GPU cannot run, or None."""
    if not has_device:
        return "no CUDA device on this machine"
    if not has_kernels:
        return "the operator library has no CUDA kernels: build it with -DSLUICE_BUILD_CUDA=ON"
    return None
