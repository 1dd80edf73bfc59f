"""Which channels go: what each group costs at several sizes, measured as far as it is asked for, against what it wins.

A greedy order of moves takes the next step of the group that wins most predicted latency for what it costs. It only
looks one step ahead in each group, so that what a group costs is measured when the order comes to it: of a model that
can be pruned little, little is measured. Between sizes that are measured, what is lost in the layers that read the
group tells how its cost grows (residuals.py).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch_sluice.compress.calling import describe_error
from torch_sluice.compress.measure import Measure
from torch_sluice.compress.progress import Progress
from torch_sluice.compress.pruning import Plan, Pruner
from torch_sluice.compress.search import find_longest

FRACTIONS = (0.9375, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)  # shares of a group that are tried
_GROWN = 8.0  # times what is lost at a measured size, up to which cost is taken to grow with it
_FIRST = 4  # moves that are tried first, or half as many as there are groups


@dataclass
class Sensitivity:
    """What a group costs (``Measure.loss``) at each number of kept units, descending, down to where it is too much or
    to where it was asked for."""

    group: int
    kept: list[int]
    losses: list[float]
    reason: str | None = None  # why it cannot be cut further, if a cut fails


class Curves:
    """The sensitivities of all groups, each measured one size further when that is asked for.

    Weights are fitted to all folds but the last, and outputs compared on that.

    Attributes:
        evaluations: how often the model ran for it.
    """

    def __init__(self, pruner: Pruner, measure: Measure, most: float, round_to: int, progress: Progress):
        self.pruner, self.measure, self.most, self.progress = pruner, measure, most, progress
        self.left = [group.kept_choices(FRACTIONS, round_to) for group in pruner.groups]
        self.curves = [Sensitivity(g, [], []) for g in range(len(pruner.groups))]
        self._residuals: dict[int, dict[int, float]] = {}  # group -> kept -> what its readers lose, where known
        self._measured: dict[int, tuple[float, float]] = {}  # group -> what they lose and what it costs, last measured
        self.evaluations = 0

    def further(self, g: int) -> bool:
        """Measures group g alone at its next size. False where there is none, or where it costs more than ``most``,
        after which no further one is tried."""
        if not self.left[g]:
            return False
        curve, kept = self.curves[g], self.left[g].pop(0)
        loss = self._predict(g, kept)
        if loss is None:
            loss = self._measure(g, kept)
        if loss > self.most:
            self.progress.skip(len(self.left[g]))
            self.left[g] = []
            return False
        curve.kept.append(kept)
        curve.losses.append(loss)
        return True

    def _measure(self, g: int, kept: int) -> float:
        self.progress.step(self.pruner.groups[g].name)
        self.evaluations += 1
        try:
            with self.pruner.pruned({g: kept}, self.measure.folds[-1]) as candidate:
                loss, self.curves[g].reason = self.measure.loss(candidate)
        except Exception as error:
            self.curves[g].reason = describe_error(error)
            return math.inf
        if g not in self._residuals:
            counts = [kept, *self.left[g]]
            residuals = self.pruner.residuals(g, counts, self.measure.folds[-1])
            self._residuals[g] = dict(zip(counts, residuals, strict=True)) if residuals is not None else {}
        if kept in self._residuals[g]:
            self._measured[g] = self._residuals[g][kept], loss
        return loss

    def _predict(self, g: int, kept: int) -> float | None:
        """What a cut costs, where one that was measured tells it."""
        if g not in self._measured or kept not in self._residuals[g]:
            return None
        (before, loss), now = self._measured[g], self._residuals[g][kept]
        return loss * now / before if 0 < now <= _GROWN * before else None

    def measure_first(self) -> None:
        """The smallest cut of each group."""
        self.progress.start("sensitivity of", len(self.curves))
        for g in range(len(self.curves)):
            self.further(g)

    def measure_all(self) -> None:
        self.progress.start("sensitivity of", sum(map(len, self.left)))
        for g in range(len(self.curves)):
            while self.further(g):
                pass


def order_moves(
    pruner: Pruner, curves: list[Sensitivity], further: Callable[[int], bool] = lambda g: False
) -> Iterator[Plan]:
    """Plans of growing size: each adds the step of a group that wins most predicted latency for what it costs.

    Args:
        further: measures one more size of a group; False: there is none.
    """
    place = [0] * len(curves)  # steps taken of each curve
    kept: Plan = {}
    while True:
        best = None
        for i, curve in enumerate(curves):
            if place[i] == len(curve.kept) and not further(curve.group):
                continue
            saved = pruner.predict_saving(kept, curve.group, curve.kept[place[i]])
            before = curve.losses[place[i] - 1] if place[i] else 0.0
            cost = max(curve.losses[place[i]] - before, 1e-6)
            if saved > 0 and (best is None or saved / cost > best[0]):
                best = (saved / cost, i)
        if best is None:
            return
        i = best[1]
        kept = {**kept, curves[i].group: curves[i].kept[place[i]]}
        place[i] += 1
        yield kept


def predict_cost(curves: list[Sensitivity], kept: Plan) -> float:
    """What a plan costs if its groups cost together what each does alone."""
    return sum(curve.losses[curve.kept.index(kept[curve.group])] for curve in curves if curve.group in kept)


def choose_longest(
    moves: Iterator[Plan],
    groups: int,
    measure: Callable[[Plan], float],
    floor: float,
    stop: Callable[[Plan], bool],
    cost: Callable[[Plan], float],
    saving: Callable[[Plan], float],
) -> Plan:
    """The longest prefix of an order of moves that keeps the floor: twice as many as long as that does, then between
    (search.py).

    Args:
        groups: how many there are.
        measure: what a plan keeps at least.
        stop: whether a plan meets the budget, so that nothing more need be pruned.
        cost, saving: what a plan is expected to cost, and to win.
    """
    plans: list[Plan] = []
    good, size, over = (0, 1.0), max(_FIRST, groups // 2), False
    while not over:
        while len(plans) < size and not over:
            plan = next(moves, None)
            if plan is not None:
                plans.append(plan)
            over = plan is None or stop(plan)
        if len(plans) == good[0]:
            break
        found = measure(plans[-1])
        if found < floor:
            costs, savings = ([0.0, *map(of, plans)] for of in (cost, saving))
            bad = len(plans), found
            good = find_longest(lambda count: measure(plans[count - 1]), floor, costs, savings, good, bad), found
            break
        good, size = (len(plans), found), 2 * size
    return plans[good[0] - 1] if good[0] else {}
