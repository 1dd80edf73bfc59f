"""The gated attention formula in plain torch, for what the operator does not take: any mask, a bias, the weights."""

import torch
from torch import Tensor

from torch_sluice.functional import _logit
from torch_sluice.places import query_places
from torch_sluice.selection import GATE_LOGIT_LIMIT
from torch_sluice.swap.masks import first_keys


def dense_gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    keep_self: bool = False,
    tau: float = 0.0,
    window: int = 0,
    sinks: int = 0,
    scale: float | None = None,
    key_range: Tensor | None = None,
    q_offset: Tensor | None = None,
    text_begin: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
    sliding_window: int = 0,
) -> tuple[Tensor, Tensor]:
    """``torch_sluice.gated_attention`` with a mask and with the weights, at the cost and memory of n_q * n_k pairs.

    Args:
        mask: broadcasts to [B, Hq, Nq, Nk]; bool, True where a pair may be looked at, or a float bias on the scores.
        keep_self: a query keeps the key at its own place whatever the gate says, as ``causal`` implies; for causal
            layers whose mask says the rest.
        text_begin: [B], the key from which sinks count; None: what the mask or key_range says.
        sink_logits: [Hq], scores that take their share of every softmax and have no value.
        The others: as in :func:`torch_sluice.gated_attention`.

    Returns:
        (out [B, Hq, Nq, Dv], weights [B, Hq, Nq, Nk]); the weights are softmax times gate, 0 for dropped pairs.
    """
    group = q.shape[1] // k.shape[1]
    k, v, b = (x.repeat_interleave(group, 1) for x in (k, v, b)) if group > 1 else (k, v, b)
    n_q, n_k = q.shape[2], k.shape[2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.to(dtype) @ k.to(dtype).transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    limit = GATE_LOGIT_LIMIT
    z = a.to(dtype).clamp(-limit, limit).unsqueeze(-1) + b.to(dtype).clamp(-limit, limit).unsqueeze(-2)

    keys = torch.arange(n_k, device=q.device)
    distance = query_places(n_q, n_k, q_offset, q.device)[:, None, :, None] - keys
    if text_begin is not None or key_range is not None:
        first = (key_range[:, 0] if text_begin is None else text_begin).view(-1, 1, 1, 1)
    elif mask is not None:
        first = first_keys(mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min, n_q, n_k)
    else:
        first = 0
    near = (distance.abs() < window) | (keys - first < sinks)
    kept = near | ~(z < _logit(tau))
    if causal or keep_self:
        kept = kept | (distance == 0)
    if causal:
        kept = kept & (distance >= 0)
    if sliding_window:
        kept = kept & (distance.abs() < sliding_window)
    if key_range is not None:
        begin, end = key_range.view(-1, 1, 1, 2).unbind(-1)
        kept = kept & (keys >= begin.unsqueeze(-1)) & (keys < end.unsqueeze(-1))
    if mask is not None and mask.dtype == torch.bool:
        kept = kept & mask
    elif mask is not None:
        kept = kept & (mask != -torch.inf)
        scores = scores + mask.masked_fill(mask == -torch.inf, 0).to(dtype)

    # A row that keeps nothing is given finite scores first, so that its gradients are 0 and not NaN.
    empty = ~kept.any(-1, keepdim=True)
    scores = scores.masked_fill(~kept & ~empty, -torch.inf)
    if sink_logits is not None:
        scores = torch.cat((scores, sink_logits.to(dtype).view(-1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    softmax = scores.softmax(-1)[..., :n_k].masked_fill(~kept, 0)
    weights = softmax * torch.where(near, 1.0, z.sigmoid())
    return (weights @ v.to(dtype)).to(v.dtype), weights
