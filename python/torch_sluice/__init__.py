"""Sluice: gated sparse attention and mixed-precision gradient accumulation for PyTorch."""

from torch_sluice import _library
from torch_sluice._library import library_path

_library.load()

from torch_sluice.functional import gated_attention  # noqa: E402

__version__ = "0.1.0"
__all__ = ["gated_attention", "library_path"]
