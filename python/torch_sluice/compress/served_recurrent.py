"""What ``nn.LSTM``, ``nn.GRU`` and their cells make of quantised weights: they run on integer kernels where all of a
layer's matrices are quantised, else in floating point."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_sluice.compress.quantized import QuantizedWeight
from torch_sluice.quantize.operators import FLOATS
from torch_sluice.quantize.recurrent import PackedMatrix, run_recurrent, run_recurrent_cell

_LAYERS = {torch._VF.lstm: "lstm", torch._VF.gru: "gru"}
_CELLS = {torch._VF.lstm_cell: "lstm", torch._VF.gru_cell: "gru"}
SERVED = frozenset([*_LAYERS, *_CELLS])


def flat_weights(function: Callable, args: tuple) -> list[Tensor]:
    """Of a call of one of ``SERVED``: the matrices and biases, in torch's order."""
    if function in _CELLS:
        return list(args[2:4])
    return list(args[3] if _is_sequence(args) else args[2])


def _is_sequence(args: tuple) -> bool:
    """Whether a call is of a PackedSequence: (data, batch_sizes, hx, weights, ..) instead of (x, hx, weights, ..)."""
    return isinstance(args[3], (list, tuple))


def call(function: Callable, args: tuple, kwargs: dict[str, Any], note: Callable | None):
    """Runs a call that has a quantised weight among its arguments.

    Args:
        note: ``note(bits, weight)`` is told the widths that rows took; None: nobody wants to know.
    """
    weights = flat_weights(function, args)
    matrices = [weight for weight in weights if weight.dim() == 2]
    served = all(isinstance(matrix, QuantizedWeight) and matrix.kind == "linear" for matrix in matrices)
    if not served or kwargs or args[0].dtype not in FLOATS or _drops_out(function, args):
        return _in_float(function, args, kwargs)
    chosen = matrices[0].options
    options = {
        "activation_bits": chosen.policy, "target_sqnr": chosen.target_sqnr, "outlier_ratio": chosen.outlier_ratio,
        "on_bits": None if note is None else lambda bits: note(bits, matrices[0]),
    }  # fmt: skip
    if function in _CELLS:
        x, hx, *_ = args
        return run_recurrent_cell(_CELLS[function], x, hx, *map(_packed, weights), *args[4:], **options)
    packed = [_packed(weight) if isinstance(weight, QuantizedWeight) else weight for weight in weights]
    if _is_sequence(args):
        x, batch_sizes, hx, _, biases, layers, _, _, both = args
        return run_recurrent(_LAYERS[function], x, hx, packed, biases, layers, both, False, batch_sizes, **options)
    x, hx, _, biases, layers, _, _, both, batch_first = args
    return run_recurrent(_LAYERS[function], x, hx, packed, biases, layers, both, batch_first, **options)


def _packed(weight: QuantizedWeight) -> PackedMatrix:
    return PackedMatrix(weight.packed, weight.scale, weight.options.weight_bits, weight.options.group_size)


def _drops_out(function: Callable, args: tuple) -> bool:
    """In training mode, with dropout between layers."""
    if function in _CELLS:
        return False
    dropout, training = args[6:8] if _is_sequence(args) else args[5:7]
    return training and dropout > 0


def _in_float(function: Callable, args: tuple, kwargs: dict[str, Any]):
    args, kwargs = tree_map_only(QuantizedWeight, QuantizedWeight.unpack, (args, kwargs))
    return function(*args, **kwargs)
