"""``torch_sluice.compress``: structured pruning and input-adaptive quantisation under a measured promise."""

from torch_sluice.compress.layers import count_bits, quantize_layer, unpack_weights
from torch_sluice.compress.norms import channel_norms
from torch_sluice.compress.outputs import Agreement
from torch_sluice.compress.package import Package, load_package, save_package
from torch_sluice.compress.pipeline import compress
from torch_sluice.compress.quantized import QuantizedWeight
from torch_sluice.compress.report import CompressionReport, LayerDecision
from torch_sluice.compress.storage import load, save

# torch_sluice.compress is the function, as torch_sluice.accumulate is: what belongs to it hangs on it.
compress.save, compress.load, compress.count_bits, compress.Agreement = save, load, count_bits, Agreement
compress.quantize_layer, compress.unpack_weights = quantize_layer, unpack_weights
compress.QuantizedWeight = QuantizedWeight
compress.save_package, compress.load_package = save_package, load_package

__all__ = [
    "Agreement",
    "CompressionReport",
    "LayerDecision",
    "Package",
    "QuantizedWeight",
    "channel_norms",
    "compress",
    "count_bits",
    "load",
    "load_package",
    "quantize_layer",
    "save",
    "save_package",
    "unpack_weights",
]
