"""Loading happens in a process of its own: a bad schema throws in a static initialiser and takes Python down."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import torch_sluice

CUDA_LIBRARY = Path(__file__).parents[2] / "build/cuda/libsluice_torch.so"

WITHOUT_THE_PACKAGE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 33, 8) for _ in range(3))
a, b = torch.randn(1, 2, 33), torch.randn(1, 2, 33)
out, lse, kept = torch.ops.sluice.gated_attention(q, k, v, a, b, *[None] * 8, True, 0, 0, 0, 0.0, 0.0, 8**-0.5)
scores = (q @ k.mT * 8**-0.5).masked_fill(torch.ones(33, 33).triu(1).bool(), -torch.inf)
expected = scores.softmax(-1) * torch.sigmoid(a[..., None] + b[..., None, :]) @ v
torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-4, atol=1e-5)
assert "torch_sluice" not in sys.modules  # torch_sluice_backend, which torch itself imports, is another package
print("right")
"""


def run_python(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("build", ["installed", "cuda"])
def test_load_library_alone_gives_working_operators(build):
    library = torch_sluice.library_path() if build == "installed" else CUDA_LIBRARY
    if not Path(library).is_file():
        pytest.skip("the cuda preset is not built: it needs nvcc")
    process = run_python(WITHOUT_THE_PACKAGE, str(library))
    assert (process.returncode, process.stdout) == (0, "right\n"), process.stderr


WHICH_KERNELS = """
import ctypes, sys, torch
torch.ops.load_library(sys.argv[1])
built = ctypes.CDLL(sys.argv[1]).sl_cuda_built
built.restype = ctypes.c_bool
names = sorted({name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("sluice::")})
for name in names:
    print(name, *(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in ("CPU", "CUDA")), built())
"""
CPU_ONLY = (  # on other devices torch serves norms, and nothing quantises or reads pages
    *("channel_norms", "conv2d_dynamic", "gru_dynamic", "linear_dynamic", "lstm_dynamic", "pack_conv2d_weight"),
    *("pack_linear_weight", "quantize_dynamic", "unpack_linear_weight", "lookup_linear_weight"),
    "gated_attention_paged",
)
OPERATORS = sorted(
    (*CPU_ONLY, "accumulate_", "gated_attention", "gated_attention_backward", "measure_gradient", "read_accumulator")
)


@pytest.mark.parametrize("build", ["installed", "cuda"])
def test_every_operator_has_its_kernels(build):
    """For the CPU always; for CUDA all of them or, in a build without, none; and the C core says which it is."""
    library = torch_sluice.library_path() if build == "installed" else CUDA_LIBRARY
    if not Path(library).is_file():
        pytest.skip("the cuda preset is not built: it needs nvcc")
    process = run_python(WHICH_KERNELS, str(library))
    assert process.returncode == 0, process.stderr
    cuda = "True" if build == "cuda" else process.stdout.split()[-1]
    assert process.stdout.splitlines() == [
        f"sluice::{name} True {False if name in CPU_ONLY else cuda} {cuda}" for name in OPERATORS
    ]


def test_loading_twice_and_importing_after_loading_is_harmless():
    code = "import sys, torch; torch.ops.load_library(sys.argv[1]); import torch_sluice; torch_sluice._library.load()"
    process = run_python(code, torch_sluice.library_path())
    assert (process.returncode, process.stdout) == (0, ""), process.stderr


def test_a_missing_library_is_named():
    process = run_python("import torch_sluice", SLUICE_LIBRARY="/no/such/library.so")
    assert process.returncode == 1
    assert "ImportError: SLUICE_LIBRARY points to /no/such/library.so, and there is no such file" in process.stderr


def test_the_version_stands_in_one_place():
    header = (Path(__file__).parents[2] / "ops/sluice/version.h").read_text()
    assert f'SL_VERSION_STRING "{torch_sluice.__version__}"' in header
