"""Cuts a model's groups, in place or in a copy; and which channels go by the seed's quantile."""

import bisect
import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_sluice._memory import release_memory
from torch_sluice.compress.compensation import Update, find_updates, reading_layer
from torch_sluice.compress.graph import ChannelGroup, lowest
from torch_sluice.compress.importance import raw_norms, relative_norms
from torch_sluice.compress.latency import measure_layers
from torch_sluice.compress.moments import Moments
from torch_sluice.compress.norm_scale import NormScale, scale_norms
from torch_sluice.compress.prediction import Prediction
from torch_sluice.compress.residuals import find_residuals
from torch_sluice.compress.slicing import Lost, Order, Sizes, cut, gather, order_for, reorder
from torch_sluice.compress.verify import difference_of_cut

_RATIOS = tuple(i / 20 for i in range(19, 0, -1))  # of the quantile policy
_MUCH = 1 << 28  # bytes of parameters of which a cut makes smaller ones

Plan = dict[int, int]  # group number -> units that stay; groups that are not named stay whole


@contextlib.contextmanager
def without(
    model: nn.Module, lost: Lost, sizes: Sizes, updates: Sequence[Update] = (), order: Order | None = None
) -> Iterator[nn.Module]:
    """Within it, the model without these channels and with these updates of weights, and then in this order, in place:
    no copy is made. It is as before after it, whatever happens."""
    undo = [cut(model, lost, sizes)]
    try:
        for update in updates:
            undo.append(update.add_to(model))
        undo.append(reorder(model, {}, order or {}))
        yield model
    finally:
        for step in reversed(undo):
            step()


@dataclass
class Pruner:
    """A model, its groups and their units in the order in which they go."""

    model: nn.Module
    groups: list[ChannelGroup]
    scores: list[Tensor]
    moments: Moments | None = None  # of all data
    folds: dict[int, Moments] = field(default_factory=dict)  # of each fold of it
    seconds: dict[str, float] = field(default_factory=dict)  # of each layer in a call
    norms: dict[str, NormScale] = field(default_factory=dict)  # whose scale is kept (norm_scale.py)
    _sides: dict[tuple[int, int], Lost] = field(default_factory=dict, repr=False)
    _prediction: Prediction | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._bytes = {name: parameter.nbytes for name, parameter in self.model.named_parameters()}

    @classmethod
    def with_scores(cls, model: nn.Module, groups: list[ChannelGroup], policy: str) -> "Pruner":
        score = raw_norms if policy == "quantile" else relative_norms
        return cls(model, groups, [score(model, group) for group in groups])

    def _lost_alone(self, g: int, kept: int) -> Lost:
        if (g, kept) not in self._sides:
            sides: Lost = {}
            gather(self.groups[g].members, lowest(self.scores[g], self.groups[g].width - kept), sides)
            self._sides[g, kept] = sides
        return self._sides[g, kept]

    def lost(self, kept: Plan) -> Lost:
        lost: Lost = {}
        for g, count in sorted(kept.items()):
            for side, indices in self._lost_alone(g, count).items():
                lost.setdefault(side, set()).update(indices)
        return lost

    def sizes(self, kept: Plan, before: Plan | None = None) -> Sizes:
        """How many units each attribute that counts them loses, of those that ``before`` left."""
        before = before or {}
        return [
            (member, before.get(g, self.groups[g].width) - count)
            for g, count in kept.items()
            for member in self.groups[g].sizes
        ]

    def residuals(self, g: int, counts: Sequence[int], left_out: int | None) -> list[float] | None:
        """What the layers that read group g lose with each of these descending numbers of units kept; None: not known
        (residuals.py)."""
        if self.moments is None:
            return None
        lost = [self._lost_alone(g, count) for count in counts]
        return find_residuals(self.model, self.groups[g], lost, self.moments, self.folds.get(left_out))

    def is_fitted(self, kept: Plan) -> bool:
        """Whether pruning so far changes weights by what the data tells."""
        if not self.folds:
            return False
        readers = self.moments.count.keys()
        return any(indices and reading_layer(side) in readers for side, indices in self.lost(kept).items())

    def _updates(self, lost: Lost, left_out: int | None) -> list[Update]:
        scaled = scale_norms(self.model, lost, self.norms)
        updates = [Update(path, lambda change=change: (change, None)) for path, change in scaled]
        if self.moments is not None:
            updates += find_updates(self.model, lost, self.moments, self.folds.get(left_out))
        return updates

    @contextlib.contextmanager
    def pruned(self, kept: Plan, left_out: int | None = None) -> Iterator[nn.Module]:
        """Within it, the model pruned so far, and compensated by all data, or all but that of a fold. ``self.model`` is
        as before after it."""
        lost, sizes = self.lost(kept), self.sizes(kept)
        if sum(self._bytes.get(name, 0) for name in {name for name, _ in lost}) > _MUCH:
            release_memory()
        order = self._order(kept)
        with without(self.model, lost, sizes, self._updates(lost, left_out), order) as model:
            yield model

    def _order(self, kept: Plan) -> Order:
        """In which what is left has to lie, where another than the present one."""
        return order_for([self.groups[g] for g in kept], self.model, self.lost(kept), self.sizes(kept))

    def build(self, kept: Plan) -> nn.Module:
        """A pruned copy, compensated where moments are known."""
        with self.pruned(kept) as model:
            return copy.deepcopy(model)

    def build_further(self, module: nn.Module, before: Plan, kept: Plan) -> nn.Module:
        """A copy of ``module``, which is this model pruned to ``before`` and trained since, pruned to ``kept``."""
        gone = {side: sorted(indices) for side, indices in self.lost(before).items()}
        present, after = self._order(before), self._order(kept)
        lost = {}
        for side, indices in self.lost(kept).items():
            new = indices.difference(gone.get(side, []))
            place = {index: i for i, index in enumerate(present[side])} if side in present else None
            lost[side] = {i - bisect.bisect(gone.get(side, []), i) if place is None else place[i] for i in new}
            if side in present:
                present[side] = [index for index in present[side] if index not in indices]
                after.setdefault(side, sorted(present[side]))
        further = copy.deepcopy(module)
        cut(further, lost, self.sizes(kept, before))
        reorder(further, present, after)
        return further

    def forget_data(self) -> None:
        """Frees the moments. No cut is compensated after that."""
        self.moments, self.folds = None, {}

    @property
    def prediction(self) -> Prediction:
        if self._prediction is None:
            self._prediction = Prediction(self.model, self.groups)
        return self._prediction

    def time_layers(self, example_inputs: Any) -> None:
        self.seconds = measure_layers(self.model, example_inputs, set(self.prediction.layers))

    def predict_seconds(self, kept: Plan) -> float:
        """Seconds of all layers that groups cut: each takes the share of its measured time that it keeps of its
        weights."""
        return self.prediction.seconds(self.seconds, kept)

    def predict_saving(self, kept: Plan, g: int, count: int) -> float:
        """Seconds that group g wins by keeping so many units beside what ``kept`` says."""
        return self.prediction.saving(self.seconds, kept, g, count)

    def why_wrong(self, kept: Plan, inputs: Any) -> str | None:
        """What a cut so far does beyond taking its units out, or None (verify.py)."""
        return difference_of_cut(self.model, self.lost(kept), self.sizes(kept), inputs, self._order(kept))


def kept_by_quantile(groups: list[ChannelGroup], scores: list[Tensor], ratio: float, round_to: int) -> Plan:
    """The seed's rule: of all units of all groups the share ``ratio`` with the smallest norms goes, ties from the last.

    A group keeps a number of units that its step and rounding allow (rounded up), and never loses its last one.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is {ratio}, expected a number in [0, 1]")
    ranked = sorted(
        (float(score) if not math.isnan(score) else math.inf, -unit, g)
        for g, units in enumerate(scores)
        for unit, score in enumerate(units.tolist())
    )
    gone = [0] * len(groups)
    for _, _, g in ranked[: math.floor(ratio * len(ranked))]:
        gone[g] += 1
    kept = {}
    for g, group in enumerate(groups):
        step = group.rounding(round_to)
        stay = max(step, math.ceil((group.width - gone[g]) / step) * step)
        if stay < group.width:
            kept[g] = stay
    return kept


def choose_by_quantile(pruner: Pruner, accept: Callable[[Plan], bool], round_to: int) -> Plan:
    """The largest ratio, by bisection of steps of 5 %, that is accepted."""
    plans = [kept_by_quantile(pruner.groups, pruner.scores, ratio, round_to) for ratio in reversed(_RATIOS)]
    good = bisect_count(len(plans), lambda count: accept(plans[count - 1]))
    return plans[good - 1] if good else {}


def bisect_count(count: int, accept: Callable[[int], bool], low: int = 0) -> int:
    """The largest number up to ``count`` that is accepted, if those below an accepted one are, as ``low`` is."""
    high = count
    while low < high:
        middle = (low + high + 1) // 2
        if accept(middle):
            low = middle
        else:
            high = middle - 1
    return low


@torch.no_grad()
def prune_ratio(model: nn.Module, groups: list[ChannelGroup], ratio: float, round_to: int = 8) -> nn.Module:
    """A copy of the model pruned by the seed's rule at this ratio, whatever that does to its metric."""
    pruner = Pruner.with_scores(model, groups, "quantile")
    return pruner.build(kept_by_quantile(groups, pruner.scores, ratio, round_to))
