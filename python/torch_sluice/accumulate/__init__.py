"""Gradients accumulated as they are born, each in the precision that it needs; see ops/sluice/accumulate.h."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from torch_sluice.accumulate import operators
from torch_sluice.accumulate.report import ParameterStats, SessionStats
from torch_sluice.accumulate.session import Session
from torch_sluice.accumulate.window import STEP_CALLS

__all__ = ["ParameterStats", "Session", "SessionStats", "accumulate", "operators"]


@dataclass(frozen=True)
class _Options:
    every: int
    policy: str
    tolerance: float
    rounding: str
    reduction: str
    step_calls: str
    low_memory: bool
    max_norm: float | None
    seed: int


def _choose(name: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")


def accumulate(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    every: int = 1,
    *,
    policy: str = "auto",
    tolerance: float = 2e-3,
    rounding: str = "stochastic",
    reduction: str = "mean",
    step_calls: str = "auto",
    low_memory: bool = False,
    max_norm: float | None = None,
    seed: int = 0,
) -> Session:
    """Accumulates gradients over ``every`` micro-batches around an unmodified training loop.

    ::

        with torch_sluice.accumulate(model, optimizer, every=8):
            for x, y in loader:
                loss_function(model(x), y).backward()   # gradients are added up and freed one by one
                optimizer.step()                        # acts on each eighth call, with the average
                optimizer.zero_grad()

    A loop that calls ``step()`` itself only after every eighth micro-batch works too, and gets the sum, because such
    loops divide their loss themselves; the first call of ``step()`` tells which kind of loop it is. Gradients are in
    ``.grad`` from the window's last backward pass up to the step (for ``clip_grad_norm_``, ``GradScaler``), and None at
    other times. A window with a gradient that is not finite makes no step: a warning says so and the session counts it.

    Args:
        model: gives the names of parameters, and the DistributedDataParallel module where there is one.
        optimizer: its parameters are accumulated. Any torch optimizer but LBFGS.
        every: micro-batches in a window, at least 1.
        policy: the format of sums. "auto": float16 with a scale per 1024 elements where the measured error is small,
            else float32; "fp16", "fp32": always that; "seed": float32 from the first gradient on whose norm is above
            1e-3, else scaled float16.
        tolerance: for "auto", the relative error of a sum above which it goes on in float32.
        rounding: of float16 sums: "stochastic", or "nearest", which loses what is small beside the sum.
        reduction: of the loss, "mean" or "sum"; only matters with ``Session.count()``.
        step_calls: how often the loop calls ``step()``: "each" micro-batch, only the "last" of a window, or "auto",
            which takes a first call after at least ``every`` backward passes for the latter.
        low_memory: gradients are never all in ``.grad``: ``step()`` averages and steps one parameter at a time. For
            optimizers that treat each parameter for itself, in loops that do not look at gradients.
        max_norm: with ``low_memory``, clips the norm of all averaged gradients to this.
        seed: of stochastic rounding.

    Returns:
        A context manager whose value is the :class:`Session`, with ``stats()``, ``count()``, ``publish()``,
        ``state_dict()`` and ``load_state_dict()``.

    Raises:
        TypeError: model or optimizer is something else.
        ValueError: another argument is not allowed; the message says what is.
        RuntimeError: on entering, if the optimizer is in another session already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer is LBFGS, expected one that evaluates its gradient once a step")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every is {every!r}, expected an integer of at least 1")
    _choose("rounding", rounding, ("stochastic", "nearest"))
    _choose("reduction", reduction, ("mean", "sum"))
    _choose("step_calls", step_calls, STEP_CALLS)
    if max_norm is not None and not low_memory:
        raise ValueError("max_norm is given without low_memory=True; use torch.nn.utils.clip_grad_norm_ before step()")
    if max_norm is not None and not 0 < max_norm < math.inf:
        raise ValueError(f"max_norm is {max_norm}, expected a number above 0")
    options = _Options(every, policy, tolerance, rounding, reduction, step_calls, bool(low_memory), max_norm, int(seed))
    return Session(model, optimizer, options)
