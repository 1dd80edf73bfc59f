"""Simulates a training step of a pipeline: the functions of ops/sluice/schedule.h, which says what is simulated."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from torch_sluice.plan import core

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zbv")
# What `torch-sluice train --schedule` calls them, where that differs.
_ALIASES = {"zero-bubble": "zbv", "interleaved-zero-bubble": "zb-h1"}
_STAGES_PER_RANK = {"interleaved": 2, "interleaved-zero-bubble": 2, "zbv": 2, "zero-bubble": 2}

KINDS = ("forward", "backward", "backward input", "backward weight", "send forward", "send backward", "reduce")
FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, SEND_FORWARD, SEND_BACKWARD, REDUCE = range(len(KINDS))

WORK = np.dtype([("kind", "i4"), ("rank", "i4"), ("stage", "i4"), ("micro_batch", "i4")])
EVENT = np.dtype([*WORK.descr, ("begin_s", "f8"), ("end_s", "f8")])
_RANK_TIMES = np.dtype(
    [
        *((name, "f8") for name in ("busy_s", "idle_s", "wait_s", "begin_s", "end_s", "peak_bytes")),
        ("peak_activations", "i8"),
    ]
)


class Link(NamedTuple):
    """What carries messages from one rank to another: seconds, and bytes a second."""

    latency_s: float
    bytes_per_s: float


class RankTimes(NamedTuple):
    """Seconds and memory of one rank. Messages and reductions are not work."""

    busy_s: float  # its work
    idle_s: float  # compute_s of the step less busy_s
    wait_s: float  # of idle_s, what lies between its first and its last piece of work
    begin_s: float
    end_s: float
    peak_bytes: float
    peak_activations: int  # (stage, micro-batch) pairs that are kept at once


@dataclass(frozen=True)
class Simulation:
    """A simulated step.

    Attributes:
        schedule: one of ``SCHEDULES``.
        stages_per_rank, micro_batches: of the pipeline.
        makespan_s: until all work and all reductions are done.
        compute_s: until all work is done.
        bubble_share: idle time of all ranks in their time until ``compute_s``.
        bubble_ratio: idle time of all ranks / their work; (p - 1) / m for 1F1B with even stages.
        event_count: pieces of work, messages and reductions that were processed.
        ranks: one ``RankTimes`` for each rank.
        events: structured array of ``EVENT``, of which ``kind`` is an index into ``KINDS`` and ``micro_batch`` is -1
            for a reduction; empty unless asked for. Sorted by time for each rank and kind, not over all.
    """

    schedule: str
    stages_per_rank: int
    micro_batches: int
    makespan_s: float
    compute_s: float
    bubble_share: float
    bubble_ratio: float
    event_count: int
    ranks: tuple[RankTimes, ...]
    events: np.ndarray

    def chunk_of(self, stage: int) -> int:
        """Which of its rank's stages a stage is, from 0."""
        return stage // len(self.ranks)


class _Schedule(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("kind", "ranks", "stages_per_rank", "micro_batches")]


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("schedule", _Schedule),
        *((name, ctypes.c_void_p) for name in ("forward_s", "backward_input_s", "backward_weight_s", "slowdowns")),
        *((name, ctypes.c_void_p) for name in ("forward_bytes", "backward_bytes", "reduce_bytes")),
        *((name, ctypes.c_void_p) for name in ("next_links", "previous_links", "reduce_links")),
        ("shared_port", ctypes.c_int64),
        ("reduce_share", ctypes.c_double),
        ("blocking_sends", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("activation_bytes", "weight_bytes", "workspace")),
        ("workspace_size", ctypes.c_size_t),
        ("events", ctypes.c_void_p),
        ("event_capacity", ctypes.c_int64),
        ("ranks", ctypes.c_void_p),
    ]


class _Result(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        *((name, ctypes.c_double) for name in ("makespan_s", "compute_s", "bubble_share", "bubble_ratio")),
        ("event_count", ctypes.c_int64),
    ]


def simulate(
    schedule: str,
    *,
    ranks: int,
    micro_batches: int,
    forward_s: float | Sequence[float],
    backward_input_s: float | Sequence[float],
    backward_weight_s: float | Sequence[float],
    stages_per_rank: int | None = None,
    slowdowns: float | Sequence[float] | None = None,
    forward_bytes: float | Sequence[float] | None = None,
    backward_bytes: float | Sequence[float] | None = None,
    reduce_bytes: float | Sequence[float] | None = None,
    next_links: Link | Sequence[Link] | None = None,
    previous_links: Link | Sequence[Link] | None = None,
    reduce_links: Link | Sequence[Link] | None = None,
    shared_port: bool = False,
    reduce_share: float = 0.5,
    blocking_sends: bool = False,
    activation_bytes: float | Sequence[float] | None = None,
    weight_bytes: float | Sequence[float] | None = None,
    events: bool = False,
) -> Simulation:
    """Simulates a step of a pipeline; ``ops/sluice/schedule.h`` has the rules.

    Where an argument is for each stage or each rank, one value stands for all of them.

    Args:
        schedule: one of ``SCHEDULES``, or ``zero-bubble`` (zbv) or ``interleaved-zero-bubble`` (zb-h1 with 2 stages a
            rank), as ``torch-sluice train --schedule`` calls them.
        ranks: of the pipeline.
        micro_batches: of the step.
        forward_s, backward_input_s, backward_weight_s: seconds of a micro-batch, for each stage in the forward's order.
            Schedules that do not split the backward take the sum of the last two.
        stages_per_rank: default: 2 for interleaved, interleaved-zero-bubble and zbv, else 1.
        slowdowns: factor of all times, for each rank; default: 1.
        forward_bytes, backward_bytes: what a stage sends to the next and to the one before; default: 0.
        reduce_bytes: data-parallel traffic of a stage's gradients, as its link carries it; default: none.
        next_links, previous_links, reduce_links: of each rank; default: no time, as ``next_links``, as ``next_links``.
        shared_port: a rank's messages and reductions share one port.
        reduce_share: of a shared port for reductions while messages pass: 0 to 0.99.
        blocking_sends: a rank waits until what it sends has left the link.
        activation_bytes: kept for a micro-batch from the forward to the backward, for each stage; default: 0.
        weight_bytes: kept from the input's to the weights' part of the backward; default: as ``activation_bytes``.
        events: whether to give all events.

    Raises:
        ValueError: for bad input; the message names the argument, its value and what was expected.
        MemoryError: if there is no memory for the workspace or the events.
    """
    described, name = _describe(schedule, ranks, stages_per_rank, micro_batches)
    stages = described.ranks * described.stages_per_rank
    alive = []  # the arrays that the arguments point to

    def point(argument, value, count, each, convert):
        if value is None:
            return None
        alive.append(convert(argument, value, count, each))
        return alive[-1].ctypes.data

    def values(argument, value, count=stages, each="stage"):
        return point(argument, value, count, each, _numbers)

    def links(argument, value):
        return point(argument, value, described.ranks, "rank", _links)

    arguments = _Arguments(
        size=ctypes.sizeof(_Arguments),
        schedule=described,
        forward_s=values("forward_s", forward_s),
        backward_input_s=values("backward_input_s", backward_input_s),
        backward_weight_s=values("backward_weight_s", backward_weight_s),
        slowdowns=values("slowdowns", slowdowns, described.ranks, "rank"),
        forward_bytes=values("forward_bytes", forward_bytes),
        backward_bytes=values("backward_bytes", backward_bytes),
        reduce_bytes=values("reduce_bytes", reduce_bytes),
        next_links=links("next_links", next_links),
        previous_links=links("previous_links", previous_links),
        reduce_links=links("reduce_links", reduce_links),
        shared_port=bool(shared_port),
        reduce_share=core.number("reduce_share", reduce_share),
        blocking_sends=bool(blocking_sends),
        activation_bytes=values("activation_bytes", activation_bytes),
        weight_bytes=values("weight_bytes", weight_bytes),
    )
    size, count = ctypes.c_size_t(), ctypes.c_int64()
    core.call("sl_simulate_sizes", ctypes.byref(arguments), ctypes.byref(size), ctypes.byref(count))
    workspace = np.empty(size.value // 8 + 1)
    recorded = np.empty(count.value if events else 0, EVENT)
    times = np.empty(described.ranks, _RANK_TIMES)
    arguments.workspace, arguments.workspace_size = workspace.ctypes.data, workspace.nbytes
    arguments.events = recorded.ctypes.data if events else None
    arguments.event_capacity, arguments.ranks = len(recorded), times.ctypes.data
    result = _Result(size=ctypes.sizeof(_Result))
    core.call("sl_simulate", ctypes.byref(arguments), ctypes.byref(result))
    return Simulation(
        schedule=name,
        stages_per_rank=described.stages_per_rank,
        micro_batches=described.micro_batches,
        makespan_s=result.makespan_s,
        compute_s=result.compute_s,
        bubble_share=result.bubble_share,
        bubble_ratio=result.bubble_ratio,
        event_count=result.event_count,
        ranks=tuple(RankTimes(*row) for row in times.tolist()),
        events=recorded,
    )


def order(
    schedule: str, *, ranks: int, micro_batches: int, rank: int, stages_per_rank: int | None = None
) -> np.ndarray:
    """The work of one rank in its order: a structured array of ``WORK``. Arguments and errors as for ``simulate``."""
    described, _ = _describe(schedule, ranks, stages_per_rank, micro_batches)
    count = ctypes.c_int64()
    core.call("sl_schedule_work_count", ctypes.byref(described), ctypes.byref(count))
    work = np.empty(count.value, WORK)
    core.call(
        "sl_schedule_order",
        ctypes.byref(described),
        ctypes.c_int64(core.whole_number("rank", rank)),
        ctypes.c_void_p(work.ctypes.data),
    )
    return work


def _describe(schedule, ranks, stages_per_rank, micro_batches) -> tuple[_Schedule, str]:
    name = _ALIASES.get(schedule, schedule) if isinstance(schedule, str) else schedule
    if name not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}, expected one of {', '.join(SCHEDULES)}")
    if stages_per_rank is None:
        stages_per_rank = _STAGES_PER_RANK.get(schedule, 1)
    described = _Schedule(
        SCHEDULES.index(name),
        core.whole_number("ranks", ranks),
        core.whole_number("stages_per_rank", stages_per_rank),
        core.whole_number("micro_batches", micro_batches),
    )
    count = ctypes.c_int64()
    core.call("sl_schedule_work_count", ctypes.byref(described), ctypes.byref(count))  # checks the sizes
    return described, name


def _numbers(argument, value, count, each) -> np.ndarray:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{argument} is {value!r}, expected a number, or one for each {each}") from None
    if array.shape not in ((), (1,), (count,)):
        raise ValueError(
            f"{argument} has the shape {list(array.shape)}, expected one number, or {count}: one for each {each}"
        )
    return np.ascontiguousarray(np.broadcast_to(array, (count,)))


def _links(argument, value, count, each) -> np.ndarray:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{argument} is {value!r}, expected a Link(latency_s, bytes_per_s) or several") from None
    if array.shape not in ((2,), (1, 2), (count, 2)):
        raise ValueError(
            f"{argument} has the shape {list(array.shape)}, expected one Link(latency_s, bytes_per_s), or {count}: one "
            f"for each {each}"
        )
    return np.ascontiguousarray(np.broadcast_to(array, (count, 2)))
