"""The plots of the report on a training comparison, as SVG text that stands in the page itself."""

import statistics

import matplotlib

from torch_sluice.report.figure import STYLE, new_axes, to_svg

COLOURS = {"dense": "#64748b", "sluice": "#0f766e", "window": "#c2791b"}


def draw_plots(result: dict) -> dict[str, str]:
    """Name -> SVG element: loss by step and by time, density, step time."""
    sides = {name: result[name] for name in COLOURS if name in result}
    with matplotlib.rc_context(STYLE):
        return {
            "loss_by_step": _draw_loss(sides, result, by_time=False),
            "loss_by_time": _draw_loss(sides, result, by_time=True),
            "density": _draw_density(sides, result),
            "step_time": _draw_step_time(sides, result),
        }


def _cumulative(values: list[float]) -> list[float]:
    total, sums = 0.0, []
    for value in values:
        total += value
        sums.append(total)
    return sums


def _draw_loss(sides: dict, result: dict, by_time: bool) -> str:
    figure, axes = new_axes(4.6, 3.0)
    for name, side in sides.items():
        history, colour = side["history"], COLOURS[name]
        steps = list(range(1, len(history["loss"]) + 1))
        positions = _cumulative(history["seconds"]) if by_time else steps
        axes.plot(positions, history["loss"], color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(positions, history["smoothed_loss"], color=colour, linewidth=1.8, label=side["title"])
        held_out = [positions[step - 1] for step in history["evaluated_steps"]]
        axes.plot(held_out, history["heldout_loss"], "o", color=colour, markersize=4, markerfacecolor="#ffffff")
    axes.axhline(result["target_loss"], color="#94a3b8", linewidth=1, linestyle=":")
    axes.annotate(
        "target", (0, result["target_loss"]), xytext=(2, 2), textcoords="offset points", color="#475569", fontsize=8
    )
    axes.set_xlabel("seconds of training" if by_time else "step")
    axes.set_ylabel("loss, nats a byte")
    axes.set_xlim(left=0)
    axes.legend()
    return to_svg(figure)


def _draw_density(sides: dict, result: dict) -> str:
    figure, axes = new_axes(4.6, 2.4)
    for name, side in sides.items():
        densities = side["history"]["density"]
        axes.plot(range(1, len(densities) + 1), densities, color=COLOURS[name], linewidth=1.8, label=side["title"])
    target = result["settings"]["target_density"]
    axes.axhline(target, color="#94a3b8", linewidth=1, linestyle=":")
    axes.annotate("target", (0, target), xytext=(2, 2), textcoords="offset points", color="#475569", fontsize=8)
    axes.set(xlabel="step", ylabel="share of pairs kept", ylim=(0, 1.05))
    axes.set_xlim(left=0)
    axes.legend()
    return to_svg(figure)


def step_time_limit(seconds: list[float]) -> float:
    """What the axis of step times must reach: the slowest stretch of the run, and not the slowest step.

    A stretch is an eighth of the run, five steps at least; one that is more than four times as slow as the run's median
    is the machine's and not the side's.
    """
    length = max(5, len(seconds) // 8)
    stretches = [statistics.median(seconds[start : start + length]) for start in range(0, len(seconds), length)]
    return min(max(stretches), 4 * statistics.median(seconds))


def _draw_step_time(sides: dict, result: dict) -> str:
    figure, axes = new_axes(4.6, 2.4)
    top = 1.4 * max(step_time_limit(side["history"]["seconds"]) for side in sides.values())
    beyond = []
    for number, (name, side) in enumerate(sides.items()):
        seconds, colour = side["history"]["seconds"], COLOURS[name]
        steps = range(1, len(seconds) + 1)
        axes.plot(steps, seconds, ".", color=colour, markersize=2.5, alpha=0.6, label=side["title"])
        axes.hlines(side["seconds_per_step"], result["timed_from_step"] + 1, len(seconds), color=colour, linewidth=1.6)
        slow = [(step, time) for step, time in zip(steps, seconds, strict=True) if time > top]
        axes.plot(
            [step for step, _ in slow], [(0.97 - 0.06 * number) * top] * len(slow), "^", color=colour, markersize=4
        )
        beyond += [time for _, time in slow]
    if beyond:
        text = (
            f"{len(beyond)} {'step' if len(beyond) == 1 else 'steps'} above the axis, the longest {max(beyond):.3g} s"
        )
        axes.set_title(text, fontsize=8, color="#475569", loc="right")
    axes.set(xlabel="step", ylabel="seconds a step", ylim=(0, top))
    axes.set_xlim(left=0)
    axes.legend(markerscale=3)
    return to_svg(figure)
