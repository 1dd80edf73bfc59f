"""The operator library stands on LibTorch's stable ABI alone, so one file serves every torch from 2.11 on."""

import re
import subprocess
from pathlib import Path

import pytest
import torch_abi_audit

import torch_sluice

CUDA_LIBRARY = Path(__file__).parents[2] / "build/cuda/libsluice_torch.so"
TORCH = {"libtorch_cpu.so", "libtorch.so"}
LIBC = re.compile(r"lib(c|m|stdc\+\+|gcc_s|pthread|dl|rt)\.so\.\d+|ld-linux-.*\.so\.\d+")


@pytest.fixture(params=["installed", "cuda"])
def library(request):
    """The installed library, and the one of the cuda preset."""
    if request.param == "installed":
        return Path(torch_sluice.library_path())
    if not CUDA_LIBRARY.is_file():
        pytest.skip("the cuda preset is not built: it needs nvcc")
    return CUDA_LIBRARY


def test_torch_abi_audit_finds_the_library_stable(library):
    verdict = torch_abi_audit.inspect_extension(library).torch
    assert verdict.uses_torch
    assert verdict.unstable_symbols == ()
    assert verdict.unknown_shim_symbols == ()
    assert verdict.stable
    assert verdict.min_torch_version == "2.11.0"


def test_the_library_needs_torch_and_libc_only_and_finds_them_without_a_path_of_its_own(library):
    section = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", section)
    assert "libtorch_cpu.so" in needed
    # With CUDA kernels also libtorch.so, through which the current stream is found where torch has CUDA.
    assert [name for name in needed if name not in TORCH and not LIBC.fullmatch(name)] == []
    assert "RPATH" not in section
    assert "RUNPATH" not in section
