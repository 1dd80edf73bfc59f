"""The planner's C functions by ctypes: ``sl_plan_predict`` and ``sl_plan_check`` of ``ops/sluice/plan.h``."""

import ctypes
import functools
from typing import NoReturn

from torch_sluice.plan import core
from torch_sluice.plan.shapes import (
    EXCHANGES,
    OVERLAPS,
    PRECISIONS,
    RECOMPUTE,
    SCHEDULES,
    Cluster,
    Estimate,
    Layout,
    ModelShape,
    names_of,
)

_INTEGER, _FLAG, _REAL = ctypes.c_int64, ctypes.c_int32, ctypes.c_double
_CHOICES = {
    "schedule": SCHEDULES,
    "recompute": RECOMPUTE,
    "precision": PRECISIONS,
    "exchange": EXCHANGES,
    "tp_overlap": OVERLAPS,
}
_FLAGS = {
    *("gated", "tied", "dropout", "causal"),
    *("zero", "sequence_parallel", "fused_attention", "fused_loss", "fused_accumulation"),
    *("pp_overlap", "dp_overlap"),
}
_BOOLEANS = _FLAGS - {"zero"}
_REALS = {
    *("kept_share", "margin", "gradient_bytes", "reduce_bytes", "state_bytes"),
    *(set(names_of(Cluster)) - {"gpus_per_node"}),
    *(set(names_of(Estimate)) - {"micro_batches"}),
}


def _type_of(name):
    if name in _REALS:
        return _REAL
    return ctypes.c_int if name in _CHOICES else _FLAG if name in _FLAGS else _INTEGER


def _structure(kind, order=None):
    names = order or names_of(kind)
    members = [("size", ctypes.c_size_t), *((name, _type_of(name)) for name in names)]
    return type(f"_{kind.__name__}", (ctypes.Structure,), {"_fields_": members})


# The order of the C structs; that of the dataclasses is the same but for the layout's, whose defaults come last.
_LAYOUT_ORDER = ("gpus", "dp", "tp", "pp", "cp", "vpp", "micro_batch", "global_batch", *names_of(Layout)[8:])
STRUCTURES = {
    ModelShape: _structure(ModelShape),
    Cluster: _structure(Cluster),
    Layout: _structure(Layout, _LAYOUT_ORDER),
    Estimate: _structure(Estimate),
}


@functools.cache
def functions() -> ctypes.CDLL:
    """The C core, with the types of the functions that are called here."""
    library = core.library()
    pointers = [ctypes.POINTER(STRUCTURES[kind]) for kind in (ModelShape, Cluster, Layout, Estimate)]
    library.sl_plan_predict.argtypes = pointers
    library.sl_plan_check.argtypes = pointers[:3]
    return library


def _choice(name, value):
    if value not in _CHOICES[name]:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(_CHOICES[name])}")
    return _CHOICES[name].index(value)


def to_struct(value):
    """The C struct of a ModelShape, Cluster or Layout. Raises ValueError for a value of another type than declared."""
    structure = STRUCTURES[type(value)]
    struct = structure(size=ctypes.sizeof(structure))
    for name, kind in structure._fields_[1:]:
        member = getattr(value, name)
        if name in _CHOICES:
            member = _choice(name, member)
        try:
            setattr(struct, name, _real(member) if kind is _REAL else _whole(member))
        except (TypeError, ValueError, OverflowError):
            expected = "a number" if kind is _REAL else "a whole number"
            raise ValueError(f"{name} is {member!r}, expected {expected}") from None
    return struct


def from_struct(kind: type, struct):
    """The ModelShape, Cluster, Layout or Estimate that a C struct holds."""
    values = {name: getattr(struct, name) for name in names_of(kind)}
    values |= {name: _CHOICES[name][value] for name, value in values.items() if name in _CHOICES}
    return kind(**{name: bool(value) if name in _BOOLEANS else value for name, value in values.items()})


def _real(value):
    if isinstance(value, str):
        raise ValueError
    return float(value)


def _whole(value):
    if isinstance(value, str) or value != int(value) or not -(2**63) <= value < 2**63:
        raise ValueError
    return int(value)


def fail() -> NoReturn:
    """Raises the ValueError of the C function that has just failed on this thread."""
    text = functions().sl_last_error().decode(errors="replace")
    for structure in ("model", "cluster", "layout"):
        text = text.replace(f"{structure}->", "")
    raise ValueError(text)


def predict(model: ModelShape, cluster: Cluster, layout: Layout) -> Estimate:
    """The cost of a step. Raises ValueError, which names the argument, for what can't be cut or isn't a number."""
    structure = STRUCTURES[Estimate]
    answer = structure(size=ctypes.sizeof(structure))
    arguments = [ctypes.byref(to_struct(value)) for value in (model, cluster, layout)]
    if functions().sl_plan_predict(*arguments, ctypes.byref(answer)):
        fail()
    return from_struct(Estimate, answer)


def check(model: ModelShape, cluster: Cluster, layout: Layout) -> None:
    """Raises ValueError where ``predict`` would."""
    if functions().sl_plan_check(*[ctypes.byref(to_struct(value)) for value in (model, cluster, layout)]):
        fail()
