"""The gate that learns: which key-token pairs are worth computing, taught while the model trains.

``torch_sluice.attention.trainer`` has a callback for the Trainer of Hugging Face transformers.
"""

from torch_sluice.attention.controller import DensityController, QualityController, parameter_groups
from torch_sluice.attention.density import kept_pairs
from torch_sluice.attention.forward import attend
from torch_sluice.attention.gate import PHASES, Gate
from torch_sluice.attention.sharding import shard_gates

__all__ = [
    "PHASES",
    "DensityController",
    "Gate",
    "QualityController",
    "attend",
    "kept_pairs",
    "parameter_groups",
    "shard_gates",
]
