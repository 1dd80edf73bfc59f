"""Which operators compute what MFU counts: the rule by which one without a formula makes the count unknown.

MFU counts contractions: matrix products, convolutions, attention, recurrent layers. Elementwise operators, reductions,
normalisation, pooling, interpolation, look-ups, sorting, copies and communication do little for each number that they
move, and are left out, as is usual. An operator that contracts and has no formula must not be left out in silence:

- Of torch's own operators the name tells: one of its words is that of a contraction, a Fourier transform, a
  factorisation or a solver ("mm", "conv2d", "attention", "lstm", "fft", "cholesky", ...). Operators that torch tags as
  pointwise, that give no tensor, or that only pack or reorder weights do not compute.
- Of every other library's operators nothing is known: each computes, unless it is tagged as pointwise. A formula says
  otherwise: ``torch.utils.flop_counter.register_flop_formula``, which may return 0.
"""

import functools
import re

import torch

_OF_TORCH = {
    "aten", "prim", "prims", "quantized", "_quantized", "quantization", "onednn", "mkldnn", "mkldnn_prepacked", "mkl",
    "sparse", "c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem", "fsdp", "_dtensor", "inductor",
    "inductor_prims", "rngprims", "profiler", "streams", "debugprims", "debug_mode_ops", "export", "static_runtime",
    "_native",
}  # fmt: skip

# What the operators of Sluice do beside those in ``formulas``: quantise, pack, add up gradients, measure.
_CHEAP_OF_SLUICE = {
    "quantize_dynamic", "pack_linear_weight", "unpack_linear_weight", "lookup_linear_weight", "pack_conv2d_weight",
    "read_accumulator", "measure_gradient", "accumulate_", "channel_norms",
}  # fmt: skip

_CONTRACTION = re.compile(
    r"(?:^|_)(?:[a-z0-9]*mm|matmul|[a-z0-9]*mv|v?dot|addr|q?conv(?!ert)[a-z0-9]*|trilinear|q?linear|attention|attn"
    r"|transformer|rnn|lstm|gru|fft|[cp]dist|euclidean|linalg|cholesky|geqrf|ormqr|qr|svd|lu|eig[a-z]*|[a-z]*solve"
    r"|affine_grid)(?:_|$)"
)
_HANDLES_WEIGHTS = re.compile(r"(?:^|_)(?:pack|prepack|unpack|reorder|flatten)(?:_|$)|quantize_weight$")
_MERELY_NAMED_SO = re.compile(
    r"^_thnn_"  # the elementwise part of a recurrent cell; its products are operators of their own
    r"|^fft_r?fftfreq$|^fft_i?fftshift$"  # numbers and a permutation for a Fourier transform
    r"|^_?linalg_(?:vector_norm|_powsum|cross|diagonal|check_errors)$"
)


@functools.cache
def computes(operator: torch._ops.OpOverload) -> bool:
    """Whether the operator does what MFU counts, as far as its name, tags and schema tell."""
    if torch.Tag.pointwise in operator.tags:
        return False
    library, _, name = qualified_name(operator).partition("::")
    if library == "sluice":
        return name not in _CHEAP_OF_SLUICE
    if library not in _OF_TORCH:
        return True
    schema = operator._schema
    if not schema.is_mutable and not any("Tensor" in str(result.type) for result in schema.returns):
        return False
    if _HANDLES_WEIGHTS.search(name) or _MERELY_NAMED_SO.search(name):
        return False
    return bool(_CONTRACTION.search(name))


def qualified_name(operator) -> str:
    """As "aten::mm", without the overload."""
    if isinstance(operator, torch._ops.OpOverload):
        return operator._schema.name
    return f"higher_order::{operator.name()}"
