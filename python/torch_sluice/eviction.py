"""Which blocks of a KV cache can go: those that no query reaches, and on a budget those of the least interest."""

from typing import NamedTuple

import torch
from torch import Tensor

from torch_sluice.functional import _logit
from torch_sluice.selection import GATE_LOGIT_LIMIT


class Rule(NamedTuple):
    """How attention is called, and how much may be kept; see :meth:`torch_sluice.KVCache.evict`."""

    tau: float | Tensor = 0.0
    a_max: float | Tensor = GATE_LOGIT_LIMIT
    window: int = 0
    sinks: int = 0
    sliding_window: int = 0
    budget: int | None = None

    def check(self, b_cache: Tensor) -> None:
        """Raises ValueError for what does not fit a cache with gates b_cache [.., kv_heads]."""
        for name, value, below in (("tau", self.tau, 1), ("a_max", self.a_max, torch.inf)):
            if isinstance(value, Tensor) and (value.dim() != 1 or not len(value) or len(value) % b_cache.shape[-1]):
                raise ValueError(
                    f"{name} has shape {list(value.shape)}, expected a number or [heads_q], a multiple of "
                    f"{b_cache.shape[-1]} key heads"
                )
            for number in value.tolist() if isinstance(value, Tensor) else [value]:
                if not (0 if name == "tau" else -torch.inf) <= number < below:
                    expected = "numbers in [0, 1)" if name == "tau" else "finite numbers"
                    raise ValueError(f"{name} is {number}, expected {expected}")
        if isinstance(self.tau, Tensor) and isinstance(self.a_max, Tensor) and len(self.tau) != len(self.a_max):
            raise ValueError(f"a_max has {len(self.a_max)} heads and tau {len(self.tau)}, expected as many")
        for name in ("window", "sinks", "sliding_window", "budget"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} is {value!r}, expected an integer of at least 0")


def choose(rule: Rule, columns: Tensor, length: int, b: Tensor) -> Tensor:
    """Which of the blocks that a sequence holds are to go.

    Args:
        columns: [n] int64, the rising numbers of its blocks: block c holds the keys from ``c * block_size`` on.
        length: tokens of the sequence.
        b: [n, block_size, kv_heads] gate logits of their keys.

    Returns:
        [n] bool.

    Raises:
        ValueError: more blocks must stay than the budget allows.
    """
    n, block_size, _ = b.shape
    keys = columns[:, None] * block_size + torch.arange(block_size, device=columns.device)
    last = length - 1  # the place of the first query that may be still to come
    far = (keys >= rule.sinks) & (keys <= last - max(rule.window, 1))
    out_of_sight = (keys <= last - rule.sliding_window) if rule.sliding_window > 0 else torch.zeros_like(far)
    gone = (out_of_sight | (far & _are_below_threshold(rule, b))).all(1)
    excess = n - int(gone.sum()) - (n if rule.budget is None else rule.budget)
    if excess <= 0:
        return gone
    free_to_go = ((far | out_of_sight).all(1) & ~gone).nonzero()[:, 0]
    if len(free_to_go) < excess:
        raise ValueError(
            f"budget is {rule.budget}, expected at least {rule.budget + excess - len(free_to_go)}, the blocks in which "
            "sinks, the window or the last token are"
        )
    interest = b[free_to_go].nan_to_num(nan=torch.inf).flatten(1).amax(1)
    gone[free_to_go[interest.argsort(stable=True)[:excess]]] = True
    return gone


def _are_below_threshold(rule: Rule, b: Tensor) -> Tensor:
    """[n, block_size], True for keys that the gate drops for every query head: the comparison that the operator makes,
    in its precision; rounding is monotone, so that it holds for every a up to a_max."""
    heads = b.shape[-1]
    a_max = torch.as_tensor(rule.a_max, dtype=b.dtype, device=b.device).clamp(-GATE_LOGIT_LIMIT, GATE_LOGIT_LIMIT)
    if isinstance(rule.tau, Tensor):
        threshold = torch.logit(rule.tau.to(b.device, b.dtype))
    else:
        threshold = torch.as_tensor(_logit(rule.tau), dtype=b.dtype, device=b.device)
    a_max, threshold = (x.view(heads, -1) if x.dim() else x.view(1, 1) for x in (a_max, threshold))
    z = a_max + b.clamp(-GATE_LOGIT_LIMIT, GATE_LOGIT_LIMIT)[..., None]
    return (z < threshold).flatten(2).all(2)
