"""A monitor's figures as rows of text: label, value, and what it means."""

from collections.abc import Callable

from torch_sluice.monitor.limits import is_memory_judged


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.1 or value == 0 else f"{100 * value:.1f} %"


def _seconds(value: float) -> str:
    for factor, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}" if value < 1000 else f"{value:.0f} s"
    return f"{value * 1e6:.2g} µs"


def _flops(value: float) -> str:
    for factor, unit in ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g} FLOP"


def _bytes(value: float) -> str:
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} B"


def _count(value: float) -> str:
    return f"{value:,.0f}"


# (key of the summary, label, how it is shown, what it means)
_ROWS: tuple[tuple[str, str, Callable, str], ...] = (
    ("steps", "steps", _count, "optimizer steps, or requests"),
    ("tokens", "tokens", _count, "as the loop gave them"),
    ("total_seconds", "time in steps", _seconds, "all steps together"),
    ("outside_share", "time outside of steps", _percent, "of the time from the first step to the last"),
    ("seconds_per_step", "step, median", _seconds, "half of the timed steps were faster"),
    ("seconds_per_step_p95", "step, 95th percentile", _seconds, "one timed step in twenty was slower"),
    ("mfu", "MFU", _percent, "operations as executed / (median step × peak measured for their dtype)"),
    (
        "mfu_dense_equivalent",
        "dense-equivalent MFU",
        _percent,
        "the same with every pair and one pass a product counted",
    ),
    ("flops_per_step", "executed in a step", _flops, "matrix products, convolutions, kept pairs of attention"),
    ("flops_per_step_dense_equivalent", "dense-equivalent of a step", _flops, "the same with every pair counted"),
    ("peak_bytes", "peak memory", _bytes, "parameters, and what the process added at most since the monitor began"),
    ("parameter_bytes", "parameters", _bytes, "weights of the model"),
    ("memory_ratio", "peak memory / parameters", lambda x: f"{x:.1f}", ""),
    ("loss", "loss, smoothed", lambda x: f"{x:.4g}", "moving average over about ten steps"),
    ("odd_losses", "losses that were not finite", _count, "left out of the average"),
    ("target_loss", "target loss", lambda x: f"{x:g}", ""),
    ("steps_to_target", "steps to the target loss", _count, "until the smoothed loss first reached it"),
    ("seconds_to_target", "seconds to the target loss", _seconds, "of steps"),
    ("density", "pairs kept", _percent, "kept pairs / pairs that the causal mask allows, at the last look"),
    ("half_share", "gradients summed in 16 bits", _percent, "of the elements, at the last look"),
    ("communication_bytes_per_step", "communicated in a step", _bytes, "given to collectives and sent, by this rank"),
    ("overlapped_share", "communication overlapped", _percent, "1 − time waited / time that collectives ran"),
    ("communication_waited_share", "time waited for other ranks", _percent, "of the time in steps"),
)
_ONLY_IF_SET = {"tokens", "odd_losses", "communication_bytes_per_step"}


def figure_rows(summary: dict) -> list[tuple[str, str, str]]:
    """(label, value, meaning) of all figures that are known."""
    rows = []
    for key, label, form, meaning in _ROWS:
        value = summary[key]
        if value is None and key in ("steps_to_target", "seconds_to_target") and summary["target_loss"] is not None:
            rows.append((label, "not reached", meaning))
        elif value is not None and (value or key not in _ONLY_IF_SET):
            rows.append((label, form(value), meaning))
    for width, share in (summary["bits"] or {}).items():
        rows.append((f"inputs quantised to {width} bits", _percent(share), "of the rows that were looked at"))
    for name, peak in summary["peak_flops"].items():
        rows.append((f"peak, {name}", f"{_flops(peak)}/s", "a large matrix product with the same threads"))
    return rows


def tiles(summary: dict, limits: tuple[float | None, float | None]) -> list[tuple[str, str, str, bool]]:
    """(value, what it is, a word on it, whether it is within its limit) of the figures that matter most."""
    mfu_limit, ratio_limit = limits
    found = []
    if summary["mfu"] is not None:
        note = "" if mfu_limit is None else f"limit: at least {_percent(mfu_limit)}"
        found.append((_percent(summary["mfu"]), "MFU", note, mfu_limit is None or summary["mfu"] >= mfu_limit))
    if summary["seconds_per_step"] is not None:
        note = f"95th percentile {_seconds(summary['seconds_per_step_p95'])}"
        found.append((_seconds(summary["seconds_per_step"]), "a step, median", note, True))
    if summary["memory_ratio"] is not None:
        note = "" if ratio_limit is None else f"limit: at most {ratio_limit:g}"
        within = ratio_limit is None or summary["memory_ratio"] <= ratio_limit
        if not within and not is_memory_judged(summary):
            note, within = "not judged: little was added", True
        found.append((f"{summary['memory_ratio']:.1f}", "peak memory / parameters", note, within))
    if summary["target_loss"] is not None:
        if summary["steps_to_target"] is None:
            found.append(("not reached", f"target loss {summary['target_loss']:g}", "", False))
        else:
            note = f"{_seconds(summary['seconds_to_target'])} of steps"
            value = f"{summary['steps_to_target']:,}"
            found.append((value, f"steps to the target loss {summary['target_loss']:g}", note, True))
    elif summary["loss"] is not None:
        found.append((f"{summary['loss']:.4g}", "loss, smoothed", "at the end", True))
    for key, label in (
        ("density", "of the pairs kept"),
        ("half_share", "of the gradients in 16 bits"),
        ("overlapped_share", "of communication overlapped"),
    ):
        if summary[key] is not None:
            found.append((_percent(summary[key]), label, "", True))
    return found


def headline(summary: dict) -> str:
    """The run in one sentence."""
    steps = f"{summary['steps']:,} step{'s' if summary['steps'] != 1 else ''}"
    if summary["seconds_per_step"] is None:
        return f"{summary['name']}: {steps}"
    return f"{summary['name']}: {steps} of {_seconds(summary['seconds_per_step'])}"
