"""Which channels go: by measured sensitivity against predicted latency (the default), or by the seed's quantile."""

import bisect
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_sluice.compress.compensation import Moments, compensate
from torch_sluice.compress.graph import ChannelGroup, lowest
from torch_sluice.compress.importance import raw_norms, relative_norms
from torch_sluice.compress.latency import measure_layers
from torch_sluice.compress.measure import Measure
from torch_sluice.compress.progress import Progress
from torch_sluice.compress.slicing import Lost, cut, gather, prune, size_of

_FRACTIONS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)  # shares of a group that are tried
_RATIOS = tuple(i / 20 for i in range(19, 0, -1))  # of the quantile policy
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass
class Pruner:
    """A model, its groups and their units in the order in which they go."""

    model: nn.Module
    groups: list[ChannelGroup]
    scores: list[Tensor]
    moments: Moments | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # of each layer in a call

    @classmethod
    def with_scores(cls, model: nn.Module, groups: list[ChannelGroup], policy: str) -> "Pruner":
        score = raw_norms if policy == "quantile" else relative_norms
        return cls(model, groups, [score(model, group) for group in groups])

    def removals(self, kept: dict[int, int]) -> list[tuple[ChannelGroup, list[int]]]:
        """kept: group number -> units that stay."""
        return [(self.groups[g], lowest(self.scores[g], self.groups[g].width - k)) for g, k in sorted(kept.items())]

    def lost(self, kept: dict[int, int]) -> Lost:
        lost: Lost = {}
        for group, units in self.removals(kept):
            gather(group.members, units, lost)
        return lost

    def build(self, kept: dict[int, int]) -> nn.Module:
        """A pruned copy, compensated where moments are known."""
        pruned = prune(self.model, self.removals(kept))
        if self.moments is not None:
            compensate(pruned, self.model, self.lost(kept), self.moments)
        return pruned

    def build_further(self, module: nn.Module, before: dict[int, int], kept: dict[int, int]) -> nn.Module:
        """A copy of ``module``, which is this model pruned to ``before`` and trained since, pruned to ``kept``."""
        gone = {side: sorted(indices) for side, indices in self.lost(before).items()}
        lost = {
            side: {i - bisect.bisect(gone.get(side, []), i) for i in indices.difference(gone.get(side, []))}
            for side, indices in self.lost(kept).items()
        }
        further = copy.deepcopy(module)
        sizes = [
            (member, self.groups[g].width - k - (self.groups[g].width - before.get(g, self.groups[g].width)))
            for g, k in kept.items()
            for member in self.groups[g].sizes
        ]
        cut(further, lost, sizes)
        return further

    def time_layers(self, example_inputs: Any) -> None:
        self.seconds = measure_layers(self.model, example_inputs, _LAYERS)

    def predict_seconds(self, kept: dict[int, int]) -> float:
        """Seconds of all layers: a layer takes the share of its measured time that the product of the shares of inputs
        and outputs tells which it keeps."""
        shares: dict[str, float] = {}
        for (name, dim), indices in self.lost(kept).items():
            path, _, leaf = name.rpartition(".")
            if path in self.seconds and leaf == "weight":
                share = 1 - len(indices) / size_of(self.model, (name, dim))
                shares[path] = shares.get(path, 1.0) * share
        return sum(seconds * shares.get(path, 1.0) for path, seconds in self.seconds.items())


def kept_by_quantile(groups: list[ChannelGroup], scores: list[Tensor], ratio: float, round_to: int) -> dict[int, int]:
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


def choose_by_quantile(pruner: Pruner, accept: Callable[[dict[int, int]], bool], round_to: int) -> dict[int, int]:
    """The largest ratio, by bisection of steps of 5 %, that is accepted."""
    plans = [kept_by_quantile(pruner.groups, pruner.scores, ratio, round_to) for ratio in reversed(_RATIOS)]
    good = _bisect(len(plans), lambda count: accept(plans[count - 1]))
    return plans[good - 1] if good else {}


def _bisect(count: int, accept: Callable[[int], bool]) -> int:
    """The largest number up to ``count`` that is accepted, if those below an accepted one are; 0 without a test."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        if accept(middle):
            low = middle
        else:
            high = middle - 1
    return low


@dataclass
class Sensitivity:
    """What a group costs (``Measure.loss``) at each number of kept units, descending, down to where it is too much."""

    group: int
    kept: list[int]
    losses: list[float]


def measure_sensitivity(
    pruner: Pruner, measure: Measure, most: float, round_to: int, progress: Progress
) -> list[Sensitivity]:
    """Prunes each group alone, further and further, until it costs more than ``most``."""
    curves = []
    progress.start("sensitivity of", len(pruner.groups))
    for g, group in enumerate(pruner.groups):
        progress.step(group.name)
        curve = Sensitivity(g, [], [])
        for kept in group.kept_choices(_FRACTIONS, round_to):
            loss = measure.loss(pruner.build({g: kept}))
            if loss > most:
                break
            curve.kept.append(kept)
            curve.losses.append(loss)
        curves.append(curve)
    return curves


def order_moves(pruner: Pruner, curves: list[Sensitivity]) -> list[dict[int, int]]:
    """Plans of growing size: each adds the step of a group that wins most predicted latency for what it costs."""
    place = [0] * len(curves)  # steps taken of each curve
    kept: dict[int, int] = {}
    plans = []
    now = pruner.predict_seconds(kept)
    while True:
        best = None
        for i, curve in enumerate(curves):
            if place[i] == len(curve.kept):
                continue
            saved = now - pruner.predict_seconds({**kept, curve.group: curve.kept[place[i]]})
            before = curve.losses[place[i] - 1] if place[i] else 0.0
            cost = max(curve.losses[place[i]] - before, 1e-6)
            if saved > 0 and (best is None or saved / cost > best[0]):
                best = (saved / cost, i)
        if best is None:
            return plans
        i = best[1]
        kept = {**kept, curves[i].group: curves[i].kept[place[i]]}
        place[i] += 1
        now = pruner.predict_seconds(kept)
        plans.append(kept)


def choose_by_sensitivity(
    pruner: Pruner,
    curves: list[Sensitivity],
    accept: Callable[[dict[int, int]], bool],
    stop: Callable[[dict[int, int]], bool],
    progress: Progress,
) -> dict[int, int]:
    """The longest accepted prefix of the greedy order, found by bisection.

    ``stop(kept)``: whether the budget is met, so that nothing more need be pruned.
    """
    plans = order_moves(pruner, curves)
    enough = next((i + 1 for i, plan in enumerate(plans) if stop(plan)), len(plans))
    progress.start("pruning", None)
    good = _bisect(enough, lambda count: accept(plans[count - 1]))
    return plans[good - 1] if good else {}


@torch.no_grad()
def prune_ratio(model: nn.Module, groups: list[ChannelGroup], ratio: float, round_to: int = 8) -> nn.Module:
    """A copy of the model pruned by the seed's rule at this ratio, whatever that does to its metric."""
    pruner = Pruner.with_scores(model, groups, "quantile")
    return pruner.build(kept_by_quantile(groups, pruner.scores, ratio, round_to))
