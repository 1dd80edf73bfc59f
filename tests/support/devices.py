"""The kinds of device that tests run on, and why a GPU, or the code generator, may be missing."""

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def missing_gpu(has_device: bool, has_kernels: bool) -> str | None:
    """Why tests on a GPU cannot run, or None."""
    if not has_device:
        return "no CUDA device on this machine"
    if not has_kernels:
        return "the operator library has no CUDA kernels: build it with -DSLUICE_BUILD_CUDA=ON"
    return None


# Inductor passes the folder of torch's libraries to the linker unquoted.
INDUCTOR = pytest.mark.skipif(" " in torch.__file__, reason="torch's code generator can't link where a path has spaces")
