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

import torch

from torch_sluice.attention.sampling import sample_rows
from torch_sluice.places import end_of_sinks, query_places
from torch_sluice.selection import GATE_LOGIT_LIMIT

_MAX_EXPONENT = 80.0
_CHUNK_ELEMENTS = 1 << 20  # of a [batch, heads, rows, keys] temporary


def add_counterfactual_gradient(
    out, lse, q, k, v, a, b, *, tau, rows, causal, window, sinks, scale, key_range=None, q_offset=None, text_begin=None
):
    """``out`` unchanged; its backward adds the gradient described above to ``a`` and ``b``.

    Args:
        out, lse: [B, Hq, Nq, Dv] and [B, Hq, Nq], what the operator made of the other arguments, which have its
            shapes and meaning.
        tau: threshold on g, a number in [0, 1).
        rows: share of the query rows to look at, in (0, 1].
    """
    chosen = sample_rows(a.shape[-1], rows, a.device)
    options = (tau, causal, window, sinks, scale)
    near = (key_range, q_offset, text_begin, chosen)
    return _Counterfactual.apply(out, lse, q.detach(), k.detach(), v.detach(), a, b, *near, options)


class _Counterfactual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, lse, q, k, v, a, b, key_range, q_offset, text_begin, chosen, options):
        ctx.save_for_backward(out, lse, q, k, v, a, b, key_range, q_offset, text_begin, chosen)
        ctx.options = options
        return out.view_as(out)

    @staticmethod
    def backward(ctx, dout):
        da, db = _gate_gradients(dout, *ctx.saved_tensors, *ctx.options)
        return dout, None, None, None, None, da, db, *(None,) * 5


@torch.no_grad()
def _gate_gradients(
    dout, out, lse, q, k, v, a, b, key_range, q_offset, text_begin, chosen, tau, causal, window, sinks, scale
):
    batch, heads, n_q, _ = q.shape
    n_k = k.shape[2]
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    if not (batch and chosen.numel() and n_k):
        return da, db
    dtype = a.dtype
    k_t, v_t = k.to(dtype).transpose(2, 3), v.to(dtype).transpose(2, 3)
    places = query_places(n_q, n_k, q_offset, a.device)
    sinks_end = end_of_sinks(sinks, key_range, text_begin)
    chunk = max(1, _CHUNK_ELEMENTS // (batch * heads * n_k))
    for rows in chosen.split(chunk):
        dz = _row_gradients(
            *(x.index_select(2, rows).to(dtype) for x in (dout, out, lse, q)),
            k_t, v_t, a.index_select(2, rows), b, key_range, places[:, rows], tau, causal, window, sinks_end, scale,
        )  # fmt: skip
        da.index_add_(2, rows, dz.sum(-1).reshape(batch, heads, -1))
        db += dz.sum(2)
    upscale = n_q / chosen.numel()
    for logits, gradient in ((a, da), (b, db)):
        gradient.mul_(upscale).masked_fill_(logits.abs() > GATE_LOGIT_LIMIT, 0.0)
    return da, db


def _row_gradients(dout, out, lse, q, k_t, v_t, a, b, key_range, places, tau, causal, window, sinks_end, scale):
    """dz of a few rows: [B, Hkv, G * rows, Nk], the G query heads of a key head side by side."""
    batch, heads, count, _ = q.shape
    heads_kv, n_k = b.shape[1:]
    grouped = (batch, heads_kv, heads // heads_kv * count)
    scores = (q * scale).reshape(*grouped, -1) @ k_t
    effect = dout.reshape(*grouped, -1) @ v_t
    logits = a.clamp(-GATE_LOGIT_LIMIT, GATE_LOGIT_LIMIT).reshape(*grouped, 1) + b.clamp(
        -GATE_LOGIT_LIMIT, GATE_LOGIT_LIMIT
    ).unsqueeze(2)

    keys = torch.arange(n_k, device=q.device)
    distance = places.unsqueeze(-1) - keys
    valid = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    fixed = distance.abs() < window
    # The pair of a query with itself is always kept under a causal mask: nothing to learn about it.
    fixed = fixed | (distance == 0) if causal else fixed
    fixed = fixed | (keys < (sinks_end if isinstance(sinks_end, int) else sinks_end.unsqueeze(-1)))
    if key_range is not None:
        begin, end = key_range.view(-1, 1, 1, 2).unbind(-1)
        valid = valid & (keys >= begin) & (keys < end)
    # [B or 1, 1, G * rows, Nk]: the same for every head.
    valid, fixed = (x.repeat(1, grouped[2] // count, 1).unsqueeze(1) for x in (valid, fixed))
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
