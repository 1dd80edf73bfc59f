"""What torch-sluice info says of a kernel's speed is what benchmarks/results has of it."""

import json
import re

import pytest

from torch_sluice.info import MEASURED

TIERS = ("scalar", "avx2", "avx512", "avx512vnni", "avx512bf16")
# Results in which a family's kernels are timed: files are called NAME_TIER.json.
FAMILIES = {
    "gated_attention": ("attention", ("gated_attention",)),
    "accumulate": ("accumulate", ("accumulate",)),
    "channel_norms": ("prune", ("channel_norms",)),
    "quantize": ("quantize", ("quantize", "compress_models")),
}
DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def kernel_of(kernels, tier, dtype):
    """The one that dispatch takes on a processor of that tier; kernels are listed best first."""
    for kernel in kernels:
        name, _, rest = kernel.partition("_")
        if TIERS.index(name) <= TIERS.index(tier) and (not rest or rest.startswith(f"{DTYPES.get(dtype)}_")):
            return kernel
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_measured_kernels_are_those_of_the_results(family, repository):
    room, names = FAMILIES[family]
    text = (repository / "c_core" / room / "kernels.def").read_text()
    kernels = re.findall(r"^SL_\w+_KERNEL\((\w+)\)$", text, re.M)
    found = set()
    for name in names:
        for path in (repository / "benchmarks" / "results").glob(f"{name}_*.json"):
            tier = path.stem.removeprefix(f"{name}_")
            if tier in TIERS:
                found |= {kernel_of(kernels, tier, row.get("dtype")) for row in json.loads(path.read_text())}
    assert {kernel for kernel in found - {None} if not kernel.startswith("scalar")} == MEASURED[family]
