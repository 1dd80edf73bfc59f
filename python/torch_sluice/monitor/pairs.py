"""How many query-key pairs a gated attention computes: the exact rule, and a counter that sees every call."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_sluice.attention.density import count_rows, kept_pairs, possible_pairs
from torch_sluice.places import end_of_sinks, query_places, shown_by_mask

_FORWARD = torch.ops.sluice.gated_attention.default
_BY_SORTING = 1 << 19  # pairs of a head from which on sorting is quicker than looking at each


@torch.no_grad()
def count_kept_pairs(
    a, b, logit_tau=None, key_range=None, q_offset=None, text_begin=None, attn_mask=None, *, causal=False, window=0,
    sinks=0, sliding_window=0,
) -> tuple[int, int]:  # fmt: skip
    """How many (query, key) pairs the operator computes and how many there are, over batch and query heads.

    Exact: the rule K_i of ops/sluice/gated_attention.h, row by row; long sequences are counted by sorting, where a pair
    whose a + b rounds to the threshold may fall on the other side of it.

    Args:
        a: [B, Hq, Nq] gate logits of the queries.
        b: [B, Hkv, Nk] gate logits of the keys.
        logit_tau: [B, Hq] or None (every pair is kept).
        key_range: [B, 2] int64 or None.
        q_offset, text_begin: [B] int64 or None.
        attn_mask: [B or 1, Hq or 1, Nq or 1, Nk or 1] or None.
        causal, window, sinks, sliding_window: as in :func:`torch_sluice.gated_attention`.

    Returns:
        (kept, all) with all = the pairs that causality, key range, sliding window and mask allow.
    """
    n_q, n_k = a.shape[-1], b.shape[-1]
    seen = dict(causal=causal, key_range=key_range, sliding_window=sliding_window)
    if logit_tau is not None and n_q * n_k > _BY_SORTING and attn_mask is None:
        near = dict(window=window, sinks=sinks, q_offset=q_offset, text_begin=text_begin)
        kept, possible = kept_pairs(a, b, logit_tau=logit_tau, **near, **seen)
        return int(kept.sum()), int(possible.sum()) * a.shape[1]
    limit = -math.inf if logit_tau is None else logit_tau[..., None, None]
    places = query_places(n_q, n_k, q_offset, a.device)
    sinks_end = end_of_sinks(sinks, key_range, text_begin)
    kept, possible = count_rows(a, b, limit, places, sinks_end, window, attn_mask, seen)
    return int(kept.sum()), int(possible.sum())


def count_kept_paged_pairs(
    a, b_cache, block_table, seqlens_k, logit_tau=None, q_offset=None, attn_mask=None, **options
) -> tuple[int, int]:
    """The same of keys in a paged cache.

    Args:
        b_cache, block_table, seqlens_k: as in :func:`torch_sluice.gated_attention_paged`.
        attn_mask: [B or 1, Hq or 1, Nq or 1, max_blocks * block_size or 1] or None.
        The others: as above.
    """
    n_k = block_table.shape[1] * b_cache.shape[1]
    keys = torch.arange(n_k, device=a.device)
    blocks = block_table[:, keys // b_cache.shape[1]].long()
    held = (keys < seqlens_k[:, None]) & (blocks >= 0)
    b = b_cache[blocks.where(held, 0), keys % b_cache.shape[1]].transpose(1, 2)
    held = held[:, None, None]
    if attn_mask is not None:
        held = held & shown_by_mask(attn_mask)
    if q_offset is None:
        q_offset = seqlens_k.long() - a.shape[2]
    return count_kept_pairs(a, b, logit_tau, q_offset=q_offset, attn_mask=held, **options)


def causal_pairs(n_q: int, n_k: int) -> int:
    """Pairs with j <= i + n_k - n_q."""
    hidden = max(n_q - n_k, 0)  # rows that see nothing
    return sum(min(i + n_k - n_q + 1, n_k) for i in range(hidden, n_q))


class KeptPairCounter(TorchDispatchMode):
    """Counts the pairs that every ``sluice::gated_attention`` call under it keeps.

    ``with KeptPairCounter() as counter: model(x)``, then ``counter.density``.
    """

    def __init__(self):
        super().__init__()
        self.kept = self.total = 0

    @property
    def density(self) -> float:
        """Kept pairs / pairs that may be looked at before a gate is asked; 1 where no gated attention ran."""
        return self.kept / self.total if self.total else 1.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func is _FORWARD:
            kept, total = counted_pairs(results[2], *args[:17])
            self.kept += kept
            self.total += total
        return results


def counted_pairs(
    kept, q, k, v, a, b, logit_tau, key_range, q_offset, text_begin, attn_mask, alibi_slopes, output_gate, dropout_seed,
    causal, window, sinks, sliding_window,
) -> tuple[int, int]:  # fmt: skip
    """(kept, all) of a call of the operator, by the count that it gives."""
    seen = dict(causal=causal, key_range=key_range, q_offset=q_offset, attn_mask=attn_mask)
    return int(kept.sum()), int(possible_pairs(a, k.shape[2], sliding_window=sliding_window, **seen))
