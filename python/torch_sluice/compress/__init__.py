"""``torch_sluice.compress``: structured pruning and input-adaptive quantisation under a measured promise."""

from torch_sluice.compress.norms import channel_norms
from torch_sluice.compress.outputs import Agreement
from torch_sluice.compress.pipeline import compress
from torch_sluice.compress.quantized import QuantizedConv2d, QuantizedLinear, count_bits
from torch_sluice.compress.report import CompressionReport, LayerDecision
from torch_sluice.compress.storage import load, save

# torch_sluice.compress is the function, as torch_sluice.accumulate is: what belongs to it hangs on it.
compress.save, compress.load, compress.count_bits, compress.Agreement = save, load, count_bits, Agreement

__all__ = [
    "Agreement",
    "CompressionReport",
    "LayerDecision",
    "QuantizedConv2d",
    "QuantizedLinear",
    "channel_norms",
    "compress",
    "count_bits",
    "load",
    "save",
]
