"""Attention through a gate: the one call that an attention layer makes, whatever phase its gate is in."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from torch_sluice.attention.counterfactual import add_counterfactual_gradient
from torch_sluice.attention.gate import PHASES
from torch_sluice.attention.recomputed import note_call
from torch_sluice.functional import gated_attention, mask_of, slopes_of

# Called as listener(gate, GateRecord) at each attention call, in training and evaluation; see torch_sluice.monitor.
listeners: list = []


@dataclass
class GateRecord:
    """What a controller needs to know of one attention call: shapes as in ``attend``, graph attached."""

    a: torch.Tensor
    b: torch.Tensor
    tau: float
    near: dict[str, Any]  # causal, window, sinks, key_range, q_offset, text_begin, sliding_window, attn_mask
    kept: torch.Tensor | None = None  # int64 [B, Hq], the pairs that a and b keep; None where noise was added to them


def add_sink_logits(out: torch.Tensor, lse: torch.Tensor, sink_logits: torch.Tensor) -> tuple:
    """(out, lse) of a softmax over the kept scores and one more for each head, which has no value.

    Args:
        out: [B, Hq, Nq, Dv] and lse [B, Hq, Nq], of the kept scores alone.
        sink_logits: [Hq].
    """
    sinks = sink_logits.to(lse.dtype).view(1, -1, 1)
    return out * torch.sigmoid(lse - sinks).unsqueeze(-1).to(out.dtype), torch.logaddexp(lse, sinks.expand_as(lse))


def attend(
    gate, x, q, k, v, *, causal=False, window=0, sinks=0, scale=None, key_range=None, q_offset=None, text_begin=None,
    attn_mask=None, alibi_slopes=None, softcap=0.0, sliding_window=0, dropout_p=0.0, key_x=None,
    logits=None, sink_logits=None,
):  # fmt: skip
    """Attention of q over k and v, restricted to the pairs that ``gate`` keeps.

    This is ``torch_sluice.gated_attention(q, k, v, a, b, mode="select", tau=gate.tau, ...)`` with (a, b) = gate(x),
    in evaluation and in the phase "hard". In training mode it also does what the gate's phase asks for:

    - "noise": normal noise of standard deviation ``gate.noise`` is added to every a_i and b_j, so that pairs near the
      threshold are tried and left out at random. The gate stays separable and the kernel sparse.
    - "straight_through" and "noise", if ``gate.rows`` > 0: the backward pass also works out, for that share of the
      query rows, what each pair would have changed had it been kept or dropped, and gives it to a and b.

    and, while a controller listens, leaves a record of a and b with the gate.

    Args:
        gate: a ``Gate`` with Hq query heads and Hkv key heads.
        x: [B, Nq, dim], the input of the attention layer.
        q: [B, Hq, Nq, D]  k: [B, Hkv, Nk, D]  v: [B, Hkv, Nk, Dv], float32, bfloat16 or float16 (float64: slowly).
        causal, window, sinks, scale, key_range, q_offset, text_begin, attn_mask, alibi_slopes, softcap, sliding_window,
            dropout_p: as in ``torch_sluice.gated_attention``. Pairs within the window and the sinks are kept and not
            gated.
        key_x: [B, Nk, dim], what the keys were made of, if not x (cross attention).
        logits: (a [B, Hq, Nq], b [B, Hkv, Nk]) to use instead of gate(x), for callers that keep b of past keys beside
            their key-value cache; x is then not looked at and may be None.
        sink_logits: [Hq], a score of each head that takes its share of every softmax and has no value (the learned
            sinks of gpt-oss; not to be taken for ``sinks``, which are keys).

    Returns:
        [B, Hq, Nq, Dv] in the dtype of q.

    Raises:
        ValueError: from the operator, or for a phase that does not exist.
    """
    a, b = gate(x, key_x) if logits is None else logits
    teaching = gate.training and gate.learn and (gate.recomputes or torch.is_grad_enabled())
    phase = gate.phase if teaching else "hard"
    if phase not in PHASES:
        raise ValueError(f"gate.phase is {phase!r}, expected one of {PHASES}")
    attn_mask = mask_of(attn_mask)
    near = dict(
        causal=causal, window=window, sinks=sinks, key_range=key_range, q_offset=q_offset, text_begin=text_begin,
        sliding_window=sliding_window, attn_mask=attn_mask,
    )  # fmt: skip
    record, recorded = None, gate.record is not None and teaching
    if recorded or (listeners and not torch.compiler.is_compiling()):
        seen = near if attn_mask is None else near | dict(attn_mask=attn_mask.detach())
        record = GateRecord(a, b, gate.tau, seen)
    if recorded:
        a = note_call(gate, record)
    noisy = phase == "noise" and gate.noise > 0
    if noisy:
        a = a + gate.noise * torch.randn_like(a)
        b = b + gate.noise * torch.randn_like(b)
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
    near = near | dict(alibi_slopes=alibi_slopes, softcap=softcap)
    counted = record is not None and not noisy
    out, lse, *kept = gated_attention(
        q, k, v, a, b, tau=gate.tau, scale=scale, dropout_p=dropout_p, return_lse=True, return_kept=counted, **near
    )
    if counted:
        record.kept = kept[0]
    if record is not None and not torch.compiler.is_compiling():
        for listener in tuple(listeners):
            listener(gate, record)
    if sink_logits is not None:
        out, lse = add_sink_logits(out, lse, sink_logits)
    if phase == "hard" or gate.rows <= 0:
        return out
    lse = lse.detach()
    near["alibi_slopes"] = slopes_of(alibi_slopes, q, a.dtype)
    return add_counterfactual_gradient(out, lse, q, k, v, a, b, tau=gate.tau, rows=gate.rows, scale=scale, **near)
