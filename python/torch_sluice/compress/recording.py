"""What rules noted of operators in a run, for further runs of the same model on the same inputs.

Which channels meet is the same each time; only which of them are gone is another with each cut that is proved. So what
the results of an operator carry is kept under what tells it: the operator, the shapes and axes (labels.py) of its
inputs, its other arguments, and the indices by which it picks channels. A run that comes upon an operator that is not
kept, as where a router sends tokens to other experts, follows this one by its rule.
"""

import contextlib
import functools
import math
from collections.abc import Hashable, Iterator
from contextvars import ContextVar
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_sluice.compress.couplings import Couplings, describe_tensors
from torch_sluice.compress.labels import Axes, varying
from torch_sluice.compress.slicing import VALUES

_MOST_INPUTS = 4  # of which recordings are kept at a time
_MOST_BYTES = 1 << 26  # of axes in all recordings: more are followed again in each run
_MOST_OPERATORS = 1 << 14
_MOST_NUMBERS = 1 << 22  # of couplings, beyond those of parameters
_PICKING = ("index_select", "gather", "take_along_dim")


class KeptAxes(list):
    """The axes of a tensor, equal ones once: so their id tells them from others."""


class Noted(NamedTuple):
    """What a rule said of one result of an operator."""

    place: int  # among the leaves of what the operator returns
    axes: Axes
    fresh: bool  # tracer.py


def axes_of_parameters(couplings: Couplings) -> dict[str, Axes]:
    """An axis for each dimension of each parameter and buffer, by its first name."""
    by_name: dict[str, Axes] = {name: [] for name in couplings.tensors}
    for source in couplings.sources:
        if source.dim != VALUES:
            shape = [source.size if dim == source.dim else 1 for dim in range(couplings.tensors[source.name].dim())]
            by_name[source.name].append(torch.arange(source.first, source.first + source.size).reshape(shape))
    return by_name


class Room:
    """Bytes of axes that recordings may hold together, beside those of parameters."""

    def __init__(self, left: float | None = None):
        self.left = _MOST_BYTES if left is None else left

    def take(self, size: int) -> bool:
        """Whether there are so many; they are taken then."""
        fits = size <= self.left
        self.left -= size if fits else 0
        return fits

    def give(self, size: int) -> None:
        self.left += size


class Recording:
    """Of runs of a model on one input: all of it, and as if some channels had left."""

    def __init__(self, model: nn.Module, room: "Room | None" = None):
        self.couplings = Couplings(model)
        self._tensors = describe_tensors(model)
        self._known: dict[Hashable, list[list[Noted] | None]] = {}  # one for each time that a run comes upon it
        self._times: dict[Hashable, int] = {}
        self._arrays: dict[tuple, Tensor] = {}
        self._lists: dict[tuple, KeptAxes] = {}
        self.bytes = self._operators = 0
        self.followed = 0  # operators for which a rule had to be asked, in all runs
        self._room = Room(math.inf)
        self.parameters = {name: self.keep(axes) for name, axes in axes_of_parameters(self.couplings).items()}
        self._room, self._bytes_of_parameters = room or Room(), self.bytes

    def is_of(self, model: nn.Module) -> bool:
        """Whether it can go on: the model has the same parameters, and there is room."""
        numbers = self.couplings.count - self.couplings.original_count
        return numbers < _MOST_NUMBERS and describe_tensors(model) == self._tensors

    def begin(self, gone: dict[tuple[str, int], set[int]]) -> None:
        """The next run is without these indices of (name, dim)."""
        self.couplings.leave(gone)
        self.couplings.forget_notes()
        self._times.clear()

    def close(self) -> None:
        """Gives its room back."""
        self._room.give(self.bytes - self._bytes_of_parameters)

    def keep(self, axes: Axes) -> Axes:
        """The same axes, as KeptAxes unless there is no more room."""
        if not axes:
            return axes
        own = []
        for axis in axes:
            values = axis.contiguous()
            name = (tuple(axis.shape), _digest(values))
            known = self._arrays.get(name)
            if known is None:
                if not self._room.take(values.nbytes):
                    return axes
                self.bytes += values.nbytes
                known = self._arrays[name] = values.clone()  # and not all that it is a part of
            own.append(known)
        return self._lists.setdefault(tuple(map(id, own)), KeptAxes(own))

    def find(self, key: Hashable) -> list[Noted] | None:
        """What is known of the next operator of a run; None: nothing, and a rule has to be asked."""
        found = None
        if key is not None:
            time, known = self._times.get(key, 0), self._known.get(key, ())
            self._times[key] = time + 1
            found = known[time] if time < len(known) else None
        self.followed += found is None
        return found

    def add(self, key: Hashable, out: Any, noted: list[tuple[Tensor, Axes, bool]]) -> None:
        """What a rule said of the operator that ``find`` was asked for, and that gave ``out``."""
        if key is None or self._operators == _MOST_OPERATORS:
            return
        known = self._known.setdefault(key, [])
        if len(known) != self._times[key] - 1:
            return
        leaves, entry = leaves_of(out), []
        for tensor, axes, fresh in noted:
            place = next((place for place, leaf in enumerate(leaves) if leaf is tensor), None)
            if place is None or (axes and type(axes) is not KeptAxes):
                entry = None
                break
            entry.append(Noted(place, axes, fresh))
        known.append(entry)
        self._operators += 1


def leaves_of(out: Any) -> list[Any]:
    return [out] if isinstance(out, Tensor) else tree_leaves(out)


def describe_operator(tracer, func, args, kwargs) -> tuple[Hashable | None, bool]:
    """What tells the axes of an operator's results, or None where it cannot be told; and whether any of its inputs
    carries channels."""
    found: list[Axes] = []
    parts = [_describe(tracer, value, found) for value in args]
    parts += [(name, _describe(tracer, value, found)) for name, value in kwargs.items()]
    if not found:
        return None, False
    if any(type(axes) is not KeptAxes for axes in found):
        return None, True
    describe_values = _way_to_describe_values(func)
    if describe_values is not None:
        parts.append(describe_values(tracer, args, kwargs))
    return (func, *parts), True


def _describe(tracer, value: Any, found: list[Axes]) -> Hashable:
    if isinstance(value, Tensor):
        axes = tracer.axes(value)
        if axes:
            found.append(axes)
        return id(axes) if axes else 0, value.dtype, value.shape
    if isinstance(value, (list, tuple)):
        return tuple([_describe(tracer, part, found) for part in value])
    return value


@functools.cache
def _way_to_describe_values(func):
    """For operators that need more than shapes and axes: where they put channels depends on values, or on strides."""
    name = func._schema.name.partition("::")[2]
    if name in _PICKING:
        return _describe_picked
    if name == "index":
        return _describe_indexed
    if name in ("sort", "argsort", "repeat_interleave"):
        return lambda tracer, args, kwargs: None if args[0].is_floating_point() else _digest(args[0])
    if name in ("as_strided", "as_strided_"):
        return lambda tracer, args, kwargs: (args[0].stride(), args[0].storage_offset())
    return None


def _describe_picked(tracer, args, kwargs) -> Hashable:
    x, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    index = args[2] if len(args) > 2 else kwargs.get("index")
    if dim is None or any(dim % max(1, x.dim()) in varying(axis) for axis in tracer.axes(x)):
        return _digest(index)
    return None


def _describe_indexed(tracer, args, kwargs) -> Hashable:
    """Of masks at least how many elements they pick, which gives the shape of the result."""
    dims, dim, parts = set(), 0, []
    for index in args[1]:
        count = 1
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            count = index.dim()
            parts.append(int(index.count_nonzero()))
        if index is not None:
            dims.update(range(dim, dim + count))
        dim += count
    if any(varying(axis) & dims for axis in tracer.axes(args[0])):
        parts += [_digest(index) for index in args[1] if index is not None]
    return tuple(parts)


def _digest(tensor: Tensor) -> bytes:
    return blake2b(tensor.cpu().contiguous().reshape(-1).numpy(), digest_size=16).digest()


class _Recordings:
    """Of the inputs that a model was run on last."""

    def __init__(self):
        self._known: list[tuple[Any, Recording]] = []
        self._room = Room()

    def of(self, model: nn.Module, inputs: Any, new: bool) -> Recording:
        found = next((recording for known, recording in self._known if known is inputs), None)
        self._known = [(known, recording) for known, recording in self._known if known is not inputs]
        if new or found is None or not found.is_of(model):
            if found is not None:
                found.close()
            found = Recording(model, self._room)
        self._known.append((inputs, found))
        while len(self._known) > _MOST_INPUTS:
            self._known.pop(0)[1].close()
        return found


_CURRENT: ContextVar[_Recordings | None] = ContextVar("recordings", default=None)


@contextlib.contextmanager
def keeping_recordings() -> Iterator[None]:
    """Within it, what rules noted is kept from run to run."""
    if _CURRENT.get() is not None:
        yield
        return
    token = _CURRENT.set(_Recordings())
    try:
        yield
    finally:
        _CURRENT.reset(token)


def recording_for(model: nn.Module, inputs: Any, new: bool = False) -> Recording:
    """The one that is kept for a model and the inputs of a call, or one for a single run. ``new``: from here on it is
    another."""
    current = _CURRENT.get()
    return Recording(model) if current is None else current.of(model, inputs, new)
