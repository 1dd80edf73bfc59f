"""Input-adaptive quantisation: activations take 4, 7, 8 or 16 bits as each input needs, weights 8 or 4.

::

    packed, scale = pack_linear_weight(layer.weight, bits=8)
    with torch.inference_mode():
        out, bits = linear_dynamic(x, packed, scale, layer.bias, out_features=layer.out_features)

``bits`` says which width each row took. Formulas, layouts and limits are in ops/sluice/quantize.h
and quantize_recurrent.h.
"""

from torch_sluice.quantize import operators
from torch_sluice.quantize.functional import (
    DEFAULT_OUTLIER_RATIO,
    DEFAULT_TARGET_SQNR,
    Quantized,
    conv2d_dynamic,
    linear_dynamic,
    lookup_linear_weight,
    pack_conv2d_weight,
    pack_linear_weight,
    quantize_dynamic,
    unpack_linear_weight,
)
from torch_sluice.quantize.recurrent import (
    DEFAULT_STATE_BITS,
    PackedMatrix,
    gru_dynamic,
    lstm_dynamic,
    run_recurrent,
    run_recurrent_cell,
)

__all__ = [
    "DEFAULT_OUTLIER_RATIO",
    "DEFAULT_STATE_BITS",
    "DEFAULT_TARGET_SQNR",
    "PackedMatrix",
    "Quantized",
    "conv2d_dynamic",
    "gru_dynamic",
    "linear_dynamic",
    "lookup_linear_weight",
    "lstm_dynamic",
    "operators",
    "pack_conv2d_weight",
    "pack_linear_weight",
    "quantize_dynamic",
    "run_recurrent",
    "run_recurrent_cell",
    "unpack_linear_weight",
]
