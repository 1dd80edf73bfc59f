"""Gradients accumulated as they are born, each in the precision that it needs; see ops/sluice/accumulate.h."""

import math
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn

from torch_sluice.accumulate import operators
from torch_sluice.accumulate.prepared import inner_optimizer, refuse_model
from torch_sluice.accumulate.report import ParameterStats, SessionStats
from torch_sluice.accumulate.session import Session

__all__ = ["ParameterStats", "Session", "SessionStats", "accumulate", "operators"]


@dataclass(frozen=True)
class _Options:
    every: int | None
    policy: str
    tolerance: float
    rounding: str
    reduction: str
    low_memory: bool
    max_norm: float | None
    seed: int


def _choose(name: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")


def _as_number(name: str, value) -> float:
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"{name} is {value!r}, expected a number") from None


def accumulate(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    every: int | None = None,
    *,
    policy: str = "auto",
    tolerance: float = 2e-3,
    rounding: str = "stochastic",
    reduction: str = "mean",
    low_memory: bool = False,
    max_norm: float | None = None,
    seed: int = 0,
) -> Session:
    """Accumulates gradients around an unmodified training loop, each in the format that it needs.

    ::

        with torch_sluice.accumulate(model, optimizer):
            for i, (x, y) in enumerate(loader):
                (loss_function(model(x), y) / 8).backward()   # gradients are added up and freed one by one
                if i % 8 == 7:
                    optimizer.step()
                    optimizer.zero_grad()

    Between backward passes sums are hidden in ``policy``'s format, and torch's own ``.grad`` is empty. Whoever reads
    ``.grad`` in Python (an optimizer, clipping, a hook, a line of yours) is shown the sum; whoever writes it, drops it
    or calls ``zero_grad`` does that to the sum. So each loop does what it does without the session: the loop, or its
    Trainer, says when to step.

    With ``every=N`` the session says when: the loop calls ``step()`` and ``zero_grad()`` after each micro-batch, and
    every N-th call acts, with the average::

        with torch_sluice.accumulate(model, optimizer, every=8):
            for x, y in loader:
                loss_function(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()

    That is the plain loop that divides each loss by N: ``.grad`` is the sum so far / N. In the micro-batches before the
    N-th, ``clip_grad_norm_``, ``clip_grad_value_``, ``zero_grad`` after ``step``, and GradScaler's methods do nothing,
    and DistributedDataParallel does not average. Calls are counted, not gradients. A ``zero_grad()`` between a backward
    pass and its ``step()`` drops the whole window, with a warning.

    A step whose gradients are not finite is left out: a warning says so, the session counts it, parameters and the
    optimizer's state stay as they are. Ranks that share gradients do so together. Not looked at are the gradients that
    a closure makes for an optimizer that is not torch's own, which may have changed parameters before.

    Args:
        model: gives the names of parameters.
        optimizer: its parameters are accumulated. Accelerate's and Lightning's prepared ones too. Optimizers that
            evaluate a closure several times (LBFGS) only without ``every``.
        every: calls of ``step()`` in a window, at least 1; None: every call acts.
        policy: the format of sums. "auto": float16 with a scale per 1024 elements where the error, predicted and then
            measured, is small, else float32; "fp16", "fp32": always that; "seed": float32 from the first gradient on
            whose norm is above 1e-3, else scaled float16.
        tolerance: for "auto", the relative error of a sum above which it goes on in float32.
        rounding: of float16 sums: "stochastic", or "nearest", which loses what is small beside the sum.
        reduction: of the loss, "mean" or "sum"; only matters with ``Session.count()``.
        low_memory: gradients are never all in ``.grad``: ``step()`` averages and steps one parameter at a time, and
            drops its sum. For optimizers that treat each parameter for itself, in loops that don't look at gradients.
        max_norm: with ``low_memory``, clips the norm of all averaged gradients to this.
        seed: of stochastic rounding.

    Returns:
        A context manager whose value is the :class:`Session`, with ``steps``, ``stats()``, ``count()``, ``reset()``,
        ``state_dict()`` and ``load_state_dict()``.

    Raises:
        TypeError: model or optimizer is something else.
        ValueError: another argument is not allowed; the message says what is.
        RuntimeError: on entering, if a parameter or the optimizer is in another open session.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if every is not None and (isinstance(every, bool) or not isinstance(every, Integral) or every < 1):
        raise ValueError(f"every is {every!r}, expected an integer of at least 1, or None: the loop says when to step")
    every = None if every is None else int(every)
    optimizer = inner_optimizer(optimizer, every)
    refuse_model(model)
    if isinstance(optimizer, torch.optim.LBFGS) and every is not None and every > 1:
        raise ValueError(
            f"optimizer is LBFGS, which evaluates its closure several times, and every is {every}, expected "
            "accumulate() without every"
        )
    _choose("rounding", rounding, ("stochastic", "nearest"))
    _choose("reduction", reduction, ("mean", "sum"))
    if max_norm is not None and not low_memory:
        raise ValueError("max_norm is given without low_memory=True; use torch.nn.utils.clip_grad_norm_ before step()")
    if max_norm is not None and not 0 < _as_number("max_norm", max_norm) < math.inf:
        raise ValueError(f"max_norm is {max_norm}, expected a number above 0")
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise ValueError(f"seed is {seed!r}, expected an integer")
    if low_memory and any(type(module).__name__ == "DistributedDataParallel" for module in model.modules()):
        raise ValueError("low_memory=True hides gradients from DistributedDataParallel, which must average them")
    _as_number("tolerance", tolerance)
    options = _Options(every, policy, tolerance, rounding, reduction, bool(low_memory), max_norm, int(seed))
    return Session(model, optimizer, options)
