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
