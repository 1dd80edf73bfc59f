"""How many pairs a gate keeps: the exact count, and a differentiable mean gate that a controller can push on."""

import math

import torch

from torch_sluice.attention.sampling import sample_rows
from torch_sluice.selection import GATE_LOGIT_LIMIT

_ROW_ELEMENTS = 1 << 18  # of g for the rows of mean_gate, per call: bounds its cost and memory


def _logit(tau):
    return math.log(tau) - math.log1p(-tau) if tau > 0 else -math.inf


def _clamp(logits):
    return logits.clamp(-GATE_LOGIT_LIMIT, GATE_LOGIT_LIMIT)


def _valid_range(n_q, n_k, causal, key_range, device):
    """begin and end [B or 1, Nq] of the keys that each query may see."""
    positions = torch.arange(n_q, device=device) + (n_k - n_q)
    begin = torch.zeros(1, n_q, dtype=torch.long, device=device)
    end = (positions + 1).clamp(0, n_k).unsqueeze(0) if causal else torch.full_like(begin, n_k)
    if key_range is not None:
        begin = torch.maximum(begin, key_range[:, :1].clamp(0, n_k))
        end = torch.minimum(end, key_range[:, 1:].clamp(0, n_k))
    return begin, torch.maximum(begin, end)


def _far_ranges(n_q, n_k, causal, window, sinks, key_range, device):
    """The keys that a query may see and that the gate decides on, as at most two ranges of [B or 1, Nq] each.

    Under a causal mask the pair of a query with itself is kept whatever the gate says, so it is not among them.
    """
    begin, end = _valid_range(n_q, n_k, causal, key_range, device)
    positions = torch.arange(n_q, device=device) + (n_k - n_q)
    begin_far = begin.clamp(min=min(sinks, n_k))
    if causal:
        before = torch.minimum(end, positions - (max(window, 1) - 1))
        return [(begin_far, torch.maximum(begin_far, before))]
    if window == 0:
        return [(begin_far, torch.maximum(begin_far, end))]
    before = torch.minimum(end, positions - (window - 1))
    after = torch.maximum(begin_far, positions + window)
    return [(begin_far, torch.maximum(begin_far, before)), (after, torch.maximum(after, end))]


def _count_below(limits, bounds, values):
    """For each query, how many of values[:limit] are >= bound.

    limits [B or 1, Nq] int64, bounds [B, H, Nq], values [B, H, Nk]; int64 [B, H, Nq]. Values are sorted in chunks of
    about sqrt(Nk): whole chunks are counted by binary search, the one that the limit cuts by comparing.
    """
    batch, heads, n_k = values.shape
    size = max(16, math.isqrt(n_k))
    chunks = -(-n_k // size)
    # NaN is kept by the operator, so it counts as +inf; what pads the last chunk lies behind every limit.
    values = torch.nn.functional.pad(torch.nan_to_num(values, nan=math.inf), (0, chunks * size - n_k), value=-math.inf)
    values = values.view(batch, heads, chunks, size)
    ordered = values.sort(dim=-1).values
    targets = bounds.unsqueeze(2).expand(batch, heads, chunks, -1).contiguous()
    per_chunk = size - torch.searchsorted(ordered, targets)
    before = torch.nn.functional.pad(per_chunk.cumsum(2), (0, 0, 1, 0))
    limits = limits.unsqueeze(1).expand(batch, heads, -1)
    whole = limits // size
    count = before.gather(2, whole.unsqueeze(2)).squeeze(2)
    cut = whole.clamp(max=chunks - 1)
    members = values.gather(2, cut.unsqueeze(-1).expand(*cut.shape, size))
    inside = torch.arange(size, device=values.device) < (limits - whole * size).unsqueeze(-1)
    return count + ((members >= bounds.unsqueeze(-1)) & inside).sum(-1)


@torch.no_grad()
def kept_pairs(a, b, *, tau=0.5, causal=False, window=0, sinks=0, key_range=None):
    """Counts, exactly, the pairs that ``gated_attention`` keeps, in O(n^1.5 log n) time and O(n^1.5) memory.

    Args:
        a: [B, Hq, Nq] gate logits of the queries.
        b: [B, Hkv, Nk] gate logits of the keys; Hq is a multiple of Hkv.
        tau: a number in [0, 1).
        causal, window, sinks, key_range: as in ``torch_sluice.gated_attention``.

    Returns:
        (kept, possible): int64 [B, Hq] and [B]: kept pairs per head, and pairs that the causal mask and the key range
        allow. ``kept.sum() / (possible.sum() * Hq)`` is the density.
    """
    batch, heads, n_q = a.shape
    n_k = b.shape[-1]
    begin, end = _valid_range(n_q, n_k, causal, key_range, a.device)
    possible = (end - begin).expand(batch, -1).sum(-1)
    kept = possible.unsqueeze(1).expand(batch, heads).clone()
    if not (batch and n_q and n_k):
        return kept, possible
    b = _clamp(b).repeat_interleave(heads // b.shape[1], 1)
    # The operator tests a + b < logit tau in float32; b < logit tau - a can differ from it in the last bit.
    bounds = torch.nan_to_num(_logit(tau) - _clamp(a), nan=-math.inf, neginf=-math.inf)
    for first, last in _far_ranges(n_q, n_k, causal, window, sinks, key_range, a.device):
        far_kept = _count_below(last, bounds, b) - _count_below(first, bounds, b)
        kept -= ((last - first).unsqueeze(1) - far_kept).sum(-1)
    return kept, possible


def mean_gate(a, b, *, causal=False, window=0, sinks=0, key_range=None):
    """Mean of g_ij = sigmoid(a_i + b_j) over the far pairs, differentiable in a and b; 0 where there are none.

    Exact while B * Hq * Nq * Nk is at most 2^18; beyond, over a stratified random sample of query rows of about that
    many pairs, each row weighted by its number of far pairs.
    """
    batch, heads, n_q = a.shape
    heads_kv, n_k = b.shape[1:]
    if not (batch and n_q and n_k):
        return a.sum() * 0.0
    share = max(1, _ROW_ELEMENTS // (batch * heads * n_k)) / n_q
    rows = sample_rows(n_q, min(1.0, share), a.device)
    keys = torch.arange(n_k, device=a.device)
    far = torch.zeros(1, len(rows), n_k, dtype=torch.bool, device=a.device)
    for first, last in _far_ranges(n_q, n_k, causal, window, sinks, key_range, a.device):
        far = far | ((keys >= first[:, rows].unsqueeze(-1)) & (keys < last[:, rows].unsqueeze(-1)))
    group = heads // heads_kv
    a = _clamp(a.index_select(2, rows)).reshape(batch, heads_kv, group, -1, 1)
    g = torch.sigmoid(a + _clamp(b).reshape(batch, heads_kv, 1, 1, n_k))
    far = far.to(g.dtype).reshape(far.shape[0], 1, 1, *far.shape[1:])
    count = far.expand(batch, *far.shape[1:]).sum() * heads
    return (g * far).sum() / count.clamp(min=1)
