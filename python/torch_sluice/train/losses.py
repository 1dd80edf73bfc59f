"""Where Sluice loses, in sentences; and what else a reader must know to judge a run."""

from torch_sluice.report.rows import ROWS, show_seconds, timed_steps

# The bar that the project sets itself: docs/train.md.
GOALS = {"speedup": 1.3, "accuracy_kept": 0.98, "pairs_skipped": 0.5}
TOLERANCE = 0.1  # the density may miss its target by this share of it
_WINDOW_AS_GOOD = 0.005  # accuracies that differ by this share are alike


def find_losses(result: dict) -> list[str]:
    """Where Sluice is no better than dense, or than what is simpler, or than it was asked to be: one sentence each."""
    return [
        *_missed_goals(result),
        *_missed_target(result),
        *_lost_time(result),
        *_lost_figures(result),
        *_lost_to_window(result),
    ]


def find_notes(result: dict) -> list[str]:
    """What else belongs beside the figures: how a plain window of the same density does on such text."""
    window, sluice = result.get("window"), result["sluice"]
    if window is None:
        return [
            "This run did not train a plain sliding window of the same density, which on text that is predicted from "
            "what is near can do as well as the gate or better: --with-window trains it, and docs/train.md says how it "
            "did on source code."
        ]
    if _window_is_as_good(result):
        return []  # said where Sluice loses
    return [
        f"A plain sliding window of the target density reached an accuracy of {window['heldout_accuracy']:.4f} on this "
        f"text, the gate {sluice['heldout_accuracy']:.4f}."
    ]


def _missed_goals(result: dict) -> list[str]:
    sentences = []
    for name, goal in GOALS.items():
        if result[name] < goal:
            shown = f"{result[name]:.2f}x" if name == "speedup" else f"{result[name]:.1%}"
            wanted = f"{goal}x" if name == "speedup" else f"{goal:.0%}"
            sentences.append(f"{name.replace('_', ' ').capitalize()} is {shown}; the goal is {wanted}.")
    return sentences


def _missed_target(result: dict) -> list[str]:
    target, kept = result["settings"]["target_density"], result["density_while_timed"]
    if result["gate_closed_at_step"] is None:
        return [
            f"The gate had not closed to its target density of {target} by the last step; step times are those of the "
            f"last quarter ({timed_steps(result)}), in which it kept {kept:.3f} of the pairs."
        ]
    if kept < (1 - TOLERANCE) * target:
        return [
            f"The gate closed further than it was asked to: in {timed_steps(result)} it kept {kept:.3f} of the pairs, "
            f"for a target of {target}. The speed is that of the lower density."
        ]
    return []


def _lost_time(result: dict) -> list[str]:
    dense, sluice, open_steps = result["dense"], result["sluice"], result["gate_closed_at_step"]
    sentences = []
    if open_steps:
        ours, theirs = sum(sluice["history"]["seconds"][:open_steps]), sum(dense["history"]["seconds"][:open_steps])
        if ours > theirs:
            sentences.append(
                f"While the gate was learning (the first {open_steps} steps) Sluice took {ours / theirs:.2f} times as "
                "long as dense."
            )
    if result["speedup_whole_run"] < 1:
        sentences.append(
            f"Over the whole run Sluice was slower ({show_seconds(sluice['seconds_total'])} s against "
            f"{show_seconds(dense['seconds_total'])} s): a run this short does not win back what the learning "
            "phase costs."
        )
    for name, unit, form in (("steps_to_target", "steps", str), ("seconds_to_target", "seconds", show_seconds)):
        if sluice[name] is None:
            sentences.append(f"Sluice did not reach the target loss; dense did after {dense['steps_to_target']} steps.")
            break
        if sluice[name] > dense[name] and form(sluice[name]) != form(dense[name]):
            sentences.append(f"It took {form(sluice[name])} {unit} to the target loss, dense {form(dense[name])}.")
    return sentences


def _lost_figures(result: dict) -> list[str]:
    """One sentence for each row of the table in which dense is better, but for those of ``_lost_time``."""
    dense, sluice = result["dense"], result["sluice"]
    sentences = []
    for side in (dense, sluice):
        if side["peak_bytes"] is None or side["mfu"] is None:
            sentences.append(
                f"Memory, FLOPs and MFU of {side['title']} were not measured, so nothing is said of them: "
                f"{side['not_measured'] or 'no reason was given'}"
            )
    for label, key, form, direction in ROWS:
        ours, theirs = sluice[key], dense[key]
        if not direction or ours is None or theirs is None or (ours - theirs) * direction >= 0:
            continue
        if key in _SENTENCES:
            sentences.append(_SENTENCES[key](ours, theirs))
        elif key not in _SAID_ELSEWHERE and form(ours) != form(theirs):
            sentences.append(f"{_capitalise(label(result))}: {form(ours)}, dense {form(theirs)}.")
    return sentences


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


_SAID_ELSEWHERE = {"seconds_total", "steps_to_target", "seconds_to_target"}
_SENTENCES = {
    "heldout_accuracy": lambda ours, theirs: f"Held-out accuracy is {100 * (theirs - ours):.2f} points below dense's.",
    "heldout_loss": lambda ours, theirs: f"Held-out loss is {ours - theirs:.4f} nats a byte above dense's.",
    "peak_bytes": lambda ours, theirs: f"A step needs {ours / theirs:.2f} times the memory of dense's.",
    "parameter_bytes": lambda ours, theirs: f"The gates add {ours / theirs - 1:.1%} to the parameters.",
    "mfu": lambda ours, theirs: (
        f"MFU is {ours:.1%} against dense's {theirs:.1%}: Sluice's steps use less of the machine's peak."
    ),
}


def _window_is_as_good(result: dict) -> bool:
    return result["window"]["heldout_accuracy"] >= (1 - _WINDOW_AS_GOOD) * result["sluice"]["heldout_accuracy"]


def _lost_to_window(result: dict) -> list[str]:
    window, sluice = result.get("window"), result["sluice"]
    if window is None or not _window_is_as_good(result):
        return []
    better = window["heldout_accuracy"] > (1 + _WINDOW_AS_GOOD) * sluice["heldout_accuracy"]
    return [
        f"A plain sliding window of the target density does {'better' if better else 'as well'} here (accuracy "
        f"{window['heldout_accuracy']:.4f}, gate {sluice['heldout_accuracy']:.4f}): this text is predicted from "
        "what is near. Where the answer lies far back a window fails and the gate does not: see the "
        "section Recall of docs/gate.md."
    ]
