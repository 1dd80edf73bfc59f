"""Sluice: gated sparse attention and mixed-precision gradient accumulation for PyTorch."""

import torch_sluice_backend
from torch_sluice import _library
from torch_sluice._library import library_path

_library.load()
torch_sluice_backend.register()

from torch_sluice.accumulate import accumulate  # noqa: E402
from torch_sluice.compress import compress  # noqa: E402
from torch_sluice.functional import gated_attention  # noqa: E402
from torch_sluice.kv_cache import KVCache  # noqa: E402
from torch_sluice.modes import dropped_bound  # noqa: E402
from torch_sluice.modules import GatedAttention  # noqa: E402
from torch_sluice.monitor import Monitor  # noqa: E402
from torch_sluice.paged import gated_attention_paged  # noqa: E402
from torch_sluice.plan import plan  # noqa: E402
from torch_sluice.swap import (  # noqa: E402
    attention_function,
    gate_parameters,
    load_gates,
    restore,
    save_gates,
    swap_attention,
)
from torch_sluice.varlen import gated_attention_varlen  # noqa: E402

__version__ = _library.version()
__all__ = [
    "GatedAttention",
    "KVCache",
    "Monitor",
    "accumulate",
    "attention_function",
    "compress",
    "dropped_bound",
    "gate_parameters",
    "gated_attention",
    "gated_attention_paged",
    "gated_attention_varlen",
    "library_path",
    "load_gates",
    "plan",
    "restore",
    "save_gates",
    "swap_attention",
]
