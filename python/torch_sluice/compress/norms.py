"""L1 norms of a weight's channels: what pruning ranks them by."""

import torch
from torch import Tensor

from torch_sluice._errors import as_value_error, check_tensors
from torch_sluice._fakes import register_fake

_MAX_RANK = 8  # SL_PRUNE_MAX_RANK of ops/sluice/prune.h
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def channel_norms(weight: Tensor, dim: int = 0) -> Tensor:
    """The sum of magnitudes of each channel of a weight along ``dim``; ops/sluice/prune.h has the contract.

    Args:
        weight: rank 1 to 8, any strides, float32, bfloat16, float16 or float64. On the CPU it is read where it lies; on
            another device torch's own sum in float64 serves.
        dim: which dimension counts the channels, in [-rank, rank).

    Returns:
        [weight.shape[dim]] in float32, or in float64 for a float64 weight.

    Raises:
        ValueError: weight or dim is something else.
    """
    check_tensors(weight=weight)
    weight = weight.detach()
    if weight.device.type not in ("cpu", "meta"):
        _check(weight, dim)
        others = [d for d in range(weight.dim()) if d != dim % weight.dim()]
        return weight.abs().sum(others, dtype=torch.float64).to(_norm_dtype(weight))
    try:
        return torch.ops.sluice.channel_norms.default(weight, dim)
    except RuntimeError as error:
        raise as_value_error(error) from None


def _norm_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _check(weight: Tensor, dim: int) -> None:
    rank = weight.dim()
    if not 1 <= rank <= _MAX_RANK:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected a rank of 1 to {_MAX_RANK}")
    if not -rank <= dim < rank:
        raise ValueError(f"dim is {dim}, expected {-rank} to {rank - 1} for a weight of shape {list(weight.shape)}")
    if weight.dtype not in _DTYPES:
        raise ValueError(f"weight is {weight.dtype}, expected float32, bfloat16, float16 or float64")


@register_fake("channel_norms")
def _fake_channel_norms(weight, dim):
    _check(weight, dim)
    return weight.new_empty(weight.shape[dim], dtype=_norm_dtype(weight))
