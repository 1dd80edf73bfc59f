"""Picks the gate threshold that keeps a wanted share of the far pairs."""

import math

import torch
from torch import Tensor

from torch_sluice.places import end_of_sinks, shown_by_mask

GATE_LOGIT_LIMIT = 40.0  # SL_GATE_LOGIT_LIMIT: the operator clamps a and b to this

_CHUNKS = 8  # the sequence is cut into this many stretches, so that the sample knows about position ...
_QUANTILES = 16  # ... and this many quantiles are taken of each stretch, so that it knows about the distribution
_STAGGER = (0, 4, 2, 6, 1, 5, 3, 7)  # by eighths of a quantile, so that stretches that are alike are sampled finer


def _sample_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """At most _CHUNKS * _QUANTILES tokens of logits [B, H, N] that stand for all of them: (values, positions)."""
    n = logits.shape[-1]
    if n <= _CHUNKS * _QUANTILES:
        positions = torch.arange(n, device=logits.device).expand(logits.shape)
        return logits, positions
    length = n // _CHUNKS
    positions = torch.arange(_CHUNKS * length, device=logits.device) * n // (_CHUNKS * length)
    values, order = logits[..., positions].unflatten(-1, (_CHUNKS, length)).sort(dim=-1)
    positions = positions.view(_CHUNKS, length).expand_as(values).gather(-1, order)
    stagger = torch.tensor(_STAGGER, device=logits.device).unsqueeze(-1) * 2 + 1
    ranks = (torch.arange(_QUANTILES, device=logits.device) * 16 + stagger) * length // (16 * _QUANTILES)
    ranks = ranks.expand(*values.shape[:-1], _QUANTILES)
    return values.gather(-1, ranks).flatten(-2), positions.gather(-1, ranks).flatten(-2)


def _seen_by_mask(mask: Tensor, queries: Tensor, keys: Tensor, n_q: int, n_k: int) -> Tensor:
    """[B, H, Q, K], True where the mask shows a pair of sampled queries [B, H, Q] and keys [B, H, K], by number."""
    batch, heads = queries.shape[:2]
    mask = mask.detach().expand(batch, heads, n_q, n_k)
    numbers = (
        torch.arange(batch, device=mask.device).view(-1, 1, 1, 1),
        torch.arange(heads, device=mask.device).view(-1, 1, 1),
    )
    return shown_by_mask(mask[numbers[0], numbers[1], queries.unsqueeze(-1), keys.unsqueeze(-2)])


def _check_density(density: float | Tensor, a: Tensor) -> None:
    if not isinstance(density, Tensor):
        if not 0 <= density <= 1:
            raise ValueError(f"density is {density}, expected a number in [0, 1]")
        return
    shape = list(a.shape[:2])
    if density.dim() > 2 or any(x not in (1, y) for x, y in zip(density.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"density has shape {list(density.shape)}, expected one that broadcasts to {shape}")
    # Looking at the values of a tensor on an accelerator would wait for it, and a traced one has none.
    if density.device.type == "cpu" and density.numel() and not torch.compiler.is_compiling():
        low, high = (bound.item() for bound in density.detach().aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"density is {high if low >= 0 else low}, expected every element in [0, 1]")


@torch.no_grad()
def select_logit_tau(
    a: Tensor,
    b: Tensor,
    density: float | Tensor,
    *,
    causal: bool = False,
    window: int = 0,
    sinks: int = 0,
    key_range: Tensor | None = None,
    q_offset: Tensor | None = None,
    text_begin: Tensor | None = None,
    sliding_window: int = 0,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """The threshold on a_i + b_j, per (batch, query head), that keeps the share ``density`` of the far pairs.

    Far pairs are those outside the window and the sinks, and inside the causal triangle and the key range; the others
    are kept whatever the gate says.

    The threshold is the matching order statistic of a_i + b_j over a deterministic sample of at most 128 queries by
    128 keys per head: quantiles of a and of b within each eighth of the sequence. Up to 128 tokens the sample is
    everything and the share exact, rounded up to whole pairs; pairs that tie with the threshold are kept, so constant
    gates keep everything. Beyond, the kept share was within 0.03 of the goal, and within 0.01 in root mean square, over
    the cases of tests/ops/test_selection.py (independent, drifting, heavy-tailed and one-sided gates, causal or not).
    Padding, and keys of a cache behind the text, thin the sample out.

    Args:
        a: [B, Hq, Nq] gate logits of the queries.
        b: [B, Hkv, Nk] gate logits of the keys; Hq is a multiple of Hkv.
        density: share in [0, 1], or a tensor of shares that broadcasts to [B, Hq].
        causal, window, sinks, key_range, q_offset, text_begin, sliding_window: as in
            :func:`torch_sluice.gated_attention`.
        attn_mask: [B or 1, Hq or 1, Nq or 1, Nk or 1]: pairs that it hides are not counted.

    Returns:
        [B, Hq] in the dtype of a, ``logit_tau`` of the operator; -inf where all far pairs (or none exist) are kept,
        +inf where none shall be.

    Raises:
        ValueError: density is not in [0, 1] (unless it lies on an accelerator or is traced), or of another shape.
    """
    _check_density(density, a)
    group = a.shape[1] // b.shape[1]
    n_q, n_k = a.shape[-1], b.shape[-1]
    a = a.clamp(-GATE_LOGIT_LIMIT, GATE_LOGIT_LIMIT)
    b = b.clamp(-GATE_LOGIT_LIMIT, GATE_LOGIT_LIMIT)
    a_values, queries = _sample_tokens(a)
    b_values, keys = _sample_tokens(b)
    b_values, keys = b_values.repeat_interleave(group, 1), keys.repeat_interleave(group, 1)

    z = a_values.unsqueeze(-1) + b_values.unsqueeze(-2)
    seen = None if attn_mask is None else _seen_by_mask(attn_mask, queries, keys, n_q, n_k)
    first = n_k - n_q if q_offset is None else q_offset.view(-1, 1, 1, 1)
    queries, keys = queries.unsqueeze(-1) + first, keys.unsqueeze(-2)
    far = (queries - keys).abs() >= window
    if sliding_window > 0:
        far &= (queries - keys).abs() < sliding_window
    if causal:
        far &= keys < queries  # the pair of a token with itself is always kept
    sinks_end = end_of_sinks(sinks, key_range, text_begin)
    far &= keys >= (sinks_end if isinstance(sinks_end, int) else sinks_end.view(-1, 1, 1, 1))
    if key_range is not None:
        begin, end = key_range.view(-1, 1, 1, 1, 2).unbind(-1)
        far &= (keys >= begin) & (keys < end)

    if seen is not None:
        far = far & seen
    ordered = z.masked_fill(~far, -math.inf).flatten(-2).sort(dim=-1, descending=True).values
    count = far.flatten(-2).sum(-1)
    share = torch.as_tensor(density, dtype=torch.float64, device=a.device)
    # A hair is taken off before rounding up, so that .3 of 10 pairs are 3 and not 4.
    kept = (share * count - 1e-9).ceil().long().clamp(min=0)
    threshold = ordered.gather(-1, (kept - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1) if ordered.shape[-1] else None
    everything = torch.full_like(kept, -math.inf, dtype=a.dtype)
    if threshold is None:
        return everything
    threshold = torch.where(kept == 0, math.inf, threshold)
    return torch.where(kept >= count, everything, threshold)
