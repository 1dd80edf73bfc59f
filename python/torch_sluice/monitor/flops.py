"""Floating-point operations of a step, with formulas for Sluice's operators that count the pairs really computed."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from torch_sluice.selection import GATE_LOGIT_LIMIT

_FORWARD = torch.ops.sluice.gated_attention.default
_ROWS = 256  # query rows looked at in one go: bounds the memory of the mask


@torch.no_grad()
def count_kept_pairs(a, b, logit_tau=None, key_range=None, *, causal=False, window=0, sinks=0) -> tuple[int, int]:
    """How many (query, key) pairs the operator computes and how many there are, over batch and query heads.

    Exact: the rule K_i of ops/sluice/gated_attention.h, row by row.

    Args:
        a: [B, Hq, Nq] gate logits of the queries.
        b: [B, Hkv, Nk] gate logits of the keys.
        logit_tau: [B, Hq] or None (every pair is kept).
        key_range: [B, 2] int64 or None.
        causal, window, sinks: as in :func:`torch_sluice.gated_attention`.

    Returns:
        (kept, all) with all = the pairs inside the causal triangle and the key range.
    """
    n_q, n_k = a.shape[-1], b.shape[-1]
    keys = torch.arange(n_k, device=a.device)
    b = b.clamp(-GATE_LOGIT_LIMIT, GATE_LOGIT_LIMIT).repeat_interleave(a.shape[1] // max(b.shape[1], 1), 1)
    valid_keys = torch.ones(a.shape[0], 1, 1, n_k, dtype=torch.bool, device=a.device)
    if key_range is not None:
        begin, end = key_range.view(-1, 1, 1, 2).unbind(-1)
        valid_keys = (keys >= begin.unsqueeze(-1)) & (keys < end.unsqueeze(-1))
    kept = total = 0
    for start in range(0, n_q, _ROWS):
        rows = a[..., start : start + _ROWS].clamp(-GATE_LOGIT_LIMIT, GATE_LOGIT_LIMIT)
        position = torch.arange(start, start + rows.shape[-1], device=a.device).unsqueeze(-1) + (n_k - n_q)
        valid = valid_keys & (keys <= position) if causal else valid_keys.expand(-1, 1, rows.shape[-1], -1)
        total += int(valid.sum()) * a.shape[1]
        if logit_tau is None:
            kept = total
            continue
        always = ((position - keys).abs() < window) | (keys < sinks)
        if causal:
            always |= keys == position
        passed = ~(rows.unsqueeze(-1) + b.unsqueeze(-2) < logit_tau.view(*logit_tau.shape, 1, 1))
        kept += int(((passed | always) & valid).sum())
    return kept, total


def _pairs_of(q, k, a, b, logit_tau, key_range, causal, window, sinks) -> int:
    if a.device.type == "meta" or isinstance(a, torch._subclasses.FakeTensor):
        # Values are not known: count as if every pair were kept.
        n_q, n_k = q.shape[2], k.shape[2]
        return q.shape[0] * q.shape[1] * _causal_pairs(n_q, n_k) if causal else q.shape[0] * q.shape[1] * n_q * n_k
    return count_kept_pairs(a, b, logit_tau, key_range, causal=causal, window=window, sinks=sinks)[0]


@register_flop_formula(torch.ops.sluice.gated_attention, get_raw=True)
def _gated_attention_flops(q, k, v, a, b, logit_tau, key_range, causal, window, sinks, scale, *, out_val=None) -> int:
    """QK^T and PV: 2 D + 2 Dv operations a kept pair."""
    return _pairs_of(q, k, a, b, logit_tau, key_range, causal, window, sinks) * 2 * (q.shape[3] + v.shape[3])


@register_flop_formula(torch.ops.sluice.gated_attention_backward, get_raw=True)
def _gated_attention_backward_flops(
    dout, q, k, v, a, b, logit_tau, key_range, out, lse, causal, window, sinks, scale, *, out_val=None
) -> int:
    """QK^T again, dQ, dK: 6 D; dP and dV: 4 Dv operations a kept pair."""
    pairs = _pairs_of(q, k, a, b, logit_tau, key_range, causal, window, sinks)
    return pairs * (6 * q.shape[3] + 4 * v.shape[3])


def _causal_pairs(n_q: int, n_k: int) -> int:
    """Pairs with j <= i + n_k - n_q."""
    hidden = max(n_q - n_k, 0)  # rows that see nothing
    return sum(min(i + n_k - n_q + 1, n_k) for i in range(hidden, n_q))


def _sdpa_pairs(q, k, causal: bool) -> int:
    # PyTorch's SDPA aligns a causal mask top left; with n_q = n_k, the only case met in training, it is the same.
    n_q, n_k = q.shape[2], k.shape[2]
    return q.shape[0] * q.shape[1] * (_causal_pairs(n_q, n_k) if causal else n_q * n_k)


def _sdpa_flops(q, k, v, dropout_p=0.0, is_causal=False, *rest, out_val=None, **options) -> int:
    return _sdpa_pairs(q, k, is_causal) * 2 * (q.shape[3] + v.shape[3])


def _sdpa_backward_flops(dout, q, k, v, out, lse, dropout_p, is_causal, *rest, out_val=None, **options) -> int:
    return _sdpa_pairs(q, k, is_causal) * (6 * q.shape[3] + 4 * v.shape[3])


for _formula in (_sdpa_flops, _sdpa_backward_flops):
    _formula._get_raw = True  # what register_flop_formula(get_raw=True) sets: pass tensors, not shapes

# torch counts SDPA without its causal mask, and the CPU kernel not at all. A causal kernel does not compute the upper
# half, so counting it would flatter whoever uses SDPA. Only our counter uses these; torch's own table stays as it is.
_SDPA_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward_flops,
}


def count_flops(function: Callable[[], object]) -> int:
    """Runs the function once and returns the floating-point operations of its matrix products and attention.

    Attention counts the pairs that are computed: half of them under a causal mask, the kept ones under a gate.
    """
    with FlopCounterMode(display=False, custom_mapping=dict(_SDPA_FORMULAS)) as counter:
        function()
    return counter.get_total_flops()


class KeptPairCounter(TorchDispatchMode):
    """Counts the pairs that every ``sluice::gated_attention`` call under it keeps.

    ``with KeptPairCounter() as counter: model(x)``, then ``counter.density``.
    """

    def __init__(self):
        super().__init__()
        self.kept = self.total = 0

    @property
    def density(self) -> float:
        """Kept pairs / pairs in the causal triangle and the key range; 1 where no gated attention ran."""
        return self.kept / self.total if self.total else 1.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is _FORWARD:
            a, b, logit_tau, key_range, causal, window, sinks = args[3:10]
            kept, total = count_kept_pairs(a, b, logit_tau, key_range, causal=causal, window=window, sinks=sinks)
            self.kept += kept
            self.total += total
        return func(*args, **(kwargs or {}))
