"""Draws a simulated step as SVG: a lane for each rank, from left to right in time.

The element can be put into an HTML page as it is, whose variables of style.css decide the colours; in a file of its own
it is light. Its text is as small as its lanes are.
"""

from html import escape
from itertools import pairwise

import numpy as np

from torch_sluice.plan import simulation as simulated
from torch_sluice.plan.simulation import Simulation

# Kind of work -> word in the legend, and colour: the page's, or else the light one.
_LOOKS = {
    simulated.FORWARD: ("forward", "var(--part-1, #1d4ed8)"),
    simulated.BACKWARD: ("backward", "var(--window, #b45309)"),
    simulated.BACKWARD_INPUT: ("backward to the input", "var(--window, #b45309)"),
    simulated.BACKWARD_WEIGHT: ("backward to the weights", "var(--sluice, #0f766e)"),
    simulated.REDUCE: ("data-parallel reduction", "var(--plot-edge, #94a3b8)"),
}
_INK = "var(--plot-ink, #475569)"
_LINE = "var(--line, #e2e8f0)"
_ON_BAR = "var(--on-bar, #fff)"
_LEFT, _TOP, _BOTTOM = 62, 30, 24  # room for the ranks, the legend and the axis
_DIGIT = 6.2  # width of a digit at 10 px


def draw_pipeline(
    simulation: Simulation, *, width: int = 1000, begin_s: float = 0.0, end_s: float | None = None, title: str = ""
) -> str:
    """An SVG element.

    Args:
        simulation: of ``simulate(..., events=True)``.
        width: in pixels of the view box; the element is as wide as its place.
        begin_s, end_s: the part of the step that is drawn; default: all of it.
        title: for screen readers and as a tooltip; default: the schedule and its size.

    Later stages of a rank are paler. Boxes that are wide enough hold the micro-batch's number. Where a lane has more
    boxes than pixels, it is divided into columns, whose heights show the share of time that each kind of work takes.

    Raises:
        ValueError: if the simulation has no events, or begin_s and end_s do not bound a part of it.
    """
    if not len(simulation.events):
        raise ValueError("simulation has 0 events, expected those of simulate(..., events=True)")
    end_s = simulation.makespan_s if end_s is None else end_s
    if not 0 <= begin_s <= end_s <= simulation.makespan_s or (begin_s == end_s and simulation.makespan_s > 0):
        raise ValueError(
            f"begin_s is {begin_s} and end_s is {end_s}, expected a part of the step's {simulation.makespan_s} s"
        )
    if width <= _LEFT + 100:
        raise ValueError(f"width is {width}, expected more than {_LEFT + 100} pixels")
    return _Picture(simulation, width, begin_s, end_s).draw(title)


class _Picture:
    def __init__(self, simulation, width, begin_s, end_s):
        self.simulation, self.width, self.begin, self.end = simulation, width, begin_s, end_s
        self.ranks = len(simulation.ranks)
        self.has_reductions = bool((simulation.events["kind"] == simulated.REDUCE).any())
        self.bar = 22 if self.ranks <= 16 else 12
        self.thin = 5 if self.has_reductions else 0  # the reductions' own strip
        self.pitch = self.bar + self.thin + (6 if self.ranks <= 16 else 3)
        self.height = _TOP + self.ranks * self.pitch + _BOTTOM
        self.scale = (width - _LEFT - 8) / (end_s - begin_s) if end_s > begin_s else 0

    def x(self, time):
        return _LEFT + (time - self.begin) * self.scale

    def draw(self, title):
        drawn = self.simulation
        stages = "" if drawn.stages_per_rank == 1 else f", {drawn.stages_per_rank} stages a rank"
        title = title or f"{drawn.schedule}: {self.ranks} ranks{stages}, {drawn.micro_batches} micro-batches"
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'font-family="Helvetica, Arial, sans-serif" font-size="11"><title>{escape(title)}</title>',
            *self._legend(),
            *self._axis(),
        ]
        inside = (drawn.events["end_s"] > self.begin) & (drawn.events["begin_s"] < self.end)
        events = drawn.events[inside]
        for rank in range(self.ranks):
            top = _TOP + rank * self.pitch
            parts.append(f'<text x="{_LEFT - 8}" y="{top + self.bar / 2 + 4:g}" text-anchor="end" fill="{_INK}">')
            parts.append(f"rank {rank}</text>")
            lane = events[events["rank"] == rank]
            work = lane[lane["kind"] <= simulated.BACKWARD_WEIGHT]
            parts += self._columns(work, top) if len(work) > self.width else self._boxes(work, top)
            reductions = lane[lane["kind"] == simulated.REDUCE]
            parts += self._paths(reductions, top + self.bar + 1, self.thin)
        return "".join([*parts, "</svg>"])

    def _legend(self):
        x, kinds = _LEFT, set(np.unique(self.simulation.events["kind"]).tolist())
        for kind, (word, colour) in _LOOKS.items():
            if kind in kinds:
                yield f'<rect x="{x}" y="6" width="10" height="10" rx="2" fill="{colour}"/>'
                yield f'<text x="{x + 15}" y="15" fill="{_INK}">{word}</text>'
                x += 32 + round(len(word) * 5.3)

    def _axis(self):
        bottom = self.height - _BOTTOM
        for time in _ticks(self.begin, self.end):
            x = self.x(time)
            anchor = "middle" if x < self.width - 20 else "end"
            yield f'<path d="M{x:.1f} {_TOP - 4}V{bottom}" stroke="{_LINE}"/>'
            yield f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="{anchor}" fill="{_INK}">{_duration(time)}</text>'

    def _boxes(self, work, top):
        yield from self._paths(work, top, self.bar)
        if self.bar < 16:
            return
        numbers = []
        for event in work.tolist():
            left, right = self._clip(event[4], event[5])
            if right - left >= len(str(event[3])) * _DIGIT + 3:
                numbers.append(f'<text x="{(left + right) / 2:.1f}" y="{top + self.bar / 2 + 3.5:g}">{event[3]}</text>')
        if numbers:
            # As a style, since pages give the text of their pictures a colour by rule.
            yield f'<g text-anchor="middle" font-size="10" style="--plot-ink: {_ON_BAR}" fill="{_ON_BAR}">'
            yield "".join(numbers) + "</g>"

    def _paths(self, events, top, height):
        """One path for all boxes of a kind and chunk: a page holds thousands of them."""
        paths = {}
        for kind, _, stage, _, begin, end in events.tolist():
            left, right = self._clip(begin, end)
            gap = 0.6 if right - left > 2 else 0
            path = paths.setdefault((kind, self.simulation.chunk_of(stage)), [])
            path.append(f"M{left:.2f} {top:g}h{right - left - gap:.2f}v{height}H{left:.2f}z")
        for (kind, chunk), boxes in sorted(paths.items()):
            paler = f' fill-opacity="{self._opacity(chunk):.2f}"' if chunk else ""
            yield f'<path fill="{_LOOKS[kind][1]}"{paler} d="{"".join(boxes)}"/>'

    def _columns(self, work, top):
        # A column has about 16 boxes, so that where it begins between them hardly shows.
        count = max(1, min((self.width - _LEFT - 8) // 4, len(work) // 16))
        edges = np.linspace(self.begin, self.end, count + 1)
        columns = [self.x(edge) for edge in edges.tolist()]
        below = np.zeros(count)  # twice the height of the kinds so far
        for kind in np.unique(work["kind"]).tolist():
            share = _covered(work[work["kind"] == kind], edges) / np.diff(edges)
            above = below + np.round(share * self.bar * 2)
            changes = np.flatnonzero(np.diff(below) + 1j * np.diff(above)) + 1
            boxes = []
            for first, last in pairwise([0, *changes.tolist(), count]):
                height = (above[first] - below[first]) / 2
                if height > 0:
                    y, size = top + self.bar - above[first] / 2, columns[last] - columns[first]
                    boxes.append(f"M{columns[first]:.2f} {y:g}h{size:.2f}v{height:g}h-{size:.2f}z")
            yield f'<path fill="{_LOOKS[kind][1]}" d="{"".join(boxes)}"/>'
            below = above

    def _clip(self, begin, end):
        return self.x(max(begin, self.begin)), self.x(min(end, self.end))

    def _opacity(self, chunk):
        return 1 - 0.4 * chunk / max(1, self.simulation.stages_per_rank - 1)


def _covered(events, edges):
    """How much of each interval between neighbouring edges the events, which do not overlap, cover."""
    order = np.argsort(events["begin_s"], kind="stable")
    begin, end = events["begin_s"][order], events["end_s"][order]
    times = np.stack([begin, end], 1).ravel()
    amount = np.concatenate([[0], np.cumsum(np.stack([end - begin, np.zeros_like(end)], 1).ravel())[:-1]])
    return np.diff(np.interp(edges, times, amount, left=0, right=float((end - begin).sum())))


def _ticks(begin, end):
    """About eight round times."""
    if end <= begin:
        return [begin]
    raw = (end - begin) / 8
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return [number * step for number in range(int(np.ceil(begin / step - 1e-9)), int(end / step + 1e-9) + 1)]


def _duration(seconds):
    for factor, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= factor * 0.999:
            return f"{seconds / factor:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns" if seconds else "0"
