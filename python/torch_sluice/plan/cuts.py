"""Divides work so that uneven ranks are done at the same time: the exact optima of ops/sluice/balance.h."""

import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from torch_sluice.plan import core


class Cut(NamedTuple):
    """Layers over the stages of a pipeline.

    ``first`` has an element more than there are stages: stage s has the layers ``first[s]`` to ``first[s + 1] - 1``.
    """

    first: tuple[int, ...]
    max_s: float  # of the slowest stage
    sum_s: float  # of all stages


class Shares(NamedTuple):
    """Micro-batches of each rank, and the seconds until the last rank has done its."""

    micro_batches: tuple[int, ...]
    max_s: float


class _CutArguments(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        *((name, ctypes.c_int64) for name in ("layers", "stages", "least_layers")),
        ("bottleneck_weight", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("layer_s", "factors", "extra_s", "layer_bytes", "kept_bytes", "kept")),
        *((name, ctypes.c_void_p) for name in ("extra_bytes", "limits", "workspace")),
        ("workspace_size", ctypes.c_size_t),
        ("first", ctypes.c_void_p),
    ]


class _CutResult(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("max_s", ctypes.c_double),
        ("sum_s", ctypes.c_double),
        ("rounds", ctypes.c_int64),
    ]


class _ShareArguments(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        *((name, ctypes.c_int64) for name in ("ranks", "micro_batches", "least")),
        *((name, ctypes.c_void_p) for name in ("most", "micro_batch_s", "fixed_s", "shares")),
    ]


def cut_layers(
    layer_s: Sequence[float],
    stages: int,
    *,
    bottleneck_weight: float = math.inf,
    least_layers: int = 1,
    factors: Sequence[float] | None = None,
    extra_s: Sequence[float] | None = None,
    layer_bytes: Sequence[float] | None = None,
    kept_bytes: Sequence[float] | None = None,
    kept: Sequence[float] | None = None,
    extra_bytes: Sequence[float] | None = None,
    limits: Sequence[float] | None = None,
) -> Cut:
    """The best cut of a model's layers, in their order, into stages that fit.

    Args:
        layer_s: seconds of each layer for a micro-batch, forward and backward.
        stages: of the pipeline.
        bottleneck_weight: ``bottleneck_weight * (slowest stage) + (sum of all stages)`` is made small; m - 1 for m
            micro-batches. Infinity: first the slowest stage, then the sum.
        least_layers: of a stage.
        factors: of each stage's times, above 1 for a slow rank; default: 1.
        extra_s: seconds of each stage beside its layers; default: 0.
        layer_bytes: weights, gradients and optimizer state of each layer; default: 0.
        kept_bytes: activations of each layer for a micro-batch; default: 0.
        kept: micro-batches that each stage keeps at once; default: 1.
        extra_bytes: of each stage beside its layers; default: 0.
        limits: bytes that each stage has room for; default: no limit.

    Raises:
        ValueError: for bad input, and where no cut fits; the message says how many layers would.
    """
    alive = []

    def point(argument, values, count=None, each="stage"):
        if values is None:
            return None
        alive.append(_array(argument, values, count, each))
        return alive[-1].ctypes.data

    times = _array("layer_s", layer_s, None, "layer")
    stages = core.whole_number("stages", stages)
    arguments = _CutArguments(
        size=ctypes.sizeof(_CutArguments),
        layers=len(times),
        stages=stages,
        least_layers=core.whole_number("least_layers", least_layers),
        bottleneck_weight=core.number("bottleneck_weight", bottleneck_weight),
        layer_s=times.ctypes.data,
        layer_bytes=point("layer_bytes", layer_bytes, len(times), "layer"),
        kept_bytes=point("kept_bytes", kept_bytes, len(times), "layer"),
        factors=point("factors", factors, stages),
        extra_s=point("extra_s", extra_s, stages),
        kept=point("kept", kept, stages),
        extra_bytes=point("extra_bytes", extra_bytes, stages),
        limits=point("limits", limits, stages),
    )
    size = ctypes.c_size_t()
    core.call("sl_cut_layers_workspace_size", ctypes.byref(arguments), ctypes.byref(size))
    workspace, first = np.empty(size.value // 8 + 1), np.empty(stages + 1, np.int64)
    arguments.workspace, arguments.workspace_size = workspace.ctypes.data, workspace.nbytes
    arguments.first = first.ctypes.data
    result = _CutResult(size=ctypes.sizeof(_CutResult))
    core.call("sl_cut_layers", ctypes.byref(arguments), ctypes.byref(result))
    return Cut(tuple(first.tolist()), result.max_s, result.sum_s)


def share_micro_batches(
    micro_batch_s: Sequence[float],
    micro_batches: int,
    *,
    least: int = 1,
    most: Sequence[int] | None = None,
    fixed_s: Sequence[float] | None = None,
) -> Shares:
    """The shares of a step's micro-batches with which data-parallel ranks are done as early as they can.

    Args:
        micro_batch_s: seconds of a micro-batch on each rank.
        micro_batches: of all ranks together.
        least: micro-batches that each rank gets.
        most: that each rank can take; default: no limit.
        fixed_s: seconds of each rank beside its micro-batches; default: 0.

    Raises:
        ValueError: for bad input, or limits that leave no room.
    """
    times = _array("micro_batch_s", micro_batch_s, None, "rank")
    fixed = None if fixed_s is None else _array("fixed_s", fixed_s, len(times), "rank")
    limits = None if most is None else [core.whole_number(f"most[{rank}]", value) for rank, value in enumerate(most)]
    if limits is not None and len(limits) != len(times):
        raise ValueError(f"most has {len(limits)} values, expected {len(times)}: one for each rank")
    limits = None if limits is None else np.array(limits, np.int64)
    shares = np.empty(len(times), np.int64)
    arguments = _ShareArguments(
        size=ctypes.sizeof(_ShareArguments),
        ranks=len(times),
        micro_batches=core.whole_number("micro_batches", micro_batches),
        least=core.whole_number("least", least),
        most=None if limits is None else limits.ctypes.data,
        micro_batch_s=times.ctypes.data,
        fixed_s=None if fixed is None else fixed.ctypes.data,
        shares=shares.ctypes.data,
    )
    longest = ctypes.c_double()
    core.call("sl_share_micro_batches", ctypes.byref(arguments), ctypes.byref(longest))
    return Shares(tuple(shares.tolist()), longest.value)


def _array(argument, values, count, each) -> np.ndarray:
    try:
        array = np.array(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        array = None
    if array is None or array.ndim != 1:
        raise ValueError(f"{argument} is {values!r}, expected a number for each {each}")
    if count is not None and len(array) != count:
        raise ValueError(f"{argument} has {len(array)} values, expected {count}: one for each {each}")
    return array
