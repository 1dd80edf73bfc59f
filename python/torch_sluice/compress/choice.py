"""Which of the layers that are better quantised are, as far as the metric allows."""

import math
from collections.abc import Callable

from torch_sluice.compress.estimate import Score
from torch_sluice.compress.progress import Progress
from torch_sluice.compress.quantization import Candidate
from torch_sluice.compress.report import LayerDecision

_SETS = 32  # of candidates, that are measured together
_COSTLY = 2.0  # times what a set costs on average, above which its halves are measured
_BYTES_WORTH = 0.1  # what all the bytes that quantising wins count for, all the time counting 1


def choose_layers(
    candidates: list[Candidate],
    score: Callable[[list[Candidate]], Score],
    loss: Callable[[list[Candidate]], tuple[float, str | None]],
    floor: float,
    progress: Progress,
) -> tuple[list[Candidate], list[LayerDecision], Score | None]:
    """As many of the candidates as leave ``floor`` of the metric at least. If all together cost too much, each is
    measured, alone or where there are many with its neighbours, and those that fail, or cost most for what they win, in
    time and a little in bytes, stay in floating point. The score is that of the choice; None where nothing is chosen.

    Args:
        score: what the model keeps with these quantised.
        loss: how far outputs move with these quantised, and why it fails; as ``Measure.loss``.
    """
    progress.start("quantising", None)
    progress.step("all layers")
    if not candidates:
        return [], [], None
    everything = score(candidates)
    if everything.low >= floor:
        return candidates, [], everything
    costs, shared, stay = _measure_costs(candidates, loss, progress)
    time = sum(c.before - c.after for c in candidates) or 1.0
    size = sum(c.bytes for c in candidates) or 1
    worth = {c.name: (c.before - c.after) / time + _BYTES_WORTH * c.bytes / size for c in candidates}
    order = [c for c in candidates if c.name in costs]
    order.sort(key=lambda c: -worth[c.name] / costs[c.name])
    low, high, best = 0, len(order) - (len(order) == len(candidates)), None  # the longest prefix that keeps the floor
    progress.start("quantising", max(1, high).bit_length())
    while low < high:
        middle = (low + high + 1) // 2
        progress.step(f"{middle} layers")
        found = score(order[:middle])
        if found.low >= floor:
            low, best = middle, found
        else:
            high = middle - 1
    for c in order[low:]:
        beside = f"with {shared[c.name] - 1} others" if shared[c.name] > 1 else "alone"
        moved = costs[c.name] * shared[c.name]
        stay.append(_stays(c, f"quantised {beside} it moves the outputs by {moved:.2%}", costs[c.name]))
    return order[:low], stay, best


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
