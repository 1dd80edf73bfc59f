"""``sl_plan_search`` of ``ops/sluice/plan_search.h`` by ctypes: the fastest layouts that fit into memory."""

import ctypes
import functools
from dataclasses import dataclass

from torch_sluice.plan import native
from torch_sluice.plan.shapes import Cluster, Estimate, Layout, ModelShape

# Ranges that are searched unless the caller says otherwise. A tensor-parallel group stays within a host: see plan().
DEFAULT_SPACE = {
    "dp": (1, 2**40),
    "tp": (1, 2**40),
    "pp": (1, 2**40),
    "cp": (1, 1),
    "vpp": (1, 16),
    "micro_batch": (1, 16),
    "recompute": (0, 2),
    "zero": (0, 3),
}


class _Range(ctypes.Structure):
    _fields_ = (("least", ctypes.c_int64), ("most", ctypes.c_int64))


class _Space(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), *((name, _Range) for name in DEFAULT_SPACE))


class _Candidate(ctypes.Structure):
    _fields_ = (("layout", native.STRUCTURES[Layout]), ("estimate", native.STRUCTURES[Estimate]))


class _Found(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        *((name, ctypes.c_int64) for name in ("count", "cuttable", "predicted")),
        ("smallest", _Candidate),
    )


@dataclass(frozen=True)
class Found:
    """``candidates``: the fastest that fit, the fastest first. ``smallest``: of what was looked at, in memory."""

    candidates: tuple[tuple[Layout, Estimate], ...]
    smallest: tuple[Layout, Estimate]
    cuttable: int
    predicted: int


def search(model: ModelShape, cluster: Cluster, layout: Layout, space: dict | None = None, capacity: int = 8) -> Found:
    """The ``capacity`` fastest layouts that fit. ``layout`` gives GPUs, batch and all that ``space`` has no range for.

    ``space``: name to ``(least, most)``, as in ``DEFAULT_SPACE``, whose ranges hold where it says nothing. Raises
    ValueError for a space that has no layout, an empty range or a name that isn't searched.
    """
    unknown = set(space or ()) - set(DEFAULT_SPACE)
    if unknown:
        raise ValueError(f"space has {', '.join(sorted(unknown))}, expected {', '.join(DEFAULT_SPACE)}")
    ranges = DEFAULT_SPACE | (space or {})
    structure = _Space(ctypes.sizeof(_Space), *(_Range(*ranges[name]) for name in DEFAULT_SPACE))
    candidates, found = (_Candidate * capacity)(), _Found(ctypes.sizeof(_Found))
    arguments = [ctypes.byref(native.to_struct(value)) for value in (model, cluster, layout)]
    if _function()(*arguments, ctypes.byref(structure), candidates, capacity, ctypes.byref(found)):
        native.fail()
    kept = tuple(_read(candidates[i]) for i in range(found.count))
    return Found(kept, _read(found.smallest), found.cuttable, found.predicted)


@functools.cache
def _function():
    function = native.functions().sl_plan_search
    pointers = [ctypes.POINTER(native.STRUCTURES[kind]) for kind in (ModelShape, Cluster, Layout)]
    function.argtypes = [
        *(*pointers, ctypes.POINTER(_Space), ctypes.POINTER(_Candidate), ctypes.c_int64, ctypes.POINTER(_Found))
    ]
    return function


def _read(candidate):
    return native.from_struct(Layout, candidate.layout), native.from_struct(Estimate, candidate.estimate)
