"""The sum of one parameter's gradients over a window, in one of three formats."""

import math

import torch

from torch_sluice.accumulate import operators
from torch_sluice.accumulate.operators import STATS, count_blocks, has_kernels

FORMATS = ("fp16", "fp32", "torch")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_supported(parameter: torch.Tensor) -> bool:
    """Whether Sluice's kernels take the gradients of this parameter; others are added up by torch."""
    return parameter.dtype in _KERNEL_DTYPES and has_kernels(parameter.device.type)


class Accumulator:
    """Gradients of one parameter, added up.

    ``format`` is "fp32", "fp16" (float16 with an exponent per block of 1024 elements, see ops/sluice/accumulate.h), or
    "torch": a tensor of the gradient's own kind, for what the kernels do not take (float64, complex, sparse, devices
    without kernels). The sum is ``scale`` times what the buffer holds. Memory is allocated at the first gradient and,
    for "fp16", kept for the next window; an "fp32" sum takes the first gradient's memory over and hands it on as
    ``.grad``, so neither copies.
    """

    def __init__(self, parameter: torch.Tensor, format: str):
        self.parameter = parameter
        self.format = format
        self.buffer: torch.Tensor | None = None
        self.exponents: torch.Tensor | None = None
        self.scale = 1.0
        self.empty = True
        self.is_measured = True  # else the buffer is the only gradient so far, of which nothing is known

    def start(self, format: str, parameter: torch.Tensor) -> None:
        """Forgets the sum and chooses the format of the next one, of gradients of this parameter."""
        if format != self.format or (self.buffer is not None and self.buffer.shape != parameter.shape):
            self.buffer = self.exponents = None
        self.parameter, self.format = parameter, format
        self.clear()

    def clear(self) -> None:
        """Forgets the sum."""
        if self.format == "torch":
            self.buffer = None
        self.scale = 1.0
        self.empty = self.is_measured = True

    def add(self, grad: torch.Tensor, weight: float, seed: int | None) -> torch.Tensor | None:
        """Adds weight * grad. Returns the six statistics of ops/sluice/accumulate.h as a tensor, those of the sum being
        of what the buffer holds; None where the gradient's memory was taken over, and nothing was measured."""
        if self.empty:
            self.scale, weight = (weight, 1.0) if weight != 0.0 else (1.0, 0.0)
        else:
            weight /= self.scale
        if grad.layout != torch.strided or self.format == "torch" or grad.dtype not in _KERNEL_DTYPES:
            return self._add_by_torch(grad, weight)
        if self.empty and weight == 1 and self.format == "fp32" and _owns_its_memory(grad, self.parameter):
            self.buffer, self.empty, self.is_measured = grad, False, False
            return None
        if self.empty and self.buffer is None:
            self._allocate()
        overwrite, self.empty = self.empty, False
        return operators.accumulate_(self.buffer, self.exponents, grad, weight, overwrite, seed)

    def _allocate(self) -> None:
        dtype = torch.float16 if self.format == "fp16" else torch.float32
        self.buffer = torch.empty_like(self.parameter, dtype=dtype, requires_grad=False)
        if self.format == "fp16":
            blocks = count_blocks(self.buffer.numel())
            self.exponents = torch.empty(blocks, dtype=torch.int8, device=self.buffer.device)

    def _add_by_torch(self, grad: torch.Tensor, weight: float) -> torch.Tensor:
        if self.format != "torch":  # the first sparse gradient of a parameter that had dense ones
            self.buffer = None if self.empty else self._read_as(torch.float32)
            self.format, self.exponents = "torch", None
        grad = grad if weight == 1 else grad * weight
        self.buffer = grad if self.empty else self.buffer + grad
        self.empty = False
        return _measure_by_torch(grad, self.buffer)

    def promote(self) -> None:
        """Goes on in float32; what is in float16 so far is kept exactly."""
        if self.format != "fp16":
            return
        if not self.empty:
            self.buffer = self._read_as(torch.float32)
        else:
            self.buffer = None
        self.format, self.exponents = "fp32", None

    def _read_as(self, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        out = torch.empty_like(self.buffer, dtype=dtype)
        operators.read_accumulator(self.buffer, self.exponents, scale, out)
        return out

    def take(self, factor: float) -> torch.Tensor:
        """The sum times factor in the parameter's dtype. A float32 sum gives its memory away and is empty then; the
        others stay as they are."""
        scale = self.scale * factor
        if self.format == "torch":
            taken = self.buffer if scale == 1 else self.buffer * scale
            return taken if taken.dtype == self.parameter.dtype else taken.to(self.parameter.dtype)
        if self.parameter.dtype not in _KERNEL_DTYPES:  # it changed since the first gradient
            return self._read_as(torch.float32).to(self.parameter.dtype).mul_(scale)
        if self.format == "fp32" and self.parameter.dtype == torch.float32:
            out, self.buffer, self.empty = self.buffer, None, True
            if scale != 1:
                operators.read_accumulator(out, None, scale, out)
            return out
        return self._read_as(self.parameter.dtype, scale)

    def bytes_in(self, format: str) -> int:
        """Bytes that a sum in this format takes."""
        elements = self.parameter.numel()
        if format == "fp16":
            return 2 * elements + count_blocks(elements)
        return elements * (4 if format == "fp32" else self.parameter.element_size())

    def state_dict(self) -> dict:
        kept = None if self.empty else self.buffer
        exponents = None if self.empty else self.exponents
        return {"format": self.format, "buffer": kept, "exponents": exponents, "scale": self.scale}

    def check_state_dict(self, state: dict) -> None:
        """Raises ValueError, KeyError or TypeError for a state that load_state_dict() can't take."""
        if state["format"] not in FORMATS:
            raise ValueError(f"format is {state['format']!r}, expected one of {', '.join(FORMATS)}")
        buffer, exponents = state["buffer"], state["exponents"]
        if not math.isfinite(float(state["scale"])):
            raise ValueError(f"its scale is {state['scale']}, expected a finite number")
        if buffer is None:
            return
        if buffer.shape != self.parameter.shape:
            raise ValueError(f"its sum has shape {list(buffer.shape)}, expected {list(self.parameter.shape)}")
        if state["format"] == "torch":
            return
        dtype = torch.float16 if state["format"] == "fp16" else torch.float32
        if buffer.dtype != dtype:
            raise ValueError(f"its {state['format']} sum is {buffer.dtype}, expected {dtype}")
        blocks = count_blocks(buffer.numel()) if state["format"] == "fp16" else None
        found = None if exponents is None else exponents.numel()
        if exponents is not None and exponents.dtype != torch.int8:
            raise ValueError(f"its exponents are {exponents.dtype}, expected torch.int8")
        if found != blocks:
            raise ValueError(f"its {state['format']} sum has {found} exponents, expected {blocks}")

    def load_state_dict(self, state: dict) -> None:
        """Takes the sum over from a state that check_state_dict() has passed."""
        buffer, exponents = state["buffer"], state["exponents"]
        device = self.parameter.device
        self.clear()
        self.format, self.scale, self.empty = state["format"], float(state["scale"]), buffer is None
        self.buffer = None if buffer is None else buffer.to(device, copy=True)
        self.exponents = None if exponents is None else exponents.to(device, copy=True)


def _owns_its_memory(grad: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Whether a gradient may become the sum: float32, laid out as its parameter, in memory that it has to itself (a
    view into a bucket of DDP is written to by others)."""
    return (
        grad.dtype == torch.float32
        and grad.stride() == parameter.stride()
        and grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()
        and grad._base is None
    )


def _measure_by_torch(grad: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    stats = torch.zeros(STATS, dtype=torch.float64, device=grad.device)
    magnitudes = (grad.coalesce().values() if grad.is_sparse else grad).abs().double()
    finite = magnitudes.isfinite()
    kept = magnitudes[finite]
    stats[0] = kept.square().sum()
    stats[1] = kept.max() if kept.numel() else 0
    stats[2] = magnitudes.numel() - finite.sum()
    values = total.coalesce().values() if total.is_sparse else total
    stats[3] = values.abs().double().square().sum().nan_to_num(torch.inf)
    return stats
