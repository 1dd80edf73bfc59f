"""What is known of a model's channels: each index of each dimension of each parameter has a number, and some of these
numbers can only leave the model together.

Two relations are kept. Numbers are *equal* where one element carries both: output channel 3 of a convolution and weight
3 of the batch norm behind it. And a number may stand for a *set*: a head leaves exactly when all of its channels do.

A buffer of integers may pick channels by their places. So its values 0, 1, .. up to the largest have numbers, too, as
if they were one more of its dimensions: a value leaves with the channel that it picks.
"""

import bisect
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from torch_sluice.compress.meetings import Meetings
from torch_sluice.compress.slicing import VALUES

_LARGEST_VALUE = 1 << 16  # of buffers that are taken for places of channels


class Source(NamedTuple):
    """One dimension of a parameter or buffer; its indices have the numbers first .. first + size - 1."""

    name: str  # of model.named_parameters() or named_buffers()
    dim: int  # or VALUES
    first: int
    size: int


class Move(NamedTuple):
    """Channels that an operator put elsewhere by what the code says."""

    numbers: np.ndarray
    advice: str  # part of a sentence: why they may have to stay, and what to do
    strict: bool  # whether, where there are fewer channels, others are surely moved
    taken: np.ndarray  # of a slice, those in it; else none


class _Sets(NamedTuple):
    """Numbers that stand for sets: they are gone where all members are."""

    numbers: np.ndarray
    members: np.ndarray  # of all, one set after the other
    starts: np.ndarray

    def gone(self, flags: np.ndarray) -> np.ndarray:
        return np.logical_and.reduceat(flags[self.members], self.starts)


class _Pairs(NamedTuple):
    """Numbers of elements that carry one of each: they are gone where either is."""

    numbers: np.ndarray
    first: np.ndarray
    second: np.ndarray

    def gone(self, flags: np.ndarray) -> np.ndarray:
        return (flags[self.first] | flags[self.second]).ravel()


class Couplings:
    """The numbers of all dimensions of a model's tensors, and which of them hang together. 0 is no number.

    ``meetings``: is told what becomes equal, and where (arrangement.py).
    """

    def __init__(self, model: nn.Module, meetings: Meetings | None = None):
        self.meetings = meetings
        self.sources: list[Source] = []
        self.names: dict[int, list[str]] = defaultdict(list)  # id of a tensor -> all names that it has
        self.tensors: dict[str, Tensor] = {}  # first name -> tensor
        self._count = 1
        for name, tensor in _tensors_of(model):
            if id(tensor) not in self.names:
                self.tensors[name] = tensor
                for dim, size in enumerate(tensor.shape):
                    if size > 1:
                        self.sources.append(Source(name, dim, self._count, size))
                        self._count += size
                if count := _count_values(tensor):
                    self.sources.append(Source(name, VALUES, self._count, count))
                    self._count += count
            self.names[id(tensor)].append(name)
        self.original_count = self._count  # of parameters, and 0
        self._parent = np.arange(self._count)
        self._sets: list[tuple[int, np.ndarray]] = []
        self._known_sets: dict[bytes, int] = {}
        self.contracted = np.zeros(self._count, bool)  # summed over in a product, as the inputs of a linear layer are
        self.survived = np.zeros(self._count, bool)  # left by a product as its output
        self.attended = np.zeros(self._count, bool)  # in a product of activations with activations
        self.splits: list[Tensor] = []  # numbers where one dimension became several, as channels become heads
        self.parts: list[Tensor] = []  # numbers of a dimension that was divided into equal parts, which may be no rows
        self.moves: list[Move] = []
        self._frozen: dict[int, str] = {}  # number -> why it cannot leave
        self._made: list[_Sets | _Pairs] = []  # numbers that were added, each after those that it depends on
        self.gone: np.ndarray | None = None  # a flag for each number, where a run acts as if some had left

    @property
    def count(self) -> int:
        """Of all numbers, 0 included."""
        return self._count

    def find(self, numbers: np.ndarray) -> np.ndarray:
        """What stands for each number and all that are equal to it."""
        while True:
            parents = self._parent[numbers]
            if np.array_equal(parents, numbers):
                return numbers
            numbers = self._parent[parents]

    def join(self, first: np.ndarray, second: np.ndarray) -> None:
        """Makes numbers equal, in pairs; pairs with 0 are left out."""
        both = (first != 0) & (second != 0)
        if self.meetings is not None:
            self.meetings.add(first[both], second[both])
        pairs = np.stack([self.find(first[both]), self.find(second[both])])
        pairs = pairs[:, pairs[0] != pairs[1]]
        for one, other in np.unique(np.sort(pairs, axis=0), axis=1).T.tolist() if pairs.size else ():
            one, other = self._root(one), self._root(other)
            if one != other:
                self._parent[max(one, other)] = min(one, other)

    def _root(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = int(self._parent[number])
        return number

    def leave(self, gone: dict[tuple[str, int], set[int]]) -> None:
        """From now on a run is to act as if these indices of (name, dim) had left, and no others (tracer.py)."""
        flags = np.zeros(len(self._parent), bool)
        for source in self.sources:
            for index in gone.get((source.name, source.dim), ()):
                flags[source.first + index] = True
        for made in self._made:
            flags[made.numbers] = made.gone(flags)
        self.gone = flags

    def _note_made(self, made: _Sets | _Pairs) -> None:
        self._made.append(made)
        if self.gone is not None:
            self.gone[made.numbers] = made.gone(self.gone)

    def numbers_for(self, rows: np.ndarray) -> np.ndarray:
        """The number that stands for each row of [rows, members], and leaves exactly when all of it do; 0 for none."""
        roots = np.sort(self.find(rows), axis=1)
        numbers = roots[:, -1].copy()
        several = ((roots != 0) & (roots != numbers[:, None])).any(1)
        known: dict[bytes, int] = {}  # equal rows are looked at once
        new: list[tuple[int, np.ndarray]] = []
        for place in np.flatnonzero(several).tolist():
            row = roots[place]
            key = row.tobytes()
            if key not in known:
                known[key] = self._number_of_set(row[np.append(row[:-1] != row[1:], True) & (row != 0)], new)
            numbers[place] = known[key]
        if new:
            sizes = [len(members) for _, members in new]
            members = np.concatenate([members for _, members in new])
            self._note_made(_Sets(np.array([number for number, _ in new]), members, np.cumsum([0, *sizes[:-1]])))
        if self.meetings is not None:
            members = rows.ravel()
            both = (members != 0) & (numbers.repeat(rows.shape[1]) != 0)
            self.meetings.add(numbers.repeat(rows.shape[1])[both], members[both])
        return numbers

    def _number_of_set(self, members: np.ndarray, new: list[tuple[int, np.ndarray]]) -> int:
        """Of several roots, in ascending order. A set that is not known is added to ``new``."""
        key = members.tobytes()
        if key not in self._known_sets:
            self._make_room(1)
            self._known_sets[key] = self._count
            self._sets.append((self._count, members))
            new.append(self._sets[-1])
            self._count += 1
        return self._known_sets[key]

    def renamed(self, axis: Tensor) -> Tensor:
        """Other numbers, equal to these: what lies in a tensor a second time is told from the first."""
        known, places = np.unique(axis.numpy(), return_inverse=True)
        self._make_room(len(known))
        names = np.where(known != 0, np.arange(self._count, self._count + len(known)), 0)
        self._count += len(known)
        self.join(known, names)
        return torch.from_numpy(names[places.reshape(axis.shape)])

    def source_of(self, number: int) -> Source | None:
        """Where a number of a parameter comes from; None for others."""
        if not 0 < number < self.original_count:
            return None
        return self.sources[bisect.bisect(self.sources, number, key=lambda source: source.first) - 1]

    def values_of(self, name: str) -> Source | None:
        """The values of a buffer of integers."""
        return next((source for source in self.sources if (source.name, source.dim) == (name, VALUES)), None)

    def fresh_numbers(self, count: int, first: Tensor, second: Tensor) -> Tensor:
        """New numbers for elements that carry one of each: they are gone where either is."""
        self._make_room(count)
        numbers = np.arange(self._count, self._count + count)
        self._count += count
        self._note_made(_Pairs(numbers, first.numpy(), second.numpy()))
        return torch.from_numpy(numbers)

    def _make_room(self, count: int) -> None:
        size = len(self._parent)
        if self._count + count > size:
            more = max(count, size)
            self._parent = np.concatenate([self._parent, np.arange(size, size + more)])
            if self.gone is not None:
                self.gone = np.concatenate([self.gone, np.zeros(more, bool)])

    def note_rows(self, axis: Tensor, are_rows: bool) -> None:
        """Remembers an axis by whose dimensions numbers form rows. ``are_rows``: whether they do; where they may in a
        wider model, they are noted for arrangement.py."""
        if are_rows:
            self.splits.append(axis)
        if self.meetings is not None:
            self.meetings.add_rows(axis.numpy().ravel(), are_rows)

    def forget_notes(self) -> None:
        """What was noted for finding units."""
        self.splits.clear()
        self.parts.clear()
        self.moves.clear()

    def freeze(self, numbers: np.ndarray, reason: str) -> None:
        """These cannot leave."""
        for number in np.unique(numbers[numbers != 0]).tolist():
            self._frozen.setdefault(number, reason)

    def mark(self, flags: np.ndarray, numbers: np.ndarray) -> None:
        """Sets flags[number] for the numbers of parameters."""
        flags[numbers[numbers < len(flags)]] = True

    def closing(self) -> "Closing":
        """The couplings, complete, in a form that answers what leaves with what."""
        return Closing(self._parent, self._sets, self._frozen, self.find)


def _tensors_of(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return (*model.named_parameters(remove_duplicate=False), *model.named_buffers())


def describe_tensors(model: nn.Module) -> list[tuple]:
    """What the numbers of a model's parameters depend on, to be compared while all of these tensors live."""
    return [(name, id(tensor), tensor.shape, _count_values(tensor)) for name, tensor in _tensors_of(model)]


def _count_values(tensor: Tensor) -> int:
    """One more than the largest value of a buffer that may hold places of channels; 0 for others."""
    if tensor.dtype not in (torch.int64, torch.int32) or not 1 < tensor.numel() <= _LARGEST_VALUE or tensor.is_meta:
        return 0
    low, high = (int(value) for value in tensor.aminmax())
    return high + 1 if low >= 0 and high < _LARGEST_VALUE else 0


class Closing:
    """Answers which numbers leave with others, once nothing more is coupled. Works on what ``find`` returns."""

    def __init__(self, parent, sets, frozen, find):
        self._sets = [(int(find(np.array([head]))[0]), frozenset(find(members).tolist())) for head, members in sets]
        self._with_head, self._with_member = defaultdict(list), defaultdict(list)
        for number, (head, members) in enumerate(self._sets):
            self._with_head[head].append(number)
            for member in members:
                self._with_member[member].append(number)
        self.work = 0  # numbers that were looked at
        self.frozen: dict[int, str] = {}
        for number, reason in frozen.items():
            self.frozen.setdefault(int(find(np.array([number]))[0]), reason)

    def close(self, roots: Iterable[int]) -> frozenset[int]:
        """These and all that leave with them."""
        gone: set[int] = set()
        work = list(roots)
        missing: dict[int, int] = {}  # of each set, members that stay
        while work:
            root = work.pop()
            if root in gone:
                continue
            gone.add(root)
            for number in self._with_head.get(root, ()):
                work.extend(self._sets[number][1])
            for number in self._with_member.get(root, ()):
                head, members = self._sets[number]
                missing[number] = missing.get(number, len(members)) - 1
                if not missing[number]:
                    work.append(head)
        self.work += len(gone)
        return frozenset(gone)

    def why_frozen(self, roots: Iterable[int]) -> str | None:
        return next((self.frozen[root] for root in roots if root in self.frozen), None)
