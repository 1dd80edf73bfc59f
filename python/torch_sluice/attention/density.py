"""How many pairs a gate keeps: the exact count, and a differentiable mean gate that a controller can push on."""

import math

import torch

from torch_sluice.attention.sampling import sample_rows
from torch_sluice.places import end_of_sinks, query_places, rows_of_mask, visible_pairs
from torch_sluice.selection import GATE_LOGIT_LIMIT

_SMALLEST = 4  # log2 of the smallest block of keys that kept_pairs sorts
_ROWS = 256  # query rows looked at in one go where each pair is: bounds the memory
_ROW_ELEMENTS = 1 << 18  # of g for the rows of mean_gate, per call: bounds its cost and memory


def _logit(tau):
    return math.log(tau) - math.log1p(-tau) if tau > 0 else -math.inf


def _clamp(logits):
    return logits.clamp(-GATE_LOGIT_LIMIT, GATE_LOGIT_LIMIT)


def _valid_range(places, n_k, causal, key_range, sliding_window):
    """begin and end [B or 1, Nq] of the keys that each query may see. places: [B or 1, Nq], those of the queries."""
    begin = torch.zeros_like(places)
    end = (places + 1).clamp(0, n_k) if causal else torch.full_like(begin, n_k)
    if sliding_window > 0:
        begin = torch.maximum(begin, places - (sliding_window - 1)).clamp(max=n_k)
        end = torch.minimum(end, (places + sliding_window).clamp(0, n_k))
    if key_range is not None:
        begin = torch.maximum(begin, key_range[:, :1].clamp(0, n_k))
        end = torch.minimum(end, key_range[:, 1:].clamp(0, n_k))
    return begin, torch.maximum(begin, end)


def _far_ranges(places, n_k, causal, window, sinks_end, key_range, sliding_window):
    """The keys that a query may see and that the gate decides on, as at most two ranges of [B or 1, Nq] each.

    Under a causal mask the pair of a query with itself is kept whatever the gate says, so it is not among them.
    """
    begin, end = _valid_range(places, n_k, causal, key_range, sliding_window)
    begin_far = torch.maximum(begin, torch.as_tensor(sinks_end, device=places.device)).clamp(max=n_k)
    if causal:
        before = torch.minimum(end, places - (max(window, 1) - 1))
        return [(begin_far, torch.maximum(begin_far, before))]
    if window == 0:
        return [(begin_far, torch.maximum(begin_far, end))]
    before = torch.minimum(end, places - (window - 1))
    after = torch.maximum(begin_far, (places + window).clamp(max=n_k))
    return [(begin_far, torch.maximum(begin_far, before)), (after, torch.maximum(after, end))]


def _count_below(limits, bounds, ranks):
    """For each query, how many of ranks[:limit] are >= bound: int64 [B, H, Nq].

    limits [B or 1, Nq], bounds [B, H, Nq], ranks [B, H, Nk], all int64; ranks and bounds lie in [0, Nk]. Any stretch
    [0, limit) is a sum of blocks of 2^l keys, one for each bit l of limit. Blocks are sorted level by level and counted
    by binary search; the last few keys, below 2^_SMALLEST, by comparing.
    """
    batch, heads, n_k = ranks.shape
    limits = limits.unsqueeze(1).expand(batch, heads, -1)
    padded = 1 << max(_SMALLEST, n_k.bit_length())
    ranks = torch.nn.functional.pad(ranks, (0, padded - n_k))
    first = limits >> _SMALLEST << _SMALLEST
    last_keys = first.unsqueeze(-1) + torch.arange(1 << _SMALLEST, device=ranks.device)
    members = ranks.unsqueeze(2).expand(*limits.shape, padded).gather(3, last_keys.clamp(max=padded - 1))
    count = ((members >= bounds.unsqueeze(-1)) & (last_keys < limits.unsqueeze(-1))).sum(-1)
    for level in range(_SMALLEST, n_k.bit_length()):
        blocks = ranks.unflatten(-1, (-1, 1 << level)).sort(dim=-1).values
        # Numbered by block first, all sorted blocks together are one sorted list, and one search serves every query.
        offset = torch.arange(blocks.shape[2], device=ranks.device).unsqueeze(-1) * (n_k + 1)
        block = (limits >> level) - 1
        at = torch.searchsorted((blocks + offset).flatten(2), block.clamp(min=0) * (n_k + 1) + bounds)
        count += torch.where((limits >> level) % 2 == 1, ((block + 1) << level) - at, 0)
    return count


@torch.no_grad()
def kept_pairs(
    a, b, *, tau=0.5, logit_tau=None, causal=False, window=0, sinks=0, key_range=None, q_offset=None, text_begin=None,
    sliding_window=0, attn_mask=None,
):  # fmt: skip
    """Counts, exactly, the pairs that ``gated_attention`` keeps, in O(n log^2 n) time and O(n) memory.

    With a mask each pair is looked at, which takes O(n^2) time, some rows after the others.

    Args:
        a: [B, Hq, Nq] gate logits of the queries.
        b: [B, Hkv, Nk] gate logits of the keys; Hq is a multiple of Hkv.
        tau: a number in [0, 1).
        logit_tau: [B, Hq], thresholds on a + b in place of tau, as the operator has them.
        causal, window, sinks, key_range, q_offset, text_begin, sliding_window: as in ``torch_sluice.gated_attention``.
        attn_mask: [B or 1, Hq or 1, Nq or 1, Nk or 1].

    Returns:
        (kept, possible): int64 [B, Hq] and [B] (with a mask [B, Hq]): kept pairs per head, and pairs that may be looked
        at before a gate is asked. ``kept.sum() / (possible.sum() * Hq)`` is the density.
    """
    batch, heads, n_q = a.shape
    n_k = b.shape[-1]
    places, sinks_end = query_places(n_q, n_k, q_offset, a.device), end_of_sinks(sinks, key_range, text_begin)
    if attn_mask is not None:
        seen = dict(causal=causal, key_range=key_range, sliding_window=sliding_window)
        limit = _logit(tau) if logit_tau is None else logit_tau[..., None, None]
        return count_rows(a, b, limit, places, sinks_end, window, attn_mask, seen)
    begin, end = _valid_range(places, n_k, causal, key_range, sliding_window)
    possible = (end - begin).expand(batch, -1).sum(-1)
    kept = possible.unsqueeze(1).expand(batch, heads).clone()
    if not (batch and n_q and n_k):
        return kept, possible
    b = _clamp(b).repeat_interleave(heads // b.shape[1], 1)
    # NaN is kept by the operator. It tests a + b < logit tau in float32; b < logit tau - a may differ in the last bit.
    ordered, order = torch.nan_to_num(b, nan=math.inf).sort(dim=-1)
    ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(n_k, device=b.device).expand_as(order))
    limit = _logit(tau) if logit_tau is None else logit_tau.unsqueeze(-1)
    bounds = torch.nan_to_num(limit - _clamp(a), nan=-math.inf, neginf=-math.inf)
    bounds = torch.searchsorted(ordered, bounds.contiguous())
    keys = torch.arange(n_k, device=b.device)
    first = sinks_end if key_range is None else torch.maximum(key_range[:, :1], torch.as_tensor(sinks_end))
    decided = (keys >= first).view(-1, 1, n_k)
    ranks = torch.where(decided, ranks, -1)  # below every bound
    far_ranges = _far_ranges(places, n_k, causal, window, sinks_end, key_range, sliding_window)
    for number, (first, last) in enumerate(far_ranges):
        far_kept = _count_below(last, bounds, ranks)
        if number or sliding_window > 0:  # else the range begins at the first key that the gate decides on
            far_kept = far_kept - _count_below(first, bounds, ranks)
        kept -= ((last - first).unsqueeze(1) - far_kept).sum(-1)
    return kept, possible


@torch.no_grad()
def possible_pairs(
    a, n_k, *, causal=False, key_range=None, q_offset=None, sliding_window=0, attn_mask=None, **near,
):  # fmt: skip
    """How many pairs may be looked at before a gate is asked, over batch and heads: an int64 scalar.

    Args:
        a: [B, Hq, Nq], the gate logits of the queries, for their sizes.
        n_k: number of keys.
        The others: as in ``kept_pairs``, of which some don't matter here.
    """
    batch, heads, n_q = a.shape
    places = query_places(n_q, n_k, q_offset, a.device)
    if attn_mask is None:
        begin, end = _valid_range(places, n_k, causal, key_range, sliding_window)
        return (end - begin).expand(batch, -1).sum() * heads
    seen = dict(causal=causal, key_range=key_range, sliding_window=sliding_window)
    possible = torch.zeros((), dtype=torch.int64, device=a.device)
    for start in range(0, n_q, _ROWS):
        part = slice(start, start + _ROWS)
        visible = visible_pairs(places[:, part], n_k, attn_mask=rows_of_mask(attn_mask, part), **seen)
        alike = batch * heads // visible.shape[:2].numel()  # those that a mask is broadcast over
        possible += visible.sum() * alike
    return possible


def count_rows(a, b, limit, places, sinks_end, window, attn_mask, seen):
    """(kept, possible) [B, Hq] by looking at each pair, some rows of queries at a time.

    Args:
        limit: on a + b, a number or [B, Hq, 1, 1].
        places: [B or 1, Nq] of the queries; sinks_end: below which keys are sinks.
        seen: the further arguments of ``visible_pairs``.
    """
    n_k = b.shape[-1]
    keys = torch.arange(n_k, device=b.device)
    b = _clamp(b).repeat_interleave(a.shape[1] // max(b.shape[1], 1), 1).unsqueeze(-2)
    sinks = keys < (sinks_end if isinstance(sinks_end, int) else sinks_end.view(-1, 1, 1, 1))
    kept = a.new_zeros(a.shape[:2], dtype=torch.int64)
    possible = kept.clone()
    for start in range(0, a.shape[2], _ROWS):
        part = slice(start, start + _ROWS)
        rows, position = _clamp(a[..., part]).unsqueeze(-1), places[:, None, part, None]
        valid = visible_pairs(places[:, part], n_k, attn_mask=rows_of_mask(attn_mask, part), **seen)
        always = ((position - keys).abs() < window) | sinks
        if seen["causal"]:
            always = always | (keys == position)
        kept += ((~(rows + b < limit) | always) & valid).sum((-1, -2))
        possible += valid.expand(*a.shape[:2], -1, -1).sum((-1, -2))
    return kept, possible


def sample_gate(
    a, b, *, tau=0.5, causal=False, window=0, sinks=0, key_range=None, q_offset=None, text_begin=None,
    sliding_window=0, attn_mask=None,
):  # fmt: skip
    """Mean gate and number of kept pairs, from a sample of the query rows.

    Exact while B * Hq * Nq * Nk is at most 2^19; beyond, over a stratified random sample of query rows that has about
    that many pairs, each row weighted by its number of far pairs.

    Args: as in ``kept_pairs``; attn_mask: [B or 1, Hq or 1, Nq or 1, Nk or 1].

    Returns:
        (mean, kept, near, possible), scalars in the dtype of a: the mean of g_ij = sigmoid(a_i + b_j) over the far
        pairs of all heads, differentiable in a and b, 0 where there are none; the estimated number of kept pairs; and
        the exact numbers (with a mask: estimated alike) of those that are kept whatever the gate says, and of those
        that may be looked at, all three over all heads.
    """
    batch, heads, n_q = a.shape
    heads_kv, n_k = b.shape[1:]
    if not (batch and n_q and n_k):
        return a.sum() + b.sum(), *a.new_zeros(3)
    rows = sample_rows(n_q, min(1.0, max(1, _ROW_ELEMENTS // (batch * heads * n_k)) / n_q), a.device)
    keys = torch.arange(n_k, device=a.device)
    places, sinks_end = query_places(n_q, n_k, q_offset, a.device), end_of_sinks(sinks, key_range, text_begin)
    far = torch.zeros(1, len(rows), n_k, dtype=torch.bool, device=a.device)
    far_total = 0
    for first, last in _far_ranges(places, n_k, causal, window, sinks_end, key_range, sliding_window):
        far = far | ((keys >= first[:, rows].unsqueeze(-1)) & (keys < last[:, rows].unsqueeze(-1)))
        far_total = far_total + (last - first).expand(batch, -1).sum() * heads
    far = far.unsqueeze(1)
    if attn_mask is None:
        begin, end = _valid_range(places, n_k, causal, key_range, sliding_window)
        possible = (end - begin).expand(batch, -1).sum() * heads
    else:
        seen = dict(causal=causal, key_range=key_range, sliding_window=sliding_window)
        visible = visible_pairs(places[:, rows], n_k, attn_mask=rows_of_mask(attn_mask, rows), **seen)
        far = far & visible
        far_total, possible = (x.expand(batch, heads, -1, -1).sum() * (n_q / len(rows)) for x in (far, visible))

    z = _clamp(a.index_select(2, rows)).reshape(batch, heads_kv, heads // heads_kv, -1, 1) + _clamp(b).reshape(
        batch, heads_kv, 1, 1, n_k
    )
    weight = far.to(z.dtype)
    of_heads = (1, 1) if weight.shape[1] == 1 else (heads_kv, heads // heads_kv)
    weight = weight.reshape(weight.shape[0], *of_heads, *weight.shape[2:])
    count = (weight.sum() * (z.shape[:3].numel() // weight.shape[:3].numel())).clamp(min=1)
    mean = (z.sigmoid() * weight).sum() / count
    with torch.no_grad():
        dropped = ((z < _logit(tau)) * weight).sum() / count
        kept = possible - far_total * dropped
    return mean, kept.to(a.dtype), (possible - far_total).to(a.dtype), possible.to(a.dtype)
