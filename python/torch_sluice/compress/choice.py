"""Which of the layers that are better quantised are, as far as the metric allows, and with how fine activations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from torch_sluice.compress.estimate import Score
from torch_sluice.compress.progress import Progress
from torch_sluice.compress.quantization import Candidate
from torch_sluice.compress.report import LayerDecision
from torch_sluice.compress.search import find_longest

_SETS = 32  # of candidates, that are measured together
_COSTLY = 2.0  # times what a set costs on average, above which its halves are measured
_BYTES_WORTH = 0.1  # what all the bytes that quantising wins count for, all the time counting 1


@dataclass
class Choice:
    """What is quantised, what of it with finer activations, why others stay, and what the model then keeps."""

    chosen: list[Candidate] = field(default_factory=list)
    finer: list[Candidate] = field(default_factory=list)
    stay: list[LayerDecision] = field(default_factory=list)
    score: Score | None = None  # None where nothing is chosen


def choose_layers(
    candidates: list[Candidate],
    score: Callable[[Sequence[Candidate], Sequence[Candidate]], Score],
    loss: Callable[[list[Candidate]], tuple[float, str | None]],
    floor: float,
    progress: Progress,
    find_finer: Callable[[list[Candidate]], list[Candidate]] = lambda candidates: [],
) -> Choice:
    """As many of the candidates as leave ``floor`` of the metric at least. If all together cost too much, each is
    measured, alone or where there are many with its neighbours. Those that cost most for what they win, in time and a
    little in bytes, take finer activations, as few as will do; where that does not help, or would be slower than
    floating point, they stay in it, as those do with which the model fails.

    Args:
        score: what the model keeps with the first quantised, the second of them with finer activations.
        loss: how far outputs move with these quantised, and why it fails; as ``Measure.loss``.
        find_finer: those of these that are still faster with finer activations.
    """
    progress.start("quantising", None)
    progress.step("all layers")
    if not candidates:
        return Choice()
    everything = score(candidates, ())
    if everything.low >= floor:
        return Choice(candidates, score=everything)
    costs, shared, stay = _measure_costs(candidates, loss, progress)
    time = sum(max(c.before - c.after, 0.0) for c in candidates) or 1.0
    size = sum(c.bytes for c in candidates) or 1
    worth = {c.name: max(c.before - c.after, 0.0) / time + _BYTES_WORTH * c.bytes / size for c in candidates}
    order = [c for c in candidates if c.name in costs]
    order.sort(key=lambda c: -worth[c.name] / costs[c.name])
    able = {c.name for c in find_finer(order)}
    choice = Choice(stay=stay)
    if not order:
        return choice

    def longest(
        steps: list[Candidate],
        chosen: Callable[[int], tuple[list[Candidate], list[Candidate]]],
        none: Score,
        whole: Score,
    ) -> int:
        """How many steps keep the floor; what belongs to the longest that does becomes the choice. ``none``,
        ``whole``: what none of them keeps, and all of them together do not."""
        progress.start("quantising", max(1, len(steps)).bit_length())

        def measure(number: int) -> float:
            progress.step(f"{number} layers")
            some, finer = chosen(number)
            found = score(some, finer)
            if found.low >= floor:
                choice.chosen, choice.finer, choice.score = some, finer, found
            return found.low

        ways = [list(accumulate((of[c.name] for c in steps), initial=0.0)) for of in (costs, worth)]
        return find_longest(measure, floor, *ways, (0, none.low), (len(steps), whole.low))

    def finer_beyond(number: int) -> tuple[list[Candidate], list[Candidate]]:
        finer = [c for c in order[number:] if c.name in able]
        return order[:number] + finer, finer

    original, finest = Score(1.0, 1.0), score(*finer_beyond(0)) if able else None
    if len(order) < len(candidates):  # what all of these cost is not known
        everything = score(order, ())
        if everything.low >= floor:
            return Choice(order, stay=stay, score=everything)
    if finest is not None and finest.low >= floor:
        choice.chosen, choice.finer = finer_beyond(0)
        choice.score = finest
        longest(order, finer_beyond, finest, everything)
    else:
        number = longest(order, lambda number: (order[:number], []), original, everything)
        _, rest = finer_beyond(number)
        beyond = score(order[:number] + rest, rest) if rest else None
        if beyond is not None and beyond.low >= floor:
            choice.chosen, choice.finer, choice.score = order[:number] + rest, rest, beyond
        elif beyond is not None:
            longest(rest, lambda more: (order[:number] + rest[:more], rest[:more]), choice.score or original, beyond)
    chosen = {c.name for c in choice.chosen}
    for c in order:
        if c.name not in chosen:
            beside = f"with {shared[c.name] - 1} others" if shared[c.name] > 1 else "alone"
            moved = costs[c.name] * shared[c.name]
            stay.append(_stays(c, f"quantised {beside} it moves the outputs by {moved:.2%}", costs[c.name]))
    return choice


def _measure_costs(
    candidates: list[Candidate], loss: Callable[[list[Candidate]], tuple[float, str | None]], progress: Progress
) -> tuple[dict[str, float], dict[str, int], list[LayerDecision]]:
    """What each candidate costs, by name; with how many others it shares that; and those with which the model fails.

    Candidates are measured in up to ``_SETS`` sets of neighbours. A set that costs much, or fails, is halved until its
    costs are known one by one; in another each costs the same.
    """
    each = -(-len(candidates) // _SETS)
    sets = [candidates[i : i + each] for i in range(0, len(candidates), each)]
    costs: dict[str, float] = {}
    shared: dict[str, int] = {}
    stay: list[LayerDecision] = []
    start, _ = loss([])
    progress.start("quantising", len(sets))

    def measure(some: list[Candidate]) -> tuple[list[Candidate], float, str | None]:
        progress.step(some[0].name)
        cost, reason = loss(some)
        return some, cost - start, reason

    work = [measure(some) for some in sets]
    known = [cost for _, cost, _ in work if math.isfinite(cost)]
    most = _COSTLY * sum(max(cost, 0.0) for cost in known) / max(1, len(known))
    while work:
        some, cost, reason = work.pop()
        if len(some) > 1 and not cost <= most:
            work += [measure(some[: len(some) // 2]), measure(some[len(some) // 2 :])]
        elif math.isfinite(cost):
            costs.update((c.name, max(cost / len(some), 1e-7)) for c in some)
            shared.update((c.name, len(some)) for c in some)
        else:
            stay.append(_stays(some[0], f"the model fails with it quantised: {reason}", None))
    return costs, shared, stay


def _stays(candidate: Candidate, reason: str, cost: float | None) -> LayerDecision:
    return LayerDecision(candidate.name, "float", reason, None, None, candidate.before - candidate.after, cost)
