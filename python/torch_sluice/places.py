"""Where queries and keys lie in their texts: what causality, the window and the sinks of gated attention go by."""

import torch
from torch import Tensor

_MOST_SINKS = 1 << 62  # any more would overflow when a place is added


def query_places(n_q: int, n_k: int, q_offset: Tensor | None, device: torch.device) -> Tensor:
    """[B or 1, Nq] int64, the key at whose place each query sits; without q_offset [B] the last at the last key."""
    return torch.arange(n_q, device=device).unsqueeze(0) + (n_k - n_q if q_offset is None else q_offset.view(-1, 1))


def end_of_sinks(sinks: int, key_range: Tensor | None, text_begin: Tensor | None) -> Tensor | int:
    """Valid keys below this number, or numbers [B, 1], are sinks: those of the first ``sinks`` of each text."""
    sinks = min(sinks, _MOST_SINKS)
    if text_begin is not None:
        return text_begin.view(-1, 1) + sinks
    return sinks if key_range is None else key_range[:, :1] + sinks


def shown_by_mask(mask: Tensor) -> Tensor:
    """True where a mask of booleans, or of numbers that are added to scores, lets a pair be looked at."""
    return mask if mask.dtype == torch.bool else mask != -torch.inf


def rows_of_mask(mask: Tensor | None, rows: Tensor | slice) -> Tensor | None:
    """The rows of queries ``rows`` of a mask [B or 1, Hq or 1, Nq or 1, Nk or 1]."""
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]


def visible_pairs(
    places: Tensor, n_k: int, *, causal: bool = False, key_range: Tensor | None = None, sliding_window: int = 0,
    attn_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[B or 1, Hq or 1, R, Nk], True for pairs that may be looked at, before a gate is asked.

    Args:
        places: [B or 1, R], those of some queries.
        attn_mask: that of these queries, [B or 1, Hq or 1, R or 1, Nk or 1].
        The others: as in :func:`torch_sluice.gated_attention`.
    """
    keys = torch.arange(n_k, device=places.device)
    distance = places[:, None, :, None] - keys
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if sliding_window > 0:
        visible = visible & (distance.abs() < sliding_window)
    if key_range is not None:
        begin, end = key_range.view(-1, 1, 1, 1, 2).unbind(-1)
        visible = visible & (keys >= begin) & (keys < end)
    if attn_mask is not None:
        visible = visible & shown_by_mask(attn_mask)
    return visible


def check_places(q: Tensor, **places: Tensor | None) -> None:
    """Raises ValueError for a place that is no int64 tensor [B] on the device of q; its values are the operator's."""
    for name, place in places.items():
        if place is None:
            continue
        if not isinstance(place, Tensor):
            raise ValueError(f"{name} is {place!r}, expected an int64 tensor [batch]")
        if place.shape != q.shape[:1] or place.dtype != torch.int64 or place.device != q.device:
            raise ValueError(
                f"{name} is {place.dtype} of shape {list(place.shape)} on {place.device}, expected int64 of shape "
                f"[batch] = {list(q.shape[:1])} on the device of q, {q.device}"
            )
