"""The modes of gated attention beside "select", as what the operator gives of other values, put together with its lse.

- "post": the softmax is over all pairs, and only then pairs are dropped. The operator's out counts in shares of the
  kept ones; exp(lse - lse of all) makes shares of all of them. A second pass takes the lse of all, with values of one
  channel.
- "log": the gate is part of the score, s + log g. The kept pairs' weights exp(s) g are divided by their own sum, which
  the operator gives as one more channel of v, of ones.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from torch_sluice._functorch import MASK, OUTPUT_GATE

MODES = ("select", "post", "log")
MAX_HEAD_DIM = 256
_HALF = (torch.bfloat16, torch.float16)
Operator = Callable[[tuple], tuple[Tensor, Tensor, Tensor]]


def run_mode(mode: str, run: Operator, arguments: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, kept) of a mode, by the operator ``run`` and its arguments (``ops/sluice/gated_attention.h``)."""
    if mode == "select":
        return run(arguments)
    gate = arguments[OUTPUT_GATE]
    arguments = (*arguments[:OUTPUT_GATE], None, *arguments[OUTPUT_GATE + 1 :])
    q, mask = arguments[0], arguments[MASK]
    if (
        mask is not None and mask.requires_grad and mask.dtype in _HALF
    ):  # its gradient comes in two parts that may cancel
        arguments = (*arguments[:MASK], mask.float(), *arguments[MASK + 1 :])
    if mode == "log" and torch.is_autocast_enabled(q.device.type):  # in float32, though out is of autocast's dtype
        dtype = torch.get_autocast_dtype(q.device.type) if q.dtype != torch.float64 else q.dtype
        with torch.autocast(q.device.type, enabled=False):
            out, lse, kept = _run_log(run, *arguments)
        out = out.to(dtype)
    else:
        out, lse, kept = (_run_post if mode == "post" else _run_log)(run, *arguments)
    return (out if gate is None else out * gate.sigmoid().to(out.dtype)), lse, kept


def _run_post(run: Operator, q, k, v, a, b, logit_tau, *options):
    *of_scores, _, _, causal, _, _, sliding_window, softcap, _, scale = options
    out, lse, kept = run((q, k, v, a, b, logit_tau, *options))
    if logit_tau is None:  # nothing is dropped
        return out, lse, kept
    nothing = v.new_zeros(1, 1, 1, 1).expand(*v.shape[:3], 1)
    rest = (*of_scores, None, None, causal, 0, 0, sliding_window, softcap, 0.0, scale)
    _, lse_of_all, _ = run((q, k, nothing, a.detach(), b.detach(), None, *rest))
    share = (lse - lse_of_all).masked_fill(lse == -torch.inf, -torch.inf).exp()
    return out * share.unsqueeze(-1).to(out.dtype), lse_of_all, kept


def _run_log(run: Operator, q, k, v, a, b, *options):
    dtype, width = q.dtype, v.shape[3]
    if dtype in _HALF:  # the sum, which all of a row is divided by, would be rounded
        q, k, v = q.float(), k.float(), v.float()
    ones = v.new_ones(1, 1, 1, 1).expand(*v.shape[:3], 1)
    *tensors, _, causal, window, sinks, sliding_window, softcap, dropout_p, scale = options
    if width < MAX_HEAD_DIM and not dropout_p:
        out, lse, kept = run((q, k, torch.cat((v, ones), -1), a, b, *options))
        out, total = out[..., :width], out[..., width:]
    else:
        out, lse, kept = run((q, k, v, a, b, *options))
        whole = (*tensors, None, causal, window, sinks, sliding_window, softcap, 0.0, scale)
        total, *_ = run((q, k, ones, a, b, *whole))
    total = total.masked_fill((lse == -torch.inf).unsqueeze(-1), 1)
    return (out / total).to(dtype), lse + total.squeeze(-1).log().to(lse.dtype), kept


def dropped_bound(v: Tensor, tau: float | Tensor) -> Tensor:
    """[B, Hkv] The most by which a row of ``mode="post"`` is off what it would be if no pair were dropped, by its norm.

    What is dropped has g < tau, its shares of the softmax add up to 1 at most, so that tau * max_j |v_j| bounds the
    norm of their sum. ``tau`` is a number, [Hkv] or [B, Hkv]: of several query heads of a key head the largest.

    Args:
        v: [B, Hkv, Nk, Dv].
    """
    if v.dim() != 4:
        raise ValueError(f"v has shape {list(v.shape)}, expected [batch, heads_kv, n_k, head_dim_v]")
    norms = v.detach().float().norm(dim=-1)
    largest = norms.amax(-1) if norms.shape[-1] else norms.new_zeros(norms.shape[:2])
    return largest * tau
