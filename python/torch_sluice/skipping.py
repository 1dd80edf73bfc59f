r"""The pairs that a gate in the softmax makes too light to matter, found without a parameter.

Of ``mode="log"`` a row's mass is ``T_i = sum_j exp(s_ij) g_ij`` over the keys that it sees. With u_i a bound on its
scores, and as sigmoid(z) <= exp(z), keys that are dropped hold at most

    D_i = exp(u_i + a_i) * sum of exp(b_j) over the dropped keys.

They go in rising order of b, so the sum is a prefix sum that all rows share. How long a prefix a row may drop follows
by bisection from

    log D_i <= l_i - 10,    l_i = max of s_iw + log g_iw over three keys w that the row sees  <=  log T_i,

so that what is dropped holds at most e^-10 of the row. The three keys are the nearest one, the one with the largest b
(under ``causal``: up to the query), and the first, which is a sink if there are any. The bound is that of Cauchy and
Schwarz,

    u_i = |scale| |q_i| max_j |k_j - c| + max_j m_ij + max(0, -slope) (n_q + n_k),

the first maximum over the keys up to the query under ``causal``, with c the mean key, by which all scores of a row
change alike. With a softcap c is 0, and the cap is a bound, too. Near pairs are never dropped.

All of it takes O(n log n + n d) time and O(n d) memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from torch_sluice.places import end_of_sinks, query_places, shown_by_mask
from torch_sluice.selection import GATE_LOGIT_LIMIT

LOG_SHARE = -10.0  # of a row's mass that may be dropped, the logarithm
_ROUNDING, _RELATIVE = 0.01, 1e-5  # kept back for float32: nats, and a share of the scores' bound
_FEWEST = 32  # with fewer queries, looking at every key costs more than could be saved


class _Text(NamedTuple):
    """Where queries and keys are, and which see each other. Places are [B or 1, 1, Nq]."""

    places: Tensor
    begin: Tensor  # [B or 1, 1, 1] the first valid key
    valid: Tensor  # [B, 1, Nk] keys that some query may see
    causal: bool
    sliding_window: int

    def sees(self, keys: Tensor) -> Tensor:
        """Whether each query sees the key [B, H, Nq] at its place, but for a mask."""
        seen = self.valid.expand(-1, keys.shape[1], -1).gather(-1, keys)
        if self.causal:
            seen = seen & (keys <= self.places)
        return seen & ((self.places - keys).abs() < self.sliding_window) if self.sliding_window > 0 else seen


def _place(n_q, n_k, batch, causal, key_range, q_offset, sliding_window, device) -> _Text:
    places, keys = query_places(n_q, n_k, q_offset, device).unsqueeze(1), torch.arange(n_k, device=device)
    bounds = torch.tensor([[0, n_k]], device=device) if key_range is None else key_range
    begin, end = bounds.view(-1, 1, 2).split(1, -1)
    valid = (keys >= begin) & (keys < end)
    valid = valid & (keys <= places[..., -1:]) if causal else valid
    return _Text(places, begin, valid.expand(batch, -1, -1), causal, sliding_window)


def _witnesses(text: _Text, weights: Tensor) -> list[Tensor]:
    """Three keys [B, Hkv, Nq] for each query. weights: b, -inf where a key does not count."""
    batch, heads, n_k = weights.shape
    shape = batch, heads, text.places.shape[-1]
    last = n_k - 1 - text.valid.flip(-1).int().argmax(-1, keepdim=True)  # the last valid key
    nearest = torch.minimum(torch.maximum(text.places, text.begin), last).clamp(0, n_k - 1)
    if text.causal:
        largest = weights.cummax(-1).indices.gather(-1, text.places.clamp(0, n_k - 1).expand(shape))
    else:
        largest = weights.argmax(-1, keepdim=True)
    return [x.expand(shape) for x in (nearest, largest, text.begin.clamp(max=n_k - 1))]


def _bound_scores(q, k, text: _Text, scale, softcap, alibi_slopes, attn_mask) -> Tensor:
    """u [B, Hq, Nq]."""
    group, n_k = q.shape[1] // k.shape[1], k.shape[2]
    longest = k.norm(dim=-1).masked_fill(~text.valid, 0)
    if text.causal:
        up_to = text.places.clamp(0, n_k - 1).expand(*longest.shape[:2], -1)
        longest = longest.cummax(-1).values.gather(-1, up_to)
    else:
        longest = longest.amax(-1, keepdim=True)
    upper = q.norm(dim=-1) * longest.repeat_interleave(group, 1) * (abs(scale) * (1 + _RELATIVE))
    upper = upper.clamp(max=softcap) if softcap else upper
    if alibi_slopes is not None:
        upper = upper + (-alibi_slopes).clamp(min=0).unsqueeze(-1) * (q.shape[2] + n_k)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        upper = upper + attn_mask.amax(-1).to(q.dtype)
    return upper


def _find_prefixes(a: Tensor, b: Tensor, weights: Tensor, log_mass: Tensor) -> Tensor:
    """The lowest threshold [B, Hq] with which sum of exp(a_i + b_j) over what is dropped is at most exp(log_mass).

    weights: b, -inf where a key does not count; those go last, and no row keeps them.
    """
    rows = a.shape[0], b.shape[1], -1  # [B, Hkv, group * Nq]
    ordered, order = b.where(weights > -torch.inf, torch.inf).sort(dim=-1)
    sums = weights.gather(-1, order).double().logcumsumexp(-1)
    count = torch.searchsorted(sums, (log_mass.double() - a).reshape(rows).contiguous(), right=True)
    threshold = a + pad(ordered, (0, 1), value=torch.inf).gather(-1, count).view_as(a)
    return threshold.masked_fill((log_mass - a).isnan(), -torch.inf)


@torch.no_grad()
def skip_logit_tau(
    q: Tensor, k: Tensor, a: Tensor, b: Tensor, *, scale: float, causal: bool = False, window: int = 0, sinks: int = 0,
    key_range: Tensor | None = None, q_offset: Tensor | None = None, text_begin: Tensor | None = None,
    sliding_window: int = 0, attn_mask: Tensor | None = None, alibi_slopes: Tensor | None = None, softcap: float = 0.0,
) -> Tensor | None:  # fmt: skip
    """The threshold on a_i + b_j, per (batch, query head), with which ``mode="log"`` drops at most e^-10 of any row.

    It is the smallest of those that the rows of the head could have. The reasoning is at the head of this file.

    Args:
        alibi_slopes: [B, Hq]; attn_mask: [B or 1, Hq or 1, Nq or 1, Nk or 1].
        The others: as of :func:`torch_sluice.gated_attention`.

    Returns:
        [B, Hq] in the dtype of a, ``logit_tau`` of the operator: -inf where no bound is known (NaN, infinite scores, a
        row whose mask hides its three keys), +inf where all far pairs may go. None where nothing is looked for: with
        fewer than 32 queries, and without keys.
    """
    batch, heads, n_q = a.shape
    heads_kv, n_k = b.shape[1:]
    if n_q < _FEWEST or n_k == 0 or batch == 0:
        return None
    a, b = (x.clamp(-GATE_LOGIT_LIMIT, GATE_LOGIT_LIMIT) for x in (a, b))
    text = _place(n_q, n_k, batch, causal, key_range, q_offset, sliding_window, a.device)
    q, k = q.to(a.dtype), k.to(a.dtype).masked_fill(~text.valid.unsqueeze(-1), 0)
    if not softcap:
        k = k - k.sum(2, keepdim=True) / text.valid.sum(-1).clamp(min=1).view(-1, 1, 1, 1)
    weights = b.masked_fill(~text.valid | b.isnan(), -torch.inf)  # NaN keeps its pairs
    upper = _bound_scores(q, k, text, scale, softcap, alibi_slopes, attn_mask)

    def of_heads(x):
        return x.repeat_interleave(heads // heads_kv, 1)

    sinks_end = end_of_sinks(sinks, key_range, text_begin)
    sinks_end = sinks_end if isinstance(sinks_end, int) else sinks_end.unsqueeze(1)
    witnesses = _witnesses(text, weights)
    lower = torch.full_like(upper, -torch.inf)
    for keys in witnesses:
        distance = (text.places - keys).abs()
        near, seen = of_heads((distance < window) | (keys < sinks_end)), of_heads(text.sees(keys))
        score = (q * of_heads(k.gather(2, keys.unsqueeze(-1).expand(-1, -1, -1, k.shape[3])))).sum(-1) * scale
        score = softcap * torch.tanh(score / softcap) if softcap else score
        if alibi_slopes is not None:
            score = score - alibi_slopes.unsqueeze(-1) * of_heads(distance)
        if attn_mask is not None:
            added = attn_mask.expand(batch, heads, n_q, n_k).gather(-1, of_heads(keys).unsqueeze(-1)).squeeze(-1)
            seen = seen & shown_by_mask(added)
            score = score if added.dtype == torch.bool else score + added.to(score.dtype)
        mass = score + logsigmoid(a + of_heads(b.gather(-1, keys))).masked_fill(near, 0)
        lower = torch.maximum(lower, mass.masked_fill(~seen, -torch.inf))
    threshold = _find_prefixes(a, b, weights, lower - upper + (LOG_SHARE - _ROUNDING))
    sees_none = ~of_heads(text.sees(witnesses[0]))  # not even the nearest key
    if attn_mask is not None:
        sees_none = sees_none | ~shown_by_mask(attn_mask).any(-1)
    return threshold.masked_fill(sees_none, torch.inf).amin(-1)
