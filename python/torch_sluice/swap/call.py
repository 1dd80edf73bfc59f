"""The one way from a swapped layer to the operator: reads the mask, keeps to the dense formula where it must."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_sluice.attention.forward import add_sink_logits, attend
from torch_sluice.functional import gated_attention
from torch_sluice.modes import MAX_HEAD_DIM
from torch_sluice.swap.cache import GatedCache
from torch_sluice.swap.dense import dense_gated_attention
from torch_sluice.swap.masks import as_bool_mask, first_places, operator_mask, range_of_keys, read_documents, read_mask
from torch_sluice.varlen import find_runs, join_runs, split_runs

# Two logits of 20 make a gate of sigmoid(40), which is exactly 1 in float32.
_OPEN_LOGIT = 20.0
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class GateOptions(NamedTuple):
    """What a swapped layer knows beside its gate: pairs nearer than this are never gated."""

    window: int = 0
    sinks: int = 0


def open_logits(heads: int, like: Tensor) -> Tensor:
    """Logits [B, heads, N] of an open gate for like [B, ., N, .], which occupy one number."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    number = torch.full((1, 1, 1), _OPEN_LOGIT, dtype=dtype, device=like.device)
    return number.expand(like.shape[0], heads, like.shape[2])


def operator_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether shapes, dtypes and device are the operator's: torch broadcasts and promotes where it does not."""
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4 or not (q.is_cpu or q.is_cuda):
        return False
    if not (q.dtype == k.dtype == v.dtype and q.dtype in _DTYPES) and not torch.is_autocast_enabled(q.device.type):
        return False
    return (
        q_shape[0] == k_shape[0]
        and q_shape[3] == k_shape[3]
        and k_shape[:3] == v_shape[:3]
        and k_shape[1] > 0
        and q_shape[1] % k_shape[1] == 0
        and 0 < q_shape[3] <= MAX_HEAD_DIM
        and 0 < v_shape[3] <= MAX_HEAD_DIM
    )


def attend_open(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> Tensor | None:
    """Plain attention by the operator, or None if it has no way to: the caller then does what it did before.

    ``sinks`` [Hq] are scores of a key without a value, one per head, that takes its share of every softmax, and all of
    it where no key is seen. ``softcap`` bends the scores. ``sliding_window`` is what the layer says, for a compiler
    that cannot look at the mask.
    """
    if not operator_takes(q, k, v):
        return None
    options = dict(causal=causal, scale=scale, softcap=softcap)
    uniform = None
    if mask is not None:
        if mask.dim() != 4 or mask.shape[0] not in (1, q.shape[0]):
            return None
        sizes = (q.shape[0], q.shape[2], k.shape[2])
        pattern = read_mask(mask, *sizes, causal, sliding_window)
        if pattern is None and torch.compiler.is_compiling():  # it can't look for a pattern in numbers
            pattern = None if mask.requires_grad else operator_mask(mask, *sizes, False, 0)
            options["causal"] = False  # the mask says all
        if pattern is None:
            return None
        uniform = pattern.uniform
        if uniform is not None and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            return None  # such rows pass a gradient on to q and k, through weights that are none of the operator's
        options |= pattern.options()
    out = gated_attention(
        q, k, v, open_logits(q.shape[1], q), open_logits(k.shape[1], k), return_lse=sinks is not None, **options
    )
    if sinks is not None:
        out, _ = add_sink_logits(*out, sinks)
    elif uniform is not None:
        out = _with_means(out, v, uniform)
    return out


def _with_means(out: Tensor, v: Tensor, uniform: Tensor) -> Tensor:
    """out with the mean of all values in the rows [B, H or 1, Nq] that uniform says."""
    mean = v.mean(dim=2, keepdim=True).repeat_interleave(out.shape[1] // v.shape[1], 1)
    return torch.where(uniform.unsqueeze(-1), mean, out)


def attend_gated(
    gate: nn.Module,
    logits: tuple[Tensor, Tensor],
    options: GateOptions,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    cache: GatedCache | None = None,
    sliding_window: int | None = None,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Callable[[], Tensor]]:
    """Attention of a layer with a gate; logits (a [B, Hq, Nq], b [B, heads of the gate, Nk]), sink_logits [Hq].

    Returns (out [B, Hq, Nq, Dv], what computes the weights softmax * gate [B, Hq, Nq, Nk]).
    """
    a, b = logits
    _check_gated(a, b, q, k)
    if b.shape[1] != k.shape[1]:
        b = b.repeat_interleave(k.shape[1] // b.shape[1], 1)
    near = dict(window=options.window, sinks=options.sinks, scale=scale, sink_logits=sink_logits, softcap=softcap)
    pattern = None
    if mask is not None:
        if mask.dim() != 4:
            raise ValueError(
                f"the attention mask of a gated layer has shape {list(mask.shape)}, expected [batch or 1, heads or 1, "
                "queries or 1, keys]"
            )
        pattern = read_mask(mask, q.shape[0], q.shape[2], k.shape[2], causal, sliding_window)
        if pattern is not None:
            near |= pattern.options()
            causal = pattern.causal
    sizes = (q.shape[0], q.shape[2], k.shape[2])
    if mask is not None and pattern is None:
        documents = read_documents(mask, *sizes) if causal else None
        if documents is not None:
            return _attend_documents(gate, a, b, q, k, v, mask, documents, near, dropout)
        pattern = operator_mask(mask, *sizes, causal, options.sinks)
        if pattern is not None:
            near |= pattern.options()
    if cache is not None and options.sinks:
        key_range = near.get("key_range")
        if mask is not None and pattern is None:
            key_range = range_of_keys(mask, sizes[0])
        near["text_begin"] = cache.text_begin(sizes, key_range, near.get("q_offset"), sliding_window)
    if mask is not None and pattern is None:
        return _attend_densely(gate, a, b, q, k, v, mask, causal, near, dropout)
    near["causal"] = causal
    out = attend(gate, None, q, k, v, logits=(a, b), dropout_p=dropout, **near)
    if pattern is not None and pattern.uniform is not None and sink_logits is None:  # else the sink takes such a row
        out = _with_means(out, v, pattern.uniform)
    seen = near.pop("attn_mask", None)
    return out, lambda: dense_gated_attention(q, k, v, a, b, tau=gate.tau, mask=seen, **near)[1]


def _check_gated(a: Tensor, b: Tensor, q: Tensor, k: Tensor) -> None:
    if b.shape[-1] != k.shape[2] or a.shape[-1] != q.shape[2]:
        raise ValueError(
            f"the layer attends from {q.shape[2]} to {k.shape[2]} tokens, and its gate saw {a.shape[-1]} and "
            f"{b.shape[-1]}, expected the same numbers: cross attention, and caches of past keys that are not those of "
            "transformers, work with open gates only"
        )
    if a.shape[1] != q.shape[1] or k.shape[1] % b.shape[1]:
        raise ValueError(
            f"the layer has {q.shape[1]} query and {k.shape[1]} key heads, and its gate {a.shape[1]} and {b.shape[1]}, "
            "expected the same, or key heads that are a multiple: pass example= to swap_attention"
        )


def _attend_documents(gate, a, b, q, k, v, mask, lengths, near, dropout) -> tuple[Tensor, Callable[[], Tensor]]:
    """Texts that are packed into rows: each is attended to alone, neighbours of the same length together."""
    runs = find_runs([(length, length) for length in lengths])
    columns = [split_runs(x.transpose(1, 2).flatten(0, 1), runs, False) for x in (q, k, v, a, b)]
    near = {name: near[name] for name in ("window", "sinks", "scale", "sink_logits", "softcap")}
    outs = [
        attend(gate, None, *inputs, logits=logits, causal=True, dropout_p=dropout, **near)
        for *inputs, logits in ((q, k, v, (a, b)) for q, k, v, a, b in zip(*columns, strict=True))
    ]
    out = join_runs(outs).unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)
    return out, lambda: dense_gated_attention(q, k, v, a, b, mask=mask, keep_self=True, tau=gate.tau, **near)[1]


def _attend_densely(gate, a, b, q, k, v, mask, causal, near, dropout) -> tuple[Tensor, Callable[[], Tensor]]:
    """For masks that the operator does not take. The mask says who sees whom; a causal layer's token keeps itself."""
    if dropout > 0:
        raise ValueError(
            f"the attention dropout is {dropout}, expected 0 with a mask that the operator does not take: set the "
            "attention dropout of the model (attn_pdrop, attention_dropout, dropout) to 0"
        )
    warnings.warn(
        "this attention mask shows a causal layer later keys, or texts within a row that begin at different keys, or a "
        "compiler can't read it: gated attention is computed densely, which is exact, slow, and teaches the gate "
        "nothing about the pairs it drops",
        stacklevel=3,
    )
    n_q, n_k = q.shape[2], k.shape[2]
    if causal and n_q < n_k and "q_offset" not in near:
        allowed = as_bool_mask(mask)
        if allowed is not None:
            near = near | dict(q_offset=first_places(allowed, n_q, n_k).expand(q.shape[0]))
    out, weights = dense_gated_attention(q, k, v, a, b, mask=mask, keep_self=causal, tau=gate.tau, **near)
    return out, lambda: weights
