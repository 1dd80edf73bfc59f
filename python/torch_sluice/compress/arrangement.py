"""In which order weights have to lie after a cut, where forward() moves channels by what is written in its code.

``x.roll(3, 1)`` brings other channels to a layer once x is narrower. But the columns of weights, and the rows that make
channels, may lie in any order, if all that meet them follow. So the model is traced twice, whole and cut, and what
meets is compared: which index of a weight, a bias or a norm comes to lie with which of another, at which operator. An
index of the cut model may be any of the whole one that meets its like at the same operators; one that is chosen fixes
those that it meets, and they fix others. Where no choice is left, as for ``x + x.roll(3, 1)``, whose rings become
others, weights stay as they are, and values tell that this cut is wrong (verify.py).
"""

from collections import defaultdict
from typing import Any

import numpy as np
from torch import nn

from torch_sluice.compress.couplings import Couplings, Source
from torch_sluice.compress.meetings import Key, Meetings
from torch_sluice.compress.slicing import VALUES, Lost, Order, Sizes, cut
from torch_sluice.compress.tracer import trace

_MOST_WASTED = 20_000  # numbers that were matched in vain, before the rest is left to the proof
_MOST_KNOWN = 64  # cuts whose order is remembered

# number -> {how it meets another: an operator, a side of it, which of several: the other number}
Neighbours = dict[int, dict[tuple[Key, int, int], int]]


class Arranger:
    """Finds the order for any cut of one model, on the path that it takes for ``example_inputs``."""

    def __init__(self, example_inputs: Any):
        self._inputs = example_inputs
        self._whole: Couplings | None = None
        self._known: dict[frozenset, Order] = {}

    def order(self, model: nn.Module, lost: Lost, sizes: Sizes) -> Order:
        """The indices of each side that loses some, in an order that is not the present one. Empty where all may stay
        as it is, or where the cut model does not run."""
        sizes = list(sizes)
        key = frozenset((side, frozenset(indices)) for side, indices in lost.items() if indices)
        if key not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known[key] = self._find(model, lost, sizes)
        return dict(self._known[key])

    def _find(self, model: nn.Module, lost: Lost, sizes: Sizes) -> Order:
        try:
            if self._whole is None:
                self._whole = trace(model, self._inputs, meetings=Meetings())[0]
            undo = cut(model, lost, sizes)
            try:
                narrow = trace(model, self._inputs, meetings=Meetings())[0]
            finally:
                undo()
        except Exception:
            return {}  # the proof runs into the same, and names it
        return _Matching(self._whole, narrow, lost).order()


class _Matching:
    """Of each number of a cut model the number that it has in the whole one."""

    def __init__(self, whole: Couplings, narrow: Couplings, lost: Lost):
        self._whole, self._narrow, self._lost = whole, narrow, lost
        self._stays = _staying(whole, lost)
        pairs, own = {}, narrow.meetings.pairs
        self._near = _near(whole, lost)
        for key, (first, second) in whole.meetings.pairs.items():
            if not self._near[first].any():
                continue
            both = self._stays[first] & self._stays[second]
            if key in own and int(both.sum()) == len(own[key][0]):
                pairs[key] = (first[both], second[both])
        self._of_whole = _neighbours(pairs)
        self._of_narrow = _neighbours({key: own[key] for key in pairs})
        self.found: dict[int, int] = {}
        self._taken: dict[int, int] = {}
        self._wasted = 0

    def order(self) -> Order:
        sides = {(source.name, source.dim): source for source in self._narrow.sources}
        touched: list[tuple[Source, Source, np.ndarray]] = []
        for source in self._whole.sources:
            kept = np.arange(source.first, source.first + source.size)
            kept = kept[self._stays[kept]]
            narrow = sides.get((source.name, source.dim))
            if narrow is None or narrow.size != len(kept):
                continue
            if source.dim != VALUES and len(kept) < source.size:
                touched.append((source, narrow, kept))
            elif source.dim != VALUES and self._near[kept].any():
                self._fix(np.arange(narrow.first, narrow.first + narrow.size), kept)
        self._fix_rows()
        for _, narrow, kept in touched:
            self._place(range(narrow.first, narrow.first + narrow.size), kept.tolist())
        return dict(self._read(touched))

    def _fix_rows(self) -> None:
        """Rows of channels, as those of groups of a norm, keep their order."""
        own = self._narrow.meetings.rows
        for key, (numbers, are_rows) in self._whole.meetings.rows.items():
            kept = numbers[self._stays[numbers]]
            if are_rows and key in own and len(kept) == len(own[key][0]):
                self._fix(own[key][0], kept)

    def _fix(self, narrow: np.ndarray, whole: np.ndarray) -> None:
        for new, old in zip(narrow.tolist(), whole.tolist(), strict=True):
            if new and old and new not in self.found and old not in self._taken:
                self._match(new, old)

    def _place(self, places: range, kept: list[int]) -> None:
        """Gives each place that is free the first index that fits."""
        free = [old for old in kept if old not in self._taken]
        for new in places:
            if new in self.found:
                continue
            for old in free:
                if self._wasted > _MOST_WASTED:
                    return
                if old not in self._taken and self._match(new, old):
                    break

    def _match(self, new: int, old: int) -> bool:
        """Takes one number for another, and with them all that they meet; False, and nothing, where that cannot be."""
        made: list[tuple[int, int]] = []
        work = [(new, old)]
        while work:
            new, old = work.pop()
            if self.found.get(new) == old:
                continue
            of_new, of_old = self._of_narrow.get(new, {}), self._of_whole.get(old, {})
            if new in self.found or old in self._taken or of_new.keys() != of_old.keys():
                self._wasted += 1 + len(made)
                for new, old in made:
                    del self.found[new], self._taken[old]
                return False
            self.found[new], self._taken[old] = old, new
            made.append((new, old))
            work += [(other, of_old[way]) for way, other in of_new.items()]
        return True

    def _read(self, touched):
        for source, narrow, kept in touched:
            if self._whole.values_of(source.name) is not None:
                continue  # indices are part of what moves channels: they were renumbered as they lie
            order = [self.found.get(new) for new in range(narrow.first, narrow.first + narrow.size)]
            left = iter(sorted(set(kept.tolist()) - set(order)))
            order = [(next(left) if old is None else old) - source.first for old in order]
            if order != sorted(order):
                yield (source.name, source.dim), order


def _staying(couplings: Couplings, lost: Lost) -> np.ndarray:
    """A flag for each number: whether it is left after a cut."""
    own = [
        source.first + index
        for source in couplings.sources
        for index in lost.get((source.name, source.dim), ())
        if index < source.size
    ]
    everything = couplings.find(np.arange(couplings.count))
    gone = couplings.closing().close(couplings.find(np.array(own, np.int64)).tolist())
    return ~np.isin(everything, np.fromiter(gone, np.int64, len(gone)))


def _near(couplings: Couplings, lost: Lost) -> np.ndarray:
    """A flag for each number: whether sides that lose something reach it over any number of meetings."""
    near = np.zeros(couplings.count, bool)
    for source in couplings.sources:
        near[source.first : source.first + source.size] = bool(lost.get((source.name, source.dim)))
    pairs, grows = list(couplings.meetings.pairs.values()), True
    while grows:
        grows, left = False, []
        for first, second in pairs:
            if near[first].any() or near[second].any():
                near[first] = near[second] = grows = True
            else:
                left.append((first, second))
        pairs = left
    return near


def _neighbours(pairs: dict[Key, tuple[np.ndarray, np.ndarray]]) -> Neighbours:
    result: Neighbours = defaultdict(dict)
    for key, (first, second) in pairs.items():
        seen: set[tuple[int, int]] = set()
        count: dict[tuple[int, int], int] = defaultdict(int)
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            if (one, other) in seen:
                continue
            seen.add((one, other))
            for side, own, met in ((0, one, other), (1, other, one)):
                result[own][key, side, count[side, own]] = met
                count[side, own] += 1
    return result
