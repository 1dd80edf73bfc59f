"""The plots of the report, as SVG text that stands in the page itself."""

import io
import re

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

COLOURS = {"dense": "#64748b", "sluice": "#0f766e", "window": "#c2791b"}
_PART_COLOURS = ("#0f766e", "#64748b", "#c2791b", "#cbd5e1")
_STYLE = {
    "svg.fonttype": "none",  # text stays text: sharp, selectable, small
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#334155",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e2e8f0",
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "legend.frameon": False,
}


def draw_plots(result: dict) -> dict[str, str]:
    """Name -> SVG element: loss by step and by time, density, step time, where time went."""
    sides = {name: result[name] for name in COLOURS if name in result}
    with matplotlib.rc_context(_STYLE):
        return {
            "loss_by_step": _draw_loss(sides, result, by_time=False),
            "loss_by_time": _draw_loss(sides, result, by_time=True),
            "density": _draw_density(sides, result),
            "step_time": _draw_step_time(sides, result),
            "time_by_part": _draw_time_by_part(sides),
        }


def _cumulative(values: list[float]) -> list[float]:
    total, sums = 0.0, []
    for value in values:
        total += value
        sums.append(total)
    return sums


def _draw_loss(sides: dict, result: dict, by_time: bool) -> str:
    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    for name, side in sides.items():
        history, colour = side["history"], COLOURS[name]
        steps = list(range(1, len(history["loss"]) + 1))
        positions = _cumulative(history["seconds"]) if by_time else steps
        axes.plot(positions, history["loss"], color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(positions, history["smoothed_loss"], color=colour, linewidth=1.8, label=side["title"])
        held_out = [positions[step - 1] for step in history["evaluated_steps"]]
        axes.plot(held_out, history["heldout_loss"], "o", color=colour, markersize=4, markerfacecolor="white")
    axes.axhline(result["target_loss"], color="#94a3b8", linewidth=1, linestyle=":")
    axes.annotate(
        "target", (0, result["target_loss"]), xytext=(2, 2), textcoords="offset points", color="#64748b", fontsize=8
    )
    axes.set_xlabel("seconds of training" if by_time else "step")
    axes.set_ylabel("loss, nats a byte")
    axes.set_xlim(left=0)
    axes.legend()
    return _to_svg(figure)


def _draw_density(sides: dict, result: dict) -> str:
    figure, axes = pyplot.subplots(figsize=(6, 2.8))
    for name, side in sides.items():
        densities = side["history"]["density"]
        axes.plot(range(1, len(densities) + 1), densities, color=COLOURS[name], linewidth=1.8, label=side["title"])
    target = result["settings"]["target_density"]
    axes.axhline(target, color="#94a3b8", linewidth=1, linestyle=":")
    axes.annotate("target", (0, target), xytext=(2, 2), textcoords="offset points", color="#64748b", fontsize=8)
    axes.set(xlabel="step", ylabel="share of pairs kept", ylim=(0, 1.05))
    axes.set_xlim(left=0)
    axes.legend()
    return _to_svg(figure)


def _draw_step_time(sides: dict, result: dict) -> str:
    figure, axes = pyplot.subplots(figsize=(6, 2.8))
    top = 0.0
    for name, side in sides.items():
        seconds = side["history"]["seconds"]
        steps = range(1, len(seconds) + 1)
        axes.plot(steps, seconds, ".", color=COLOURS[name], markersize=2.5, alpha=0.6, label=side["title"])
        axes.hlines(
            side["seconds_per_step"], result["timed_from_step"], len(seconds), color=COLOURS[name], linewidth=1.6
        )
        top = max(top, sorted(seconds)[int(0.98 * (len(seconds) - 1))])
    axes.set(xlabel="step", ylabel="seconds a step", ylim=(0, 1.15 * top))
    axes.set_xlim(left=0)
    axes.legend(markerscale=3)
    return _to_svg(figure)


def _draw_time_by_part(sides: dict) -> str:
    sides = {name: side for name, side in sides.items() if side["time_by_part"]}
    if not sides:
        return ""
    figure, axes = pyplot.subplots(figsize=(12.2, 0.9 + 0.5 * len(sides)))
    for row, side in enumerate(reversed(sides.values())):
        left = 0.0
        for (part, share), colour in zip(side["time_by_part"].items(), _PART_COLOURS, strict=True):
            seconds = share * side["seconds_per_step"]
            axes.barh(row, seconds, left=left, color=colour, height=0.62, label=part if row == 0 else None)
            if share > 0.06:
                text_colour = "#334155" if colour == _PART_COLOURS[-1] else "white"
                axes.text(
                    left + seconds / 2, row, f"{seconds:.2f} s", ha="center", va="center", color=text_colour, fontsize=9
                )
            left += seconds
    axes.set_yticks(range(len(sides)), [side["title"] for side in reversed(sides.values())])
    axes.set_xlabel("seconds a step, once the gate has closed")
    axes.grid(axis="y", visible=False)
    axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))
    return _to_svg(figure)


def _to_svg(figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]
    # The page decides the size; the view box keeps the proportions.
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
