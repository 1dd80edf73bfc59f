"""Turns a finished run into figures: what each side reached and what it cost."""

import platform
import statistics
from datetime import datetime, timezone

import torch

import torch_sluice
from torch_sluice import monitor
from torch_sluice.monitor.records import smooth
from torch_sluice.train.evaluate import evaluate
from torch_sluice.train.loop import Run
from torch_sluice.train.losses import GOALS, TOLERANCE, find_losses, find_notes
from torch_sluice.train.measure import measure_side
from torch_sluice.train.side import History, Side

_TARGET_LOSS_MARGIN = 1.02  # the target loss is dense's final training loss times this


def compare(run: Run, progress=lambda text: None) -> dict:
    """The figures of a finished run, as ``--json`` writes them; ``docs/train.md`` explains each.

    Args:
        progress: called with a few words before each stage that takes time.
    """
    settings, sides = run.settings, run.sides
    windows = run.corpus.heldout_windows(settings.heldout_windows, settings.context)
    progress("measuring this machine's peak")
    peak = monitor.measure_peak_flops()
    closed = closing_step(sides["sluice"].history, settings.target_density)
    first = closed if closed is not None else settings.steps * 3 // 4
    densities = sides["sluice"].history.density[first:]
    target_loss = smooth(sides["dense"].history.loss)[-1] * _TARGET_LOSS_MARGIN
    figures = {}
    for name, side in sides.items():
        progress(f"{name}: reading held-out text")
        heldout = evaluate(side.model, windows, count_pairs=side.gated)
        progress(f"{name}: measuring a step")
        figures[name] = _side_figures(side, heldout, measure_side(run.folder, name, first), first, target_loss, peak)
    dense, sluice = figures["dense"], figures["sluice"]
    result = {
        "density": sluice["density"],
        "pairs_skipped": 1 - sluice["density"],
        "speedup": paired_speedup(dense["history"]["seconds"][first:], sluice["history"]["seconds"][first:]),
        "speedup_whole_run": dense["seconds_total"] / sluice["seconds_total"],
        "accuracy_kept": sluice["heldout_accuracy"] / dense["heldout_accuracy"] if dense["heldout_accuracy"] else 0.0,
        "gate_closed_at_step": closed,
        "timed_from_step": first,
        "density_while_timed": statistics.fmean(densities),
        "target_loss": target_loss,
        **figures,
        "preset": settings.preset,
        "settings": settings.to_dict(),
        "data": {
            "name": run.corpus.name,
            "train_bytes": len(run.corpus.train),
            "heldout_bytes": len(run.corpus.heldout),
            "train_files": run.corpus.train_files,
            "heldout_files": run.corpus.heldout_files,
            "heldout_read": windows.shape[0] * settings.context,
            "fingerprint": run.corpus.fingerprint,
        },
        "machine": describe_machine(peak),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    result["goals"] = judge_goals(result)
    result["losses"], result["notes"] = find_losses(result), find_notes(result)
    return result


def judge_goals(result: dict) -> dict:
    """``goal`` and ``met`` of each goal. They are about a closed gate: ``met`` is None where it never closed."""
    closed = result["gate_closed_at_step"] is not None
    return {name: {"goal": goal, "met": result[name] >= goal if closed else None} for name, goal in GOALS.items()}


def closing_step(history: History, target_density: float) -> int | None:
    """The first step from which on the smoothed density is never more than a tenth above the target; None if there is
    none. A gate that keeps less than it was asked to has closed: ``find_losses`` says so."""
    densities, limit = smooth(history.density), target_density * (1 + TOLERANCE)
    first = len(densities)
    while first > 0 and densities[first - 1] <= limit:
        first -= 1
    return first if first < len(densities) else None


def paired_speedup(dense: list[float], sluice: list[float]) -> float:
    """Median over the steps of dense's time / Sluice's. The two took turns, so what slows the machine slows a pair."""
    return statistics.median(theirs / ours for theirs, ours in zip(dense, sluice, strict=True))


def describe_machine(peak_flops: float) -> dict:
    from torch_sluice.info import describe_plugin

    plugin = describe_plugin()
    return {
        "processor": plugin["cpu"]["model"],
        "isa": plugin["cpu"]["isa"],
        "kernels": plugin["kernels"],
        "threads": torch.get_num_threads(),
        "torch_sluice": torch_sluice.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "peak_flops": peak_flops,
    }


def _side_figures(side: Side, heldout: dict, measured: dict, first: int, target_loss: float, peak: float) -> dict:
    history = side.history
    smoothed = smooth(history.loss)
    reached = next((step for step, loss in enumerate(smoothed) if loss <= target_loss), None)
    seconds = statistics.median(history.seconds[first:])
    parameter_bytes = sum(p.numel() * p.element_size() for p in side.model.parameters())
    peak_bytes, flops = measured.get("peak_bytes"), measured.get("flops_per_step")
    mfu = flops / seconds / peak if flops else None
    memory_ratio = peak_bytes / parameter_bytes if peak_bytes else None
    return {
        "title": side.title,
        "heldout_loss": heldout["loss"],
        "heldout_accuracy": heldout["accuracy"],
        "seconds_per_step": seconds,
        "seconds_per_step_whole_run": statistics.median(history.seconds),
        "seconds_total": sum(history.seconds),
        "peak_bytes": peak_bytes,
        "parameter_bytes": parameter_bytes,
        "memory_ratio": memory_ratio,
        "density": heldout.get("density", 1.0),
        "half_share": side.half_share,
        "flops_per_step": flops,
        "mfu": mfu,
        "time_by_part": measured.get("time_by_part"),
        "time_by_part_range": measured.get("time_by_part_range"),
        "measured_steps": measured.get("measured_steps"),
        "not_measured": measured.get("problem"),
        "steps_to_target": None if reached is None else reached + 1,
        "seconds_to_target": None if reached is None else sum(history.seconds[: reached + 1]),
        "limits": monitor.find_problems(mfu, memory_ratio),
        "history": {**vars(history), "smoothed_loss": smoothed},
    }
