"""What every pair would change: the gradient of the gate logits through the choice of pairs, for sampled query rows.

The operator's own gradient knows only the pairs that it kept. With P = softmax over the kept pairs of a row, the
derivative of a row's output with respect to the *presence* of pair j is P_j (g_j v_j - out) for a kept pair; a dropped
pair that is admitted alone takes the share p_j = exp(s_j) / (Z + exp(s_j)) = sigmoid(s_j - lse), and changes the output
by p_j (g_j v_j - out). The straight-through rule passes that through the slope of the gate:

    dz_ij = sigmoid'(z_ij) * share_ij * (max(g_ij, tau) <dout_i, v_j> - <dout_i, out_i>)

where share is P for kept pairs and p for dropped ones. All far pairs of a row are looked at, which is dense work, so it
is done for a stratified random sample of the rows and scaled up: the gradient of b is unbiased, and so is that of every
parameter behind a. Nothing of size n^2 is made: rows are taken in chunks.
"""

import math
from typing import NamedTuple

import torch

from torch_sluice.attention.sampling import sample_rows
from torch_sluice.places import end_of_sinks, query_places, rows_of_mask, visible_pairs
from torch_sluice.selection import GATE_LOGIT_LIMIT

_MAX_EXPONENT = 80.0
_CHUNK_ELEMENTS = 1 << 20  # of a [batch, heads, rows, keys] temporary


class _Near(NamedTuple):
    """The options of the operator that choose pairs and shape scores, but for tau."""

    causal: bool
    window: int
    sinks: int
    scale: float
    sliding_window: int = 0
    softcap: float = 0.0


def add_counterfactual_gradient(
    out, lse, q, k, v, a, b, *, tau, rows, causal, window, sinks, scale, key_range=None, q_offset=None, text_begin=None,
    sliding_window=0, attn_mask=None, alibi_slopes=None, softcap=0.0,
):  # fmt: skip
    """``out`` unchanged; its backward adds the gradient described above to ``a`` and ``b``.

    Args:
        out, lse: [B, Hq, Nq, Dv] and [B, Hq, Nq], what the operator made of the other arguments, which have its
            shapes and meaning.
        tau: threshold on g, a number in [0, 1).
        rows: share of the query rows to look at, in (0, 1].
    """
    chosen = sample_rows(a.shape[-1], rows, a.device)
    near = _Near(causal, window, sinks, scale, sliding_window, softcap)
    tensors = (key_range, q_offset, text_begin, None if attn_mask is None else attn_mask.detach(), alibi_slopes, chosen)
    return _Counterfactual.apply(out, lse, q.detach(), k.detach(), v.detach(), a, b, *tensors, tau, near)


class _Counterfactual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, lse, q, k, v, a, b, *rest):
        *tensors, ctx.tau, ctx.near = rest
        ctx.save_for_backward(out, lse, q, k, v, a, b, *tensors)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, dout):
        da, db = _gate_gradients(dout, *ctx.saved_tensors, ctx.tau, ctx.near)
        return dout, None, None, None, None, da, db, *(None,) * 8


@torch.no_grad()
def _gate_gradients(
    dout, out, lse, q, k, v, a, b, key_range, q_offset, text_begin, attn_mask, alibi_slopes, chosen, tau, near
):
    batch, heads, n_q, _ = q.shape
    n_k = k.shape[2]
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    if not (batch and chosen.numel() and n_k):
        return da, db
    dtype = a.dtype
    k_t, v_t = k.to(dtype).transpose(2, 3), v.to(dtype).transpose(2, 3)
    places = query_places(n_q, n_k, q_offset, a.device)
    sinks_end = end_of_sinks(near.sinks, key_range, text_begin)
    chunk = max(1, _CHUNK_ELEMENTS // (batch * heads * n_k))
    for rows in chosen.split(chunk):
        dz = _row_gradients(
            *(x.index_select(2, rows).to(dtype) for x in (dout, out, lse, q)),
            k_t, v_t, a.index_select(2, rows), b, key_range, places[:, rows], rows_of_mask(attn_mask, rows),
            alibi_slopes, sinks_end, tau, near,
        )  # fmt: skip
        da.index_add_(2, rows, dz.sum(-1).reshape(batch, heads, -1))
        db += dz.sum(2)
    upscale = n_q / chosen.numel()
    for logits, gradient in ((a, da), (b, db)):
        gradient.mul_(upscale).masked_fill_(logits.abs() > GATE_LOGIT_LIMIT, 0.0)
    return da, db


def _row_gradients(dout, out, lse, q, k_t, v_t, a, b, key_range, places, attn_mask, alibi_slopes, sinks_end, tau, near):
    """dz of a few rows: [B, Hkv, G * rows, Nk], the G query heads of a key head side by side."""
    batch, heads, count, _ = q.shape
    heads_kv, n_k = b.shape[1:]
    grouped = (batch, heads_kv, heads // heads_kv * count)

    def side_by_side(x):  # [B or 1, Hq or 1, rows or 1, Nk or 1] as [B or 1, Hkv or 1, G * rows, Nk or 1]
        x = x.expand(-1, -1, count, -1)
        if x.shape[1] == 1:
            return x.repeat(1, 1, heads // heads_kv, 1)
        return x.reshape(x.shape[0], heads_kv, -1, x.shape[3])

    scores = (q * near.scale).reshape(*grouped, -1) @ k_t
    effect = dout.reshape(*grouped, -1) @ v_t
    logits = a.clamp(-GATE_LOGIT_LIMIT, GATE_LOGIT_LIMIT).reshape(*grouped, 1) + b.clamp(
        -GATE_LOGIT_LIMIT, GATE_LOGIT_LIMIT
    ).unsqueeze(2)

    keys = torch.arange(n_k, device=q.device)
    distance = places[:, None, :, None] - keys
    if near.softcap:
        scores = scores.div_(near.softcap).tanh_().mul_(near.softcap)
    if alibi_slopes is not None:
        scores -= side_by_side(alibi_slopes[..., None, None] * distance.abs())
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores += side_by_side(attn_mask.to(scores.dtype))
    seen = dict(causal=near.causal, key_range=key_range, sliding_window=near.sliding_window, attn_mask=attn_mask)
    valid = visible_pairs(places, n_k, **seen)
    fixed = distance.abs() < near.window
    # The pair of a query with itself is always kept under a causal mask: nothing to learn about it.
    fixed = fixed | (distance == 0) if near.causal else fixed
    fixed = fixed | (keys < (sinks_end if isinstance(sinks_end, int) else sinks_end.view(-1, 1, 1, 1)))
    valid, fixed = side_by_side(valid), side_by_side(fixed)
    threshold = math.log(tau) - math.log1p(-tau) if tau > 0 else -math.inf
    kept = (fixed | ~(logits < threshold)) & valid

    # P of a kept pair is exp(s - lse), p of a dropped one exp(s - lse) / (1 + exp(s - lse)). The bound keeps that
    # finite for a row that kept nothing: lse = -inf, and an admitted pair takes the whole row.
    share = (scores.sub_(lse.reshape(*grouped, 1))).clamp_(max=_MAX_EXPONENT).exp_()
    share /= torch.where(kept, 1.0, 1.0 + share)
    gates = logits.sigmoid()
    effect *= gates.clamp(min=tau)
    effect -= (dout * out).sum(-1).reshape(*grouped, 1)
    slope = gates * (1 - gates)
    return effect.mul_(slope).mul_(share).masked_fill_(fixed | ~valid, 0.0)
