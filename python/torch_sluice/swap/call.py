"""The one way from a swapped layer to the operator: reads the mask, keeps to the dense formula where it must."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_sluice.attention import attend
from torch_sluice.functional import gated_attention
from torch_sluice.swap.dense import dense_gated_attention
from torch_sluice.swap.masks import read_mask

# Two logits of 20 make a gate of sigmoid(40), which is exactly 1 in float32.
_OPEN_LOGIT = 20.0
_MAX_HEAD_DIM = 256


class GateOptions(NamedTuple):
    """What a swapped layer knows beside its gate: pairs nearer than this are never gated."""

    window: int = 0
    sinks: int = 0


def open_logits(heads: int, like: Tensor) -> Tensor:
    """Logits [B, heads, N] of an open gate for like [B, ., N, .], which occupy one number."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    number = torch.full((1, 1, 1), _OPEN_LOGIT, dtype=dtype, device=like.device)
    return number.expand(like.shape[0], heads, like.shape[2])


def operator_takes(q: Tensor, v: Tensor) -> bool:
    return q.dim() == 4 and max(q.shape[3], v.shape[3]) <= _MAX_HEAD_DIM and q.device.type in ("cpu", "cuda")


def attend_open(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor | None:
    """Plain attention by the operator, or None if it has no way to: the caller then does what it did before."""
    if not operator_takes(q, v):
        return None
    key_range = None
    if mask is not None:
        pattern = read_mask(mask, q.shape[0], q.shape[2], k.shape[2], causal)
        if pattern is None:
            return None
        causal, key_range, n_k = pattern
        k, v = k[:, :, :n_k], v[:, :, :n_k]
    a, b = open_logits(q.shape[1], q), open_logits(k.shape[1], k)
    return gated_attention(q, k, v, a, b, causal=causal, scale=scale, key_range=key_range)


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
) -> Tensor:
    """Attention of a layer with a gate; logits (a [B, Hq, Nq], b [B, heads of the gate, Nk])."""
    a, b = logits
    if dropout > 0:
        raise ValueError(
            f"the attention dropout is {dropout}, expected 0: which pairs a gated layer drops is its gate's to choose. "
            "Set the attention dropout of the model (attn_pdrop, attention_dropout, dropout) to 0"
        )
    if b.shape[-1] != k.shape[2] or a.shape[-1] != q.shape[2]:
        raise ValueError(
            f"the layer attends from {q.shape[2]} to {k.shape[2]} tokens, and its gate saw {a.shape[-1]} and "
            f"{b.shape[-1]}, expected the same numbers: cross attention, and caches of past keys that are not those of "
            "transformers, work with open gates only"
        )
    if b.shape[1] != k.shape[1]:
        b = b.repeat_interleave(k.shape[1] // b.shape[1], 1)
    key_range = None
    if mask is not None:
        pattern = read_mask(mask, q.shape[0], q.shape[2], k.shape[2], causal)
        if pattern is None:
            warnings.warn(
                "this attention mask is not the causal or full one with padding on the left or right: gated attention "
                "is computed densely, which is exact, slow, and teaches the gate nothing about the pairs it drops",
                stacklevel=2,
            )
            # The mask says all about who sees whom; causal only adds that a token keeps itself.
            out, _ = dense_gated_attention(
                q, k, v, a, b, mask=mask, tau=gate.tau, window=max(options.window, int(causal)), sinks=options.sinks,
                scale=scale,
            )  # fmt: skip
            return out
        causal, key_range, n_k = pattern
        k, v, b = k[:, :, :n_k], v[:, :, :n_k], b[:, :, :n_k]
    return attend(
        gate, None, q, k, v, causal=causal, window=options.window, sinks=options.sinks, scale=scale,
        key_range=key_range, logits=(a, b),
    )  # fmt: skip
