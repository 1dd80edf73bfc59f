"""The gated attention formula of ops/sluice/gated_attention.h in eager torch, and inputs for it."""

import math

import torch


def choose_pairs(
    a, b, *, causal=False, tau=0.0, window=0, sinks=0, key_range=None, q_offset=None, text_begin=None, attn_mask=None,
    sliding_window=0, choice_dtype=None,
):  # fmt: skip
    """(near, kept): which pairs are near, and K_i, the second [B, Hq, Nq, Nk]. Arguments: as of ``formula``."""
    batch, heads, n_q = a.shape
    n_k = b.shape[2]
    dtype = a.dtype if choice_dtype is None else choice_dtype
    b = b.detach().clamp(-40, 40).to(dtype).repeat_interleave(heads // b.shape[1], 1)
    choice = a.detach().clamp(-40, 40).to(dtype)[..., :, None] + b[..., None, :]
    tau = torch.as_tensor(tau, dtype=torch.float64, device=a.device)
    logit_tau = torch.logit(tau).to(dtype).expand(batch, heads)[..., None, None]
    offset = n_k - n_q if q_offset is None else q_offset[:, None, None, None]
    i = torch.arange(n_q, device=a.device)[:, None] + offset
    j = torch.arange(n_k, device=a.device)[None, :]
    first = key_range[:, 0] if key_range is not None and text_begin is None else text_begin
    first = 0 if first is None else first[:, None, None, None]
    near = ((i - j).abs() < window) | (j - first < sinks)
    kept = near | ~(choice < logit_tau)
    if causal:
        kept = (kept | (i == j)) & (j <= i)
    if key_range is not None:
        begin, end = key_range[:, 0, None, None, None], key_range[:, 1, None, None, None]
        kept = kept & (j >= begin) & (j < end)
    if sliding_window:
        kept = kept & ((i - j).abs() < sliding_window)
    if attn_mask is not None:
        kept = kept & (attn_mask if attn_mask.dtype == torch.bool else attn_mask != -math.inf)
    return near, kept.expand(batch, heads, n_q, n_k)


def formula(
    q, k, v, a, b, *, causal=False, tau=0.0, window=0, sinks=0, scale=None, key_range=None, q_offset=None,
    text_begin=None, attn_mask=None, alibi_slopes=None, softcap=0.0, sliding_window=0, output_gate=None,
    mode="select", choice_dtype=None,
):  # fmt: skip
    """out and lse, in the precision of q.

    tau: a number or a tensor [Hq] or [B, Hq]. choice_dtype: that in which a_i + b_j is compared with the threshold,
    where it is not that of a.
    """
    dtype, gate_dtype = q.dtype, a.dtype
    group = q.shape[1] // k.shape[1]
    places = dict(
        causal=causal, window=window, sinks=sinks, key_range=key_range, q_offset=q_offset, text_begin=text_begin,
        attn_mask=attn_mask, sliding_window=sliding_window, choice_dtype=choice_dtype,
    )  # fmt: skip
    near, kept = choose_pairs(a, b, tau=tau, **places)
    summed = choose_pairs(a, b, tau=0.0, **places)[1] if mode == "post" else kept
    k, v, b = (x.repeat_interleave(group, 1) for x in (k, v, b))
    z = a.clamp(-40, 40)[..., :, None] + b.clamp(-40, 40)[..., None, :]
    n_q, n_k, head_dim = q.shape[2], k.shape[2], q.shape[3]
    i = torch.arange(n_q, device=q.device)[:, None]
    i = i + (n_k - n_q if q_offset is None else q_offset[:, None, None, None])
    j = torch.arange(n_k, device=q.device)
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(head_dim) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype)[..., None, None] * (i - j).abs()
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.masked_fill(attn_mask == -math.inf, 0).to(dtype)
    gate = torch.where(near, 1.0, z.sigmoid()).to(dtype)
    if mode == "log":
        scores = scores + torch.where(near, 0.0, torch.nn.functional.logsigmoid(z)).to(dtype)
    # A row without weight (it keeps nothing, or only scores of -inf) gives 0.
    empty = (scores.masked_fill(~summed, -math.inf) == -math.inf).all(-1, keepdim=True)
    p = scores.masked_fill(~summed & ~empty, -math.inf).softmax(-1)
    weights = torch.where(kept & ~empty, p if mode == "log" else p * gate, 0)
    if torch.isfinite(v).all():
        out = weights @ v
    else:  # a dropped pair must not bring in its NaN as 0 * NaN
        out = (weights[..., None] * v[:, :, None]).masked_fill(~kept[..., None], 0).sum(-2)
    if output_gate is not None:
        out = out * output_gate.to(dtype).sigmoid()
    lse = scores.to(gate_dtype).masked_fill(~summed, -math.inf).logsumexp(-1)
    return out, lse


def formula_with_gradients(inputs, dout, *, exact=False, **options):
    """(out, lse, dq, dk, dv, da, db) of the formula in the precision of the inputs, or in float64 (``exact``); behind
    them doutput_gate and dattn_mask, where there is one (of numbers)."""
    choice_dtype = inputs[3].dtype
    leaves = [(x.double() if exact else x.clone()).requires_grad_() for x in map(torch.Tensor.detach, inputs)]
    if options.get("output_gate") is not None:
        gate = options["output_gate"].detach()
        options["output_gate"] = (gate.double() if exact else gate.clone()).requires_grad_()
        leaves.append(options["output_gate"])
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        options["attn_mask"] = (mask.detach().double() if exact else mask.detach().clone()).requires_grad_()
        leaves.append(options["attn_mask"])
    out, lse = formula(*leaves[:5], **options, choice_dtype=choice_dtype)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))


def random_inputs(
    batch=2, heads=4, heads_kv=2, n_q=33, n_k=33, head_dim=16, head_dim_v=16, dtype=torch.float32, device="cpu", seed=0
):
    """(q, k, v, a, b) with normal entries."""
    generator = torch.Generator().manual_seed(seed)
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape, dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(device, dtype)

    return (
        normal(batch, heads, n_q, head_dim, dtype=dtype),
        normal(batch, heads_kv, n_k, head_dim, dtype=dtype),
        normal(batch, heads_kv, n_k, head_dim_v, dtype=dtype),
        normal(batch, heads, n_q, dtype=gate_dtype),
        normal(batch, heads_kv, n_k, dtype=gate_dtype),
    )
