"""Operations of each operator of Sluice, as formulas for torch.utils.flop_counter.

They are registered with torch too, so that its own ``FlopCounterMode`` counts them (as executed).
"""

import math

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import register_flop_formula

from torch_sluice.attention.density import possible_pairs
from torch_sluice.monitor.pairs import causal_pairs, count_kept_paged_pairs, count_kept_pairs

_CHOICE = ("key_range", "q_offset", "text_begin", "attn_mask")


class PairCache:
    """Pairs of the gated attentions of one step. The backward pass has the gates of the forward, and their count."""

    def __init__(self):
        self._known = {}

    def count(self, q, k, a, b, *choice, results=None, causal, **near) -> tuple[int, int]:
        """(kept pairs, pairs that may be looked at). choice: logit_tau, key_range, q_offset, text_begin and attn_mask
        of the operator; results: those of the forward; near: window, sinks, sliding_window."""
        if not _has_values(a):
            # Values are not known: count as if every pair were kept.
            n_q, n_k = q.shape[2], k.shape[2]
            pairs = q.shape[0] * q.shape[1] * (causal_pairs(n_q, n_k) if causal else n_q * n_k)
            return pairs, pairs
        places = tuple(None if x is None else x.data_ptr() for x in choice)
        key = (a.data_ptr(), b.data_ptr(), a.shape, b.shape, causal, *near.values(), places)
        if results is not None:
            possible = possible_pairs(
                a, k.shape[2], causal=causal, **dict(zip(_CHOICE, choice[1:], strict=True)), **near
            )
            self._known[key] = int(results[2].sum()), int(possible)
        elif key not in self._known:
            self._known[key] = count_kept_pairs(a, b, *choice, causal=causal, **near)
        return self._known[key]


def _gated_attention(
    q, k, v, a, b, logit_tau, key_range, q_offset, text_begin, attn_mask, alibi_slopes, output_gate, dropout_seed,
    causal, window, sinks, sliding_window, softcap, dropout_p, scale, *, pairs, out_val=None,
) -> tuple[int, int]:  # fmt: skip
    """QK^T and PV: 2 D + 2 Dv operations a pair."""
    each = 2 * (q.shape[3] + v.shape[3])
    near = dict(causal=causal, window=window, sinks=sinks, sliding_window=sliding_window)
    choice = (logit_tau, key_range, q_offset, text_begin, attn_mask)
    return _times(each, pairs.count(q, k, a, b, *choice, **near, results=out_val))


def _gated_attention_paged(
    q, k_cache, v_cache, a, b_cache, block_table, seqlens_k, logit_tau, q_offset, attn_mask, alibi_slopes, causal,
    window, sinks, sliding_window, softcap, scale, *, pairs, out_val=None,
) -> tuple[int, int]:  # fmt: skip
    """As of the dense operator; without values, as if every key of the table were kept."""
    each = 2 * (q.shape[3] + v_cache.shape[3])
    if not _has_values(a):
        count = a.numel() * block_table.shape[1] * b_cache.shape[1]
        return _times(each, (count, count))
    near = dict(causal=causal, window=window, sinks=sinks, sliding_window=sliding_window)
    choice = (logit_tau, q_offset, attn_mask)
    return _times(each, count_kept_paged_pairs(a, b_cache, block_table, seqlens_k, *choice, **near))


def _gated_attention_backward(
    dout, dlse, q, k, v, a, b, logit_tau, key_range, q_offset, text_begin, attn_mask, alibi_slopes, output_gate,
    dropout_seed, out, lse, causal, window, sinks, sliding_window, softcap, dropout_p, scale, mask_gradient, *, pairs,
    out_val=None,
) -> tuple[int, int]:  # fmt: skip
    """QK^T again, dQ, dK: 6 D; dP and dV: 4 Dv operations a pair."""
    each = 6 * q.shape[3] + 4 * v.shape[3]
    near = dict(causal=causal, window=window, sinks=sinks, sliding_window=sliding_window)
    choice = (logit_tau, key_range, q_offset, text_begin, attn_mask)
    return _times(each, pairs.count(q, k, a, b, *choice, **near))


def _has_values(tensor) -> bool:
    return tensor.device.type != "meta" and not isinstance(tensor, torch._subclasses.FakeTensor)


def _times(each: int, pairs: tuple[int, int]) -> tuple[int, int]:
    return each * pairs[0], each * pairs[1]


def _linear_dynamic(x, packed, weight_scale, bias, out_features, *options, out_val=None) -> tuple[int, int]:
    """2 M N K; what is multiplied in 16 bits takes two passes."""
    dense = 2 * x.numel() * out_features
    return round(dense * _passes(out_val)), dense


def _conv2d_dynamic(
    x, packed, weight_scale, bias, out_channels, kernel_size, stride, padding, dilation, groups, *options, out_val=None
) -> tuple[int, int]:
    """2 (C / groups) Kh Kw for each number of the output; what is multiplied in 16 bits takes two passes."""
    dense = 2 * out_val[0].numel() * (x.shape[1] // groups) * math.prod(kernel_size)
    return round(dense * _passes(out_val)), dense


def _lstm_dynamic(
    x, h0, c0, packed_ih, scale_ih, packed_hh, scale_hh, packed_hr, *options, out_val=None
) -> tuple[int, int]:
    """2 (inputs + state) 4 hidden a row, and the projection's 2 hidden state."""
    hidden, state = c0.shape[1], h0.shape[1]
    each = [2 * x.shape[-1] * 4 * hidden, 2 * state * 4 * hidden]
    return _recurrent([*each, *([] if packed_hr is None else [2 * hidden * state])], out_val[-1])


def _gru_dynamic(x, h0, *options, out_val=None) -> tuple[int, int]:
    """2 (inputs + hidden) 3 hidden a row."""
    hidden = h0.shape[1]
    return _recurrent([2 * x.shape[-1] * 3 * hidden, 2 * hidden * 3 * hidden], out_val[-1])


def _recurrent(each: list[int], bits) -> tuple[int, int]:
    """each: operations of each product for a row; bits [products, rows]."""
    rows = bits.shape[1]
    executed = sum(round(rows * count * _passes((None, widths))) for count, widths in zip(each, bits, strict=True))
    return executed, rows * sum(each)


def _passes(out_val) -> float:
    bits = out_val[1]
    return 1.0 + (bits > 8).double().mean().item() if bits.numel() and _has_values(bits) else 1.0


def _present(formulas: dict[str, object]) -> dict:
    return {getattr(torch.ops.sluice, name): f for name, f in formulas.items() if hasattr(torch.ops.sluice, name)}


# Both give (executed, dense-equivalent).
GATED = _present(
    {
        "gated_attention": _gated_attention,
        "gated_attention_backward": _gated_attention_backward,
        "gated_attention_paged": _gated_attention_paged,
    }
)
QUANTISED = _present(
    {
        "linear_dynamic": _linear_dynamic,
        "conv2d_dynamic": _conv2d_dynamic,
        "lstm_dynamic": _lstm_dynamic,
        "gru_dynamic": _gru_dynamic,
    }
)

# Only our counter uses these; torch's own table has the forms that ``_register`` gives it.
OVERRIDES = {**GATED, **QUANTISED}


def dtype_name(operator, args) -> str:
    """What an operator computes in, as "float32": the dtype of its first tensor, or int8 where it quantises it."""
    if operator in QUANTISED:
        return "int8"
    first = next((value for value in tree_leaves(args) if isinstance(value, torch.Tensor)), None)
    return "float32" if first is None else str(first.dtype).removeprefix("torch.")


def _register() -> None:
    """Tells torch's own counter of our operators."""
    for operator, formula in GATED.items():
        register_flop_formula(operator, get_raw=True)(
            lambda *args, _formula=formula, **options: _formula(*args, pairs=PairCache(), **options)[0]
        )
    for operator, formula in QUANTISED.items():
        register_flop_formula(operator, get_raw=True)(
            lambda *args, out_val=None, _formula=formula, **options: _formula(*args, out_val=out_val, **options)[0]
        )


_register()
