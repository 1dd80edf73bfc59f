"""The comparison as rows of text, shared by the table on the terminal and the one in the HTML report."""

from collections.abc import Callable

_MISSING = "not measured"


def _or_missing(form: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: _MISSING if value is None else form(value)


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:.1f} MiB"


# (label, key of a side's figures, how it is shown, the better direction: +1 more, -1 less, 0 neither)
_ROWS = (
    ("held-out next-byte accuracy", "heldout_accuracy", lambda x: f"{100 * x:.2f} %", +1),
    ("held-out loss, nats a byte", "heldout_loss", lambda x: f"{x:.4f}", -1),
    ("pairs kept on held-out text", "density", lambda x: f"{100 * x:.1f} %", 0),
    ("seconds a step, gate closed (median)", "seconds_per_step", lambda x: f"{x:.3f}", -1),
    ("seconds a step, whole run (median)", "seconds_per_step_whole_run", lambda x: f"{x:.3f}", -1),
    ("seconds of training", "seconds_total", lambda x: f"{x:.0f}", -1),
    ("steps to the target loss", "steps_to_target", lambda x: f"{x}", -1),
    ("seconds to the target loss", "seconds_to_target", lambda x: f"{x:.0f}", -1),
    ("gradients held in 16 bits", "half_share", lambda x: f"{100 * x:.0f} %", 0),
    ("GFLOP a step", "flops_per_step", lambda x: f"{x / 1e9:.1f}", -1),
    ("MFU (of the peak measured here)", "mfu", lambda x: f"{100 * x:.0f} %", +1),
    ("peak memory of a step", "peak_bytes", _mebibytes, -1),
    ("parameters", "parameter_bytes", _mebibytes, -1),
    ("peak memory / parameters", "memory_ratio", lambda x: f"{x:.1f}", -1),
)
SIDES = ("dense", "sluice", "window")


def table_rows(result: dict) -> list[tuple[str, list[str], int | None]]:
    """(label, one cell per side, index of the best side or None where the sides are alike or none is better)."""
    sides = [result[name] for name in SIDES if name in result]
    rows = []
    for label, key, form, direction in _ROWS:
        values = [side[key] for side in sides]
        cells = ["not reached" if v is None and key.endswith("target") else _or_missing(form)(v) for v in values]
        known = [v for v in values if v is not None]
        best = None
        if direction and known and len(set(cells)) > 1:
            best = values.index(max(known) if direction > 0 else min(known))
        rows.append((label, cells, best))
    return rows


def headline(result: dict) -> str:
    """The result in one sentence."""
    ratio = result["speedup"]
    pace = f"is {ratio:.2f} times as fast as" if ratio >= 1 else f"takes {1 / ratio:.2f} times as long as"
    return (
        f"A training step {pace} dense, with {result['accuracy_kept']:.1%} of dense's held-out accuracy and "
        f"{result['pairs_skipped']:.0%} of the pairs skipped"
    )


def goal_rows(result: dict) -> list[tuple[str, str, str, bool]]:
    """(what, measured, goal, met) of the three goals."""
    rows = []
    for name, text, form in (
        ("speedup", "a step's speed, dense = 1, once the gate has closed", lambda x: f"{x:.2f}x"),
        ("accuracy_kept", "of dense's held-out accuracy, at equal steps", lambda x: f"{100 * x:.1f} %"),
        ("pairs_skipped", "of the pairs skipped", lambda x: f"{100 * x:.0f} %"),
    ):
        goal = result["goals"][name]
        rows.append((text, form(result[name]), form(goal["goal"]), goal["met"]))
    return rows
