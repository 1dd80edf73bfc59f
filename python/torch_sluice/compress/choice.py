"""Which of the layers that are better quantised are, as far as the metric allows."""

import math
from collections.abc import Callable

from torch_sluice.compress.estimate import Score
from torch_sluice.compress.progress import Progress
from torch_sluice.compress.quantization import Candidate
from torch_sluice.compress.report import LayerDecision

_BYTES_WORTH = 0.1  # what all the bytes that quantising wins count for, all the time counting 1


def choose_layers(
    candidates: list[Candidate],
    score: Callable[[list[Candidate]], Score],
    loss: Callable[[list[Candidate]], tuple[float, str | None]],
    floor: float,
    progress: Progress,
) -> tuple[list[Candidate], list[LayerDecision], Score | None]:
    """As many of the candidates as leave ``floor`` of the metric at least. If all together cost too much, each is
    measured alone, and those that fail, or cost most for what they win, in time and a little in bytes, stay in floating
    point. The score is that of the choice; None where nothing is chosen.

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
    start, _ = loss([])
    costs: dict[str, float] = {}
    stay: list[LayerDecision] = []
    progress.start("quantising", len(candidates))
    for candidate in candidates:
        progress.step(candidate.name)
        cost, reason = loss([candidate])
        if math.isfinite(cost):
            costs[candidate.name] = max(cost - start, 1e-7)
        else:
            stay.append(_stays(candidate, f"the model fails with it quantised: {reason}", None))
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
        stay.append(_stays(c, f"quantised alone it moves the outputs by {costs[c.name]:.2%}", costs[c.name]))
    return order[:low], stay, best


def _stays(candidate: Candidate, reason: str, cost: float | None) -> LayerDecision:
    return LayerDecision(candidate.name, "float", reason, None, None, candidate.before - candidate.after, cost)
