"""The comparison as rows of text, shared by the table on the terminal and the one in the HTML report."""

from collections.abc import Callable

_MISSING = "not measured"


def _or_missing(form: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: _MISSING if value is None else form(value)


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:.1f} MiB"


def show_seconds(value: float) -> str:
    """Whole seconds from 100 on, three digits below: runs that differ by less look alike otherwise."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def timed_steps(result: dict) -> str:
    """The steps that step times are medians of, numbered from 1 as in the plots: "steps 118 to 200"."""
    first, last = result["timed_from_step"] + 1, result["settings"]["steps"]
    return f"step {last}" if first == last else f"steps {first} to {last}"


def _label(text: str) -> Callable[[dict], str]:
    return lambda result: text


# (label of a result, key of a side's figures, how it is shown, the better direction: +1 more, -1 less, 0 neither)
ROWS = (
    (_label("held-out next-byte accuracy"), "heldout_accuracy", lambda x: f"{100 * x:.2f} %", +1),
    (_label("held-out loss, nats a byte"), "heldout_loss", lambda x: f"{x:.4f}", -1),
    (_label("pairs kept on held-out text"), "density", lambda x: f"{100 * x:.1f} %", 0),
    (lambda r: f"seconds a step, {timed_steps(r)} (median)", "seconds_per_step", lambda x: f"{x:.3f}", -1),
    (_label("seconds a step, whole run (median)"), "seconds_per_step_whole_run", lambda x: f"{x:.3f}", -1),
    (_label("seconds of training, whole run"), "seconds_total", show_seconds, -1),
    (_label("steps to the target loss"), "steps_to_target", lambda x: f"{x}", -1),
    (_label("seconds to the target loss"), "seconds_to_target", show_seconds, -1),
    (_label("gradients held in 16 bits"), "half_share", lambda x: f"{100 * x:.0f} %", 0),
    (lambda r: f"GFLOP a step, {timed_steps(r)}", "flops_per_step", lambda x: f"{x / 1e9:.3g}", -1),
    (lambda r: f"MFU (of the peak measured here), {timed_steps(r)}", "mfu", lambda x: f"{100 * x:.1f} %", +1),
    (_label("peak memory of a step"), "peak_bytes", _mebibytes, -1),
    (_label("parameters"), "parameter_bytes", lambda x: f"{x / 2**20:.2f} MiB", -1),
    (_label("peak memory / parameters"), "memory_ratio", lambda x: f"{x:.1f}", -1),
)
SIDES = ("dense", "sluice", "window")


def table_rows(result: dict) -> list[tuple[str, list[str], int | None]]:
    """(label, one cell per side, index of the best side or None where the sides are alike or none is better)."""
    sides = [result[name] for name in SIDES if name in result]
    rows = []
    for label, key, form, direction in ROWS:
        values = [side[key] for side in sides]
        cells = ["not reached" if v is None and key.endswith("target") else _or_missing(form)(v) for v in values]
        known = [v for v in values if v is not None]
        best = None
        if direction and known and len(set(cells)) > 1:
            best = values.index(max(known) if direction > 0 else min(known))
        rows.append((label(result), cells, best))
    return rows


def headline(result: dict) -> str:
    """The result in two sentences; the first says which steps its speed is that of, and gives the whole run's."""
    when = (
        f"With the gate closed ({timed_steps(result)})"
        if result["gate_closed_at_step"] is not None
        else f"The gate did not close; in {timed_steps(result)}"
    )
    return (
        f"{when} a training step {_pace(result['speedup'])} dense's; over the whole run training "
        f"{_pace(result['speedup_whole_run'])} dense's. Held-out accuracy is {result['accuracy_kept']:.1%} of dense's, "
        f"with {result['pairs_skipped']:.0%} of the pairs skipped"
    )


def _pace(ratio: float) -> str:
    return f"is {ratio:.2f} times as fast as" if ratio >= 1 else f"takes {1 / ratio:.2f} times as long as"


def goal_rows(result: dict) -> list[tuple[str, str, str, str]]:
    """(what, measured, goal, "met", "missed" or "not judged") of the three goals."""
    closed = result["gate_closed_at_step"] is not None
    speed = f"a step's speed, dense = 1, in {timed_steps(result)}{', with the gate closed' if closed else ''}"
    rows = []
    for name, text, form in (
        ("speedup", speed, lambda x: f"{x:.2f}x"),
        ("accuracy_kept", "of dense's held-out accuracy, at equal steps", lambda x: f"{100 * x:.1f} %"),
        ("pairs_skipped", "of the pairs skipped on held-out text", lambda x: f"{100 * x:.0f} %"),
    ):
        goal, met = result["goals"][name]["goal"], result["goals"][name]["met"]
        verdict = "not judged" if met is None else "met" if met else "missed"
        rows.append((text, form(result[name]), form(goal), verdict))
    return rows
