"""Sluice: gated sparse attention and mixed-precision gradient accumulation for PyTorch."""

from torch_sluice import _library
from torch_sluice._library import library_path

_library.load()

__version__ = "0.1.0"
__all__ = ["library_path"]
