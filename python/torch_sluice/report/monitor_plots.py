"""The plots of a monitor's page: loss, step time, MFU, pairs kept, chosen bits."""

import matplotlib
import matplotlib.ticker

from torch_sluice.monitor.records import Curve, smooth
from torch_sluice.report.figure import STYLE, new_axes, to_svg

_LINE, _SOFT, _THIRD, _EDGE = "#0f766e", "#64748b", "#c2791b", "#94a3b8"
_SIZE = (4.6, 2.6)


def draw_curves(curves: dict[str, Curve], target_loss: float | None, mfu_limit: float | None) -> list[tuple[str, str]]:
    """(heading, SVG element) of what has at least two points."""
    curves = {name: curve for name, curve in curves.items() if len(curve.values) > 1}
    plots = []
    with matplotlib.rc_context(STYLE):
        if "loss" in curves:
            plots.append(("Loss", _draw_loss(curves["loss"], target_loss)))
        if "seconds" in curves:
            plots.append(("Time of each step", _draw_seconds(curves["seconds"])))
        if "mfu" in curves:
            plots.append(("MFU: share of the peak", _draw_mfu(curves, mfu_limit)))
        if "density" in curves:
            plots.append(("Pairs kept", _draw_shares({"pairs kept": curves["density"]})))
        bits = {f"{name.split('_')[1]} bits": curve for name, curve in curves.items() if name.startswith("bits_")}
        if bits:
            plots.append(("Widths that the quantiser chose", _draw_shares(bits)))
        if "overlapped_share" in curves:
            plots.append(("Communication overlapped", _draw_shares({"overlapped": curves["overlapped_share"]})))
    return plots


def _draw_loss(curve: Curve, target: float | None) -> str:
    figure, axes = new_axes(*_SIZE)
    axes.plot(curve.steps, curve.values, color=_LINE, alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(curve.steps, smooth(curve.values), color=_LINE, linewidth=1.8, label="smoothed")
    if target is not None:
        axes.axhline(target, color=_THIRD, linewidth=1.2, linestyle="--", label=f"target {target:g}")
    axes.legend()
    return _finish(figure, axes, curve)


def _draw_seconds(curve: Curve) -> str:
    figure, axes = new_axes(*_SIZE)
    axes.plot(curve.steps, curve.values, ".", color=_LINE, markersize=3, alpha=0.6)
    ordered = sorted(curve.values)
    median, most = ordered[len(ordered) // 2], ordered[int(0.99 * (len(ordered) - 1))]
    axes.axhline(median, color=_THIRD, linewidth=1.4, label="median")
    axes.set_ylim(0, 1.15 * max(most, median))
    axes.set_ylabel("seconds")
    axes.legend()
    return _finish(figure, axes, curve)


def _draw_mfu(curves: dict[str, Curve], limit: float | None) -> str:
    figure, axes = new_axes(*_SIZE)
    curve, dense = curves["mfu"], curves.get("mfu_dense_equivalent")
    if dense is not None and any(abs(x - y) > 1e-3 * y for x, y in zip(curve.values, dense.values, strict=False)):
        axes.plot(dense.steps, smooth(dense.values), color=_SOFT, linewidth=1.4, label="dense-equivalent")
    axes.plot(curve.steps, curve.values, color=_LINE, alpha=0.3, linewidth=0.8)
    axes.plot(curve.steps, smooth(curve.values), color=_LINE, linewidth=1.8, label="as executed")
    if limit is not None:
        axes.axhline(limit, color=_THIRD, linewidth=1.2, linestyle="--", label=f"limit {limit:.0%}")
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axes.set_ylim(bottom=0)
    axes.legend()
    return _finish(figure, axes, curve)


def _draw_shares(curves: dict[str, Curve]) -> str:
    figure, axes = new_axes(*_SIZE)
    for (label, curve), colour in zip(curves.items(), (_LINE, _SOFT, _THIRD, _EDGE), strict=False):
        axes.plot(curve.steps, curve.values, color=colour, linewidth=1.8, label=label)
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axes.set_ylim(0, 1.05)
    if len(curves) > 1:
        axes.legend()
    return _finish(figure, axes, next(iter(curves.values())))


def _finish(figure, axes, curve: Curve) -> str:
    axes.set_xlabel("step")
    axes.set_xlim(left=0, right=curve.steps[-1])
    return to_svg(figure)
