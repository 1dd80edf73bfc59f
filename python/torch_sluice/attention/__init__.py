"""The gate that learns: which key-token pairs are worth computing, taught while the model trains."""

from torch_sluice.attention.forward import attend
from torch_sluice.attention.gate import Gate

__all__ = ["Gate", "attend"]
