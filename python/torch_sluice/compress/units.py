"""Ways in which the channels of a layer may form units, each of which leaves alone (graph.py)."""

import math
from collections import Counter
from collections.abc import Hashable, Iterator

import numpy as np

from torch_sluice.compress.couplings import Closing
from torch_sluice.compress.labels import varying

MOST_WORK = 1_000_000  # numbers that are looked at for the units of one layer, a second's
_LONGEST_PERIOD = 16


def partitions_of(closing: Closing, own: np.ndarray, splits):
    """Ways to form units from the channels of a layer, with the numbers of rows that these ways know of: by the rows of
    every array that they were arranged in, or each for itself where they never were."""
    mine, touching = set(own.tolist()), []
    for axis, roots, all_roots in splits:
        if not mine.isdisjoint(all_roots):
            touching.append((axis, roots))
    if not touching:
        yield form_units(closing, [[root] for root in dict.fromkeys(own.tolist())]), []
        return
    for axis, roots in touching:
        for dim in sorted(varying(axis)):
            rows = np.moveaxis(roots, dim, 0).reshape(roots.shape[dim], -1)
            sets = [sorted(mine.intersection(row.tolist())) for row in rows]
            if not all(sets):
                continue
            units = form_units(closing, sets)  # rows of values bring those of queries and keys
            if mine <= set().union(*units):
                yield units, [(a.shape[d], np.moveaxis(r, d, 0)) for a, r in touching for d in varying(a)]


def form_units(closing: Closing, sets: list[list[int]]) -> list[frozenset[int]]:
    """What leaves with each of these; those that share something are one unit."""
    units: dict[int, frozenset[int]] = {}  # by place, in order
    owner: dict[int, int] = {}
    for place, own in enumerate(sets):
        closed = closing.close(own)
        shared = {owner[root] for root in closed if root in owner}
        if len(shared) == 1 and closed <= units[next(iter(shared))]:
            continue
        if shared:
            closed = closing.close(closed.union(*(units.pop(other) for other in shared)))
            place = min(shared)
        units[place] = closed
        owner.update(dict.fromkeys(closed, place))
    return [units[place] for place in sorted(units)]


def alike(
    closing: Closing, own: np.ndarray, atoms, slices: list[set[int]]
) -> Iterator[tuple[list[frozenset[int]], list]]:
    """Units of channels that are read differently, as x[:, ::2] and x[:, 1::2] are, or lie in other slices: some of
    each kind, so that units are alike."""
    roots, begin, readers = list(dict.fromkeys(own.tolist())), closing.work, []
    for root in roots:
        readers.append(_readers(closing, root, atoms))
        if closing.work - begin > MOST_WORK:
            return
    for sets in _mixed(roots, readers):
        yield form_units(closing, sets), []
    if slices:
        kinds = [(kind, *(root in part for part in slices)) for root, kind in zip(roots, readers, strict=True)]
        for sets in _mixed(roots, kinds):
            yield form_units(closing, sets), []
        most = Counter(kinds).most_common(1)[0][0]  # what lies in no slice of fixed size may leave alone
        yield form_units(closing, [[root] for root, kind in zip(roots, kinds, strict=True) if kind == most]), []


def _mixed(roots: list[int], kinds: list[Hashable]) -> Iterator[list[list[int]]]:
    """Sets of channels of all kinds. By blocks of places where kinds repeat, and what comes behind the last stays; and
    the first of each kind together, the second of each, and so on."""
    of_kind: dict[Hashable, list[int]] = {}
    for kind, root in zip(kinds, roots, strict=True):
        of_kind.setdefault(kind, []).append(root)
    if len(of_kind) < 2:
        return
    for period in range(2, min(_LONGEST_PERIOD, len(roots) // 2) + 1):
        same = next((i for i in range(period, len(kinds)) if kinds[i] != kinds[i - period]), len(kinds))
        if same > len(kinds) - period:
            yield [roots[i : i + period] for i in range(0, same - period + 1, period)]
            break
    count = math.gcd(*map(len, of_kind.values()))
    if count > 1:
        each = [np.array(members).reshape(count, -1) for members in of_kind.values()]
        yield np.concatenate(each, 1).tolist()


def _readers(closing: Closing, root: int, atoms) -> tuple:
    """How many indices of which sides leave with a channel."""
    return tuple(sorted(Counter(source for gone in closing.close([root]) for source, _ in atoms.get(gone, ())).items()))
