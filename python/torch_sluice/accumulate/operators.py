"""The sluice:: accumulate operators as Python calls them, and what they need beside their kernels: shapes for tracing.

The three functions take what their operators take, see ops/sluice/accumulate.h, and raise ValueError for what is not
allowed, under every torch.
"""

import functools

import torch

from torch_sluice._errors import as_value_error
from torch_sluice._fakes import register_fake

BLOCK = 1024  # elements that share an exponent: SL_ACCUMULATE_BLOCK of ops/sluice/accumulate.h
STATS = 6  # numbers in a statistics tensor: SL_ACCUMULATE_STATS


def count_blocks(elements: int) -> int:
    """Exponents that a float16 accumulator of so many elements has."""
    return (elements + BLOCK - 1) // BLOCK


@functools.cache
def has_kernels(device_type: str) -> bool:
    """Whether this build can accumulate on such a device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("sluice::accumulate_", key)


def _call(operator, *arguments) -> torch.Tensor:
    try:
        return operator(*arguments)
    except RuntimeError as error:
        raise as_value_error(error) from None


def accumulate_(accumulator, exponents, grad, grad_scale, overwrite, seed) -> torch.Tensor:
    """Adds grad_scale * grad to the accumulator; returns the statistics, float64 [STATS]."""
    return _call(torch.ops.sluice.accumulate_.default, accumulator, exponents, grad, grad_scale, overwrite, seed)


def measure_gradient(grad) -> torch.Tensor:
    """The statistics of a gradient, float64 [STATS]."""
    return _call(torch.ops.sluice.measure_gradient.default, grad)


def read_accumulator(accumulator, exponents, scale, out) -> torch.Tensor:
    """Writes scale * accumulator to out; returns the statistics of what was written."""
    return _call(torch.ops.sluice.read_accumulator.default, accumulator, exponents, scale, out)


def _check_accumulator(accumulator, exponents):
    if accumulator.dtype not in (torch.float32, torch.float16):
        raise ValueError(f"accumulator is {accumulator.dtype}, expected float32 or float16")
    if (accumulator.dtype == torch.float16) != (exponents is not None):
        raise ValueError(
            f"exponents is {'absent' if exponents is None else 'given'} with a {accumulator.dtype} accumulator, "
            "expected int8 exponents if and only if it is float16"
        )
    if exponents is not None:
        blocks = count_blocks(accumulator.numel())
        torch._check_value(
            exponents.dim() == 1 and exponents.shape[0] == blocks,
            lambda: f"exponents has shape {list(exponents.shape)}, expected [{blocks}]",
        )


def _check_values(name, tensor, accumulator):
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} is {tensor.dtype}, expected float32, bfloat16 or float16")
    torch._check_value(
        tensor.shape == accumulator.shape,
        lambda: (
            f"{name} has shape {list(tensor.shape)}, expected that of the accumulator, which is "
            f"{list(accumulator.shape)}"
        ),
    )


def _new_stats(tensor):
    return tensor.new_empty(STATS, dtype=torch.float64)


@register_fake("accumulate_")
def _fake_accumulate(accumulator, exponents, grad, grad_scale, overwrite, seed):
    _check_accumulator(accumulator, exponents)
    _check_values("grad", grad, accumulator)
    return _new_stats(accumulator)


@register_fake("measure_gradient")
def _fake_measure(grad):
    _check_values("grad", grad, grad)
    return _new_stats(grad)


@register_fake("read_accumulator")
def _fake_read(accumulator, exponents, scale, out):
    _check_accumulator(accumulator, exponents)
    _check_values("out", out, accumulator)
    return _new_stats(accumulator)
