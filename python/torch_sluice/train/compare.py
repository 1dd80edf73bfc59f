"""Turns a finished run into figures: what each side reached, what it cost, and where Sluice loses."""

import platform
import statistics

import torch

from torch_sluice import monitor
from torch_sluice.monitor.records import smooth
from torch_sluice.train.evaluate import evaluate
from torch_sluice.train.loop import Run
from torch_sluice.train.measure import measure_side
from torch_sluice.train.side import History, Side

# The bar that the project sets itself: docs/train.md.
GOALS = {"speedup": 1.3, "accuracy_kept": 0.98, "pairs_skipped": 0.5}
_CLOSED_WITHIN = 1.1  # the gate has closed once its density is below this many times the target
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
    target_loss = smooth(sides["dense"].history.loss)[-1] * _TARGET_LOSS_MARGIN
    figures = {}
    for name, side in sides.items():
        progress(f"{name}: reading held-out text")
        heldout = evaluate(side.model, windows, count_pairs=side.gated)
        progress(f"{name}: measuring a step")
        figures[name] = _side_figures(side, heldout, measure_side(run.folder, name), first, target_loss, peak)
    dense, sluice = figures["dense"], figures["sluice"]
    result = {
        "density": sluice["density"],
        "pairs_skipped": 1 - sluice["density"],
        "speedup": paired_speedup(dense["history"]["seconds"][first:], sluice["history"]["seconds"][first:]),
        "speedup_whole_run": dense["seconds_total"] / sluice["seconds_total"],
        "accuracy_kept": sluice["heldout_accuracy"] / dense["heldout_accuracy"] if dense["heldout_accuracy"] else 0.0,
        "gate_closed_at_step": closed,
        "timed_from_step": first,
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
    }
    result["goals"] = {name: {"goal": goal, "met": result[name] >= goal} for name, goal in GOALS.items()}
    result["losses"] = find_losses(result)
    return result


def closing_step(history: History, target_density: float) -> int | None:
    """The first step from which on the smoothed density stays within reach of the target; None if it never does."""
    densities, limit = smooth(history.density), target_density * _CLOSED_WITHIN
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
        "not_measured": measured.get("problem"),
        "steps_to_target": None if reached is None else reached + 1,
        "seconds_to_target": None if reached is None else sum(history.seconds[: reached + 1]),
        "limits": monitor.find_problems(mfu, memory_ratio),
        "history": {**vars(history), "smoothed_loss": smoothed},
    }


def find_losses(result: dict) -> list[str]:
    """Where Sluice is no better than dense, or than what is simpler: one sentence each."""
    dense, sluice, window = result["dense"], result["sluice"], result.get("window")
    sentences = []
    for name, goal in GOALS.items():
        if result[name] < goal:
            shown = f"{result[name]:.2f}x" if name == "speedup" else f"{result[name]:.1%}"
            wanted = f"{goal}x" if name == "speedup" else f"{goal:.0%}"
            sentences.append(f"{name.replace('_', ' ').capitalize()} is {shown}; the goal is {wanted}.")
    if result["gate_closed_at_step"] is None:
        sentences.append(
            f"The gate had not closed to its target density of {result['settings']['target_density']} by the last "
            "step; step times are those of the last quarter."
        )
    else:
        open_steps = result["gate_closed_at_step"]
        ours, theirs = sum(sluice["history"]["seconds"][:open_steps]), sum(dense["history"]["seconds"][:open_steps])
        if ours > theirs:
            sentences.append(
                f"While the gate was learning (the first {open_steps} steps) Sluice took {ours / theirs:.2f} times as "
                "long as dense."
            )
    if result["speedup_whole_run"] < 1:
        sentences.append(
            f"Over the whole run Sluice was slower ({sluice['seconds_total']:.0f} s against "
            f"{dense['seconds_total']:.0f} s): a run this short does not win back what the learning phase costs."
        )
    if sluice["heldout_loss"] > dense["heldout_loss"]:
        difference = sluice["heldout_loss"] - dense["heldout_loss"]
        sentences.append(f"Held-out loss is {difference:.4f} nats a byte above dense's.")
    if sluice["heldout_accuracy"] < dense["heldout_accuracy"]:
        difference = 100 * (dense["heldout_accuracy"] - sluice["heldout_accuracy"])
        sentences.append(f"Held-out accuracy is {difference:.2f} points below dense's.")
    for name, unit in (("steps_to_target", "steps"), ("seconds_to_target", "seconds")):
        if sluice[name] is None:
            sentences.append(f"Sluice did not reach the target loss; dense did after {dense['steps_to_target']} steps.")
            break
        if sluice[name] > dense[name]:
            sentences.append(f"It took {sluice[name]:.0f} {unit} to the target loss, dense {dense[name]:.0f}.")
    for side in (dense, sluice):
        if side["peak_bytes"] is None or side["mfu"] is None:
            sentences.append(
                f"Memory, FLOPs and MFU of {side['title']} were not measured, so nothing is said of them: "
                f"{side['not_measured'] or 'no reason was given'}"
            )
    if sluice["peak_bytes"] and dense["peak_bytes"] and sluice["peak_bytes"] > dense["peak_bytes"]:
        ratio = sluice["peak_bytes"] / dense["peak_bytes"]
        sentences.append(f"A step needs {ratio:.2f} times the memory of dense's.")
    if sluice["mfu"] and dense["mfu"] and sluice["mfu"] < dense["mfu"]:
        sentences.append(
            f"MFU is {sluice['mfu']:.0%} against dense's {dense['mfu']:.0%}: with fewer pairs to compute, what is left "
            "runs further from the machine's peak."
        )
    if window is not None and window["heldout_accuracy"] >= 0.995 * sluice["heldout_accuracy"]:
        better = window["heldout_accuracy"] > 1.005 * sluice["heldout_accuracy"]
        sentences.append(
            f"A plain sliding window of the target density does {'better' if better else 'as well'} here (accuracy "
            f"{window['heldout_accuracy']:.4f}, gate {sluice['heldout_accuracy']:.4f}): this text is predicted from "
            "what is near. Where the answer lies far back a window fails and the gate does not: see the "
            "section Recall of docs/gate.md."
        )
    return sentences
