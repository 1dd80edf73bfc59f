"""``torch_sluice.gated_attention``: the functional front of the gated attention operator."""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_sluice import _functorch, _operators
from torch_sluice._errors import as_value_error, check_tensors
from torch_sluice.modes import MODES, run_mode
from torch_sluice.places import check_places
from torch_sluice.selection import select_logit_tau
from torch_sluice.skipping import skip_logit_tau

_operator = _operators._FORWARD


def _logit(tau: float) -> float:
    return math.log(tau) - math.log1p(-tau) if tau > 0 else -math.inf


def _check_number(name: str, value, least: float, below: float, expected: str) -> None:
    if not least <= value < below:
        raise ValueError(f"{name} is {value}, expected {expected}")


def _logit_tau_of(tau: float | Tensor, q: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The operator's threshold [B, Hq] for a tau given as a number, [Hq] or [B, Hq]; None where everything is kept."""
    shape = q.shape[:2]
    if not isinstance(tau, Tensor):
        _check_number("tau", tau, 0, 1, "a number in [0, 1) or a tensor [heads_q] or [batch, heads_q] of them")
        return torch.full(shape, _logit(tau), dtype=dtype, device=q.device) if tau else None
    if tau.dim() == 0:
        tau = tau.reshape(1, 1)
    if tau.dim() > 2 or tau.shape[-1] not in (1, shape[1]) or (tau.dim() == 2 and tau.shape[0] not in (1, shape[0])):
        raise ValueError(f"tau has shape {list(tau.shape)}, expected [heads_q] or [batch, heads_q] = {list(shape)}")
    # Looking at the values of a tensor on an accelerator would wait for it, and a traced one has none.
    if tau.device.type == "cpu" and tau.numel() and not torch.compiler.is_compiling():
        low, high = tau.detach().aminmax()
        _check_number("tau", low.item(), 0, 1, "every element in [0, 1)")
        _check_number("tau", high.item(), 0, 1, "every element in [0, 1)")
    return torch.logit(tau.detach().to(q.device, dtype)).expand(shape)


def _gates_of(name: str, logits: Tensor, dtype: torch.dtype) -> Tensor:
    if logits.dtype == dtype:
        return logits
    if not logits.is_floating_point():
        raise ValueError(f"{name} is {logits.dtype}, expected floating-point gate logits")
    return logits.to(dtype)


def cuts_of(sliding_window: int | None, softcap: float | None) -> tuple[int, float]:
    """Both for the operator: None, as configs have it, is none."""
    if isinstance(sliding_window, float) or (isinstance(sliding_window, int) and sliding_window >= 2**63):
        raise ValueError(f"sliding_window is {sliding_window}, expected an integer of at least 0, or None")
    return 0 if sliding_window is None else sliding_window, 0.0 if softcap is None else softcap


def mask_of(attn_mask: Tensor | None) -> Tensor | None:
    """The operator's mask for one of up to four dimensions, broadcast from the right as torch does."""
    if attn_mask is None:
        return None
    if isinstance(attn_mask, Tensor) and (attn_mask.is_nested or attn_mask.layout != torch.strided):
        raise ValueError("attn_mask is sparse or nested, expected a dense tensor")
    if not isinstance(attn_mask, Tensor) or attn_mask.dim() > 4:
        found = list(attn_mask.shape) if isinstance(attn_mask, Tensor) else type(attn_mask).__name__
        raise ValueError(f"attn_mask is {found}, expected a tensor that broadcasts to [batch, heads_q, n_q, n_k]")
    if not (attn_mask.is_floating_point() or attn_mask.dtype == torch.bool):
        raise ValueError(f"attn_mask is {attn_mask.dtype}, expected booleans, or floating-point numbers to add")
    return attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)


def slopes_of(alibi_slopes: Tensor | None, q: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The operator's slopes [B, Hq] for some of shape [Hq] or [B, Hq]."""
    if alibi_slopes is None:
        return None
    shape = q.shape[:2]
    is_tensor = isinstance(alibi_slopes, Tensor)
    if not is_tensor or alibi_slopes.dim() not in (1, 2) or not alibi_slopes.is_floating_point():
        found = f"{alibi_slopes.dtype} {list(alibi_slopes.shape)}" if is_tensor else type(alibi_slopes).__name__
        raise ValueError(
            f"alibi_slopes is {found}, expected floating-point [heads_q] or [batch, heads_q] = {list(shape)}"
        )
    if alibi_slopes.shape[-1] != shape[1] or (alibi_slopes.dim() == 2 and alibi_slopes.shape[0] not in (1, shape[0])):
        raise ValueError(
            f"alibi_slopes has shape {list(alibi_slopes.shape)}, expected [heads_q] or [batch, heads_q] = {list(shape)}"
        )
    if alibi_slopes.is_cpu and not torch.compiler.is_compiling() and not bool(alibi_slopes.isfinite().all()):
        raise ValueError("alibi_slopes holds numbers that are not finite, expected finite ones")
    if alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "alibi_slopes requires a gradient, expected constants: slopes that learn are an attn_mask, "
            "-slopes.view(-1, 1, 1) * distance"
        )
    return alibi_slopes.to(q.device, dtype).expand(shape)


def gate_of(output_gate: Tensor | None, q: Tensor, v: Tensor) -> Tensor | None:
    """The operator's output gate [B, Hq, Nq, 1 or Dv] for one of that shape, or [B, Hq, Nq]."""
    if output_gate is None:
        return None
    rows, channels = q.shape[:3], v.shape[-1]
    shapes = (rows, (*rows, 1), (*rows, channels))
    if not isinstance(output_gate, Tensor) or output_gate.shape not in shapes or not output_gate.is_floating_point():
        is_tensor = isinstance(output_gate, Tensor)
        found = f"{output_gate.dtype} {list(output_gate.shape)}" if is_tensor else type(output_gate).__name__
        raise ValueError(
            f"output_gate is {found}, expected floating-point logits [batch, heads_q, n_q] = {list(rows)}, or with one "
            f"more dimension of 1 or head_dim_v = {channels}"
        )
    return (output_gate if output_gate.dim() == 4 else output_gate.unsqueeze(-1)).to(q.dtype)


def seed_of(dropout_p: float, q: Tensor) -> Tensor | None:
    """Drawn from torch's generator, so that torch.manual_seed makes dropout come again."""
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}, expected a number in [0, 1)")
    return torch.randint(2**62, (1,), device=q.device) if dropout_p else None


def _run(arguments: tuple) -> tuple[Tensor, Tensor, Tensor]:
    try:
        q, k, v, a, b = arguments[:5]
        if _functorch.is_transformed():
            return _functorch.transformed(*arguments)
        if forward_ad._current_level >= 0:
            return _operator(*arguments)
        mask, gate = arguments[_functorch.MASK], arguments[_functorch.OUTPUT_GATE]
        if torch.is_grad_enabled() and (
            q.requires_grad or k.requires_grad or v.requires_grad or a.requires_grad or b.requires_grad
            or (mask is not None and mask.requires_grad)
            or (gate is not None and gate.requires_grad)
        ):  # fmt: skip
            return _operator(*arguments)
        # Nothing to differentiate: go past the autograd kernel, which is Python and costs some microseconds.
        with torch._C._AutoDispatchBelowAutograd():
            return _operator(*arguments)
    except RuntimeError as error:
        raise as_value_error(error) from None


def _run_compiled(arguments: tuple) -> tuple[Tensor, Tensor, Tensor]:
    return _operator(*arguments)


def results_of(out: Tensor, *others: Tensor | None) -> Tensor | tuple[Tensor, ...]:
    """What a function returns of out and what was asked for beside it."""
    others = [x for x in others if x is not None]
    return (out, *others) if others else out


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    causal: bool = False,
    mode: str = "select",
    tau: float | Tensor | None = None,
    density: float | Tensor | None = None,
    window: int = 0,
    sinks: int = 0,
    scale: float | None = None,
    key_range: Tensor | None = None,
    q_offset: Tensor | None = None,
    text_begin: Tensor | None = None,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = 0.0,
    sliding_window: int | None = 0,
    output_gate: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_kept: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    r"""Attention in which a separable gate picks the pairs of query and key that are worth computing.

    With ``z_ij = clamp(a_i, -40, 40) + clamp(b_j, -40, 40)`` and ``p_i = i + q_offset``, the place of query i among
    the keys::

        near_ij = |p_i - j| < window  or  j < text_begin + sinks  kept whatever the gate says, with g_ij = 1
        g_ij    = 1 where near, else sigmoid(z_ij)
        K_i     = {j : near_ij  or  g_ij >= tau  or  (causal and j = p_i)}, within the causal triangle,
                  key_range = [begin, end), the sliding window and attn_mask
        s_ij    = cap(scale * q_i . k_j) - alibi_slope |p_i - j| + attn_mask_ij,   cap(x) = softcap tanh(x / softcap)
        out_i   = sum_{j in K_i} softmax_{K_i}(s_ij) * g_ij * v_j

    At ``tau=0``, ``window=0`` and ``sinks=0`` this is ``softmax(QK^T / sqrt(d)) * sigmoid(W_g [Q; K]) V``, whose gate
    is linear in [q; k] and so splits into one number per query and one per key. Pairs that are not kept cost nothing.
    A row that keeps nothing gives 0, and zero gradients. The exact contract is in ``ops/sluice/gated_attention.h``.

    Args:
        q: [B, Hq, Nq, D] queries, float32, bfloat16 or float16 (float64: by the slow reference, for tests).
        k: [B, Hkv, Nk, D] keys, of the dtype and device of q. Hq is a multiple of Hkv; query head h reads key head
            ``h // (Hq // Hkv)``. D and Dv are at most 256.
        v: [B, Hkv, Nk, Dv] values.
        a: [B, Hq, Nq] gate logits of the queries; converted to float32 (float64 with float64 q).
        b: [B, Hkv, Nk] gate logits of the keys; converted alike.
        causal: query i sees keys j <= p_i only. Without q_offset the last query sees every key.
        mode: what the kept pairs are shares of. ``"select"``: softmax over the kept pairs alone, as above. ``"post"``:
            softmax over all pairs (valid, and causal), of which then only the kept ones are summed: the formula with
            its full denominator, within ``dropped_bound(v, tau)`` of the sum over all. Scores are computed of all
            pairs. ``"log"``: softmax of ``s_ij + log g_ij`` over the kept pairs, weights that add up to 1; computed in
            float32.
        tau: threshold on g in [0, 1): a number, [Hq] or [B, Hq]. 0 keeps every pair. The values of a tensor that lies
            on an accelerator or is traced by a compiler are not checked. Not differentiable. Default: 0; with
            ``mode="log"`` one that drops pairs which together hold at most e^-10 of any row's weight, found from bounds
            on the scores (:func:`torch_sluice.skipping.skip_logit_tau`).
        density: share in [0, 1] of the *far* pairs (those not near) to keep, a number or a tensor that broadcasts to
            [B, Hq]; picks tau per (batch, head) from a sample of a and b, see
            :func:`torch_sluice.selection.select_logit_tau` for its accuracy. Excludes ``tau``.
        window: keys at a distance below this are near: ``w`` are the last w keys, itself included. 0: none.
        sinks: the first ``sinks`` keys of each text are near.
        scale: of the scores; default ``1 / sqrt(D)``.
        key_range: [B, 2] int64, begin and end of the valid keys of each batch element (padding); default all.
        q_offset: [B] int64, the key at whose place query 0 of each batch element sits, 0 to Nk - Nq; default Nk - Nq.
            With a cache that is longer than the text, the number of tokens before these queries. The values may change
            from call to call without a compiler's having to compile anew.
        text_begin: [B] int64, the key with which the text of each batch element begins, from which sinks count;
            default the begin of key_range, or 0. It is at most that, and below it where the first keys of the text are
            gone: minus their number, without padding.
        attn_mask: as of ``scaled_dot_product_attention``: numbers that are added to the scores, or booleans, True where
            a pair may be looked at; broadcasts to [B, Hq, Nq, Nk]. Of numbers of any floating-point dtype, with a
            gradient; a pair with -inf is not looked at.
        alibi_slopes: [Hq] or [B, Hq], what scores lose per token of distance (ALiBi); constants.
        softcap: scores are bent into (-softcap, softcap) before anything is added (Gemma 2); 0 or None: they are not.
        sliding_window: a query sees keys at a distance below this only, sinks included; 0 or None: at any. In
            contrast to ``window``, it cuts.
        output_gate: logits of a gate on the output, by whose sigmoid it is multiplied: [B, Hq, Nq], a number per head,
            or [B, Hq, Nq, Dv], one for each channel (Qwen's head-wise and element-wise gates), converted to the dtype
            of q.
        dropout_p: share in [0, 1) of the pairs' weights that are set to 0, as of ``scaled_dot_product_attention``; the
            others are divided by ``1 - dropout_p``. Which they are is drawn from torch's generator, whatever the number
            of threads. On the CPU.
        return_lse: also return ``lse_i = log sum_{j in K_i} exp(s_ij)``, [B, Hq, Nq] in the dtype of the
            gates, -inf for an empty row; of a gradient to it each kept pair takes its share of the softmax, the gates
            none. Of ``"post"`` it is that of all pairs, of ``"log"`` that of the gated scores. With it parts of the
            keys can be put together, or a logit added that no value belongs to: ``out * sigmoid(lse - s_aux)`` is
            attention with the sink logits ``s_aux`` [Hq, 1] of gpt-oss.
        return_kept: also return the number of pairs that each head kept, the sum over i of the sizes of K_i, int64
            [B, Hq]: exact, near pairs and masks included. The kernel knows it anyway.

    Returns:
        out [B, Hq, Nq, Dv] in the dtype of q; with ``return_lse`` or ``return_kept`` the tuple (out, lse), (out, kept)
        or (out, lse, kept).

    Gradients flow to q, k, v, a, b, attn_mask and output_gate; dropped pairs have none. They are of first order and
    reverse mode, by autograd or torch.func (``grad``, ``vjp``, ``vmap``); second order and forward mode raise
    NotImplementedError. Under autocast q, k and v take the autocast dtype and the gates float32. The same inputs give
    the same bits, whatever the number of threads.

    Raises:
        ValueError: an argument of a wrong shape, dtype, device or value; the message names it.
        IndexError: sizes beyond what the operator can index.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(map(repr, MODES))}")
    check_tensors(q=q, k=k, v=v, a=a, b=b)
    if q.dim() != 4:
        raise ValueError(f"q has shape {list(q.shape)}, expected [batch, heads_q, n_q, head_dim]")
    if q_offset is not None or text_begin is not None:
        check_places(q, q_offset=q_offset, text_begin=text_begin)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    a, b = _gates_of("a", a, dtype), _gates_of("b", b, dtype)
    if density is None:
        logit_tau = _logit_tau_of(0.0 if tau is None else tau, q, dtype)
    else:
        if isinstance(tau, Tensor) or tau:
            raise ValueError(f"tau is {tau} and density is {density}, expected at most one of them")
        logit_tau = select_logit_tau(
            a, b, density, causal=causal, window=window, sinks=sinks, key_range=key_range, q_offset=q_offset,
            text_begin=text_begin, sliding_window=sliding_window, attn_mask=mask_of(attn_mask),
        )  # fmt: skip
    sliding_window, softcap = cuts_of(sliding_window, softcap)
    if scale is None:
        scale = 1 / math.sqrt(max(q.shape[3], 1))
    places = (key_range, q_offset, text_begin)
    of_scores = (mask_of(attn_mask), slopes_of(alibi_slopes, q, dtype))
    output_gate = gate_of(output_gate, q, v)
    behind = (output_gate if q.is_cpu else None, seed_of(dropout_p, q))
    if mode == "log" and tau is None and density is None:
        logit_tau = skip_logit_tau(
            q, k, a, b, scale=scale, causal=causal, window=window, sinks=sinks, key_range=key_range, q_offset=q_offset,
            text_begin=text_begin, sliding_window=sliding_window, attn_mask=of_scores[0], alibi_slopes=of_scores[1],
            softcap=softcap,
        )  # fmt: skip
    numbers = (causal, window, sinks, sliding_window, softcap, dropout_p, scale)
    arguments = (q, k, v, a, b, logit_tau, *places, *of_scores, *behind, *numbers)
    run = _run_compiled if torch.compiler.is_compiling() else _run
    out, lse, kept = run(arguments) if mode == "select" else run_mode(mode, run, arguments)
    if output_gate is not None and not q.is_cpu:
        out = out * output_gate.sigmoid()
    return results_of(out, lse if return_lse else None, kept.sum(-1) if return_kept else None)
