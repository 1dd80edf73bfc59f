"""The limits that a monitor watches, and what it says when one is crossed: the figure, its meaning, where to look."""

import contextlib
import math
import sys
import warnings

MFU_LIMIT = 0.70  # below it the machine is not used well
MEMORY_RATIO_LIMIT = 10.0  # above it something other than the parameters takes the memory

_LITTLE_MEMORY = 16 * 2**20  # bytes that a process adds for its own ends; less growth than this is not the model's
_MUCH_OUTSIDE = 0.2  # of the time from the first step to the last
_SHORT_STEP = 0.02  # seconds; below it what Python does around the operators is much of a step


class MonitorWarning(UserWarning):
    """A figure has left the range that the monitor was told to watch, or the monitor itself can't do its work."""


def warn(message: str, stacklevel: int = 2) -> None:
    """Warns with a ``MonitorWarning``. Where warnings are errors it is printed instead: a monitor doesn't end a run."""
    try:
        warnings.warn(message, MonitorWarning, stacklevel=stacklevel + 1)
    except MonitorWarning:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no standard error, or a closed one
            print(f"{MonitorWarning.__name__}: {message}", file=sys.stderr)


def find_problems(
    mfu: float | None,
    memory_ratio: float | None,
    mfu_limit: float | None = MFU_LIMIT,
    memory_ratio_limit: float | None = MEMORY_RATIO_LIMIT,
    summary: dict | None = None,
) -> list[str]:
    """Sentences on the figures that are beyond their limits; None for a figure or a limit that there isn't.

    Args:
        summary: of a monitor, from which the advice on a low MFU is drawn.
    """
    problems = []
    if mfu is not None and mfu_limit is not None and mfu < mfu_limit:
        problems.append(
            f"MFU is {mfu:.0%}, below {mfu_limit:.0%}: the arithmetic units wait for something else"
            + (f". {_advise_on_mfu(summary)}" if summary else "")
        )
    if memory_ratio is not None and memory_ratio_limit is not None and memory_ratio > memory_ratio_limit:
        problems.append(
            f"peak memory is {memory_ratio:.1f} times the parameters, above {memory_ratio_limit:g}: activations weigh "
            "more than the model (shorter micro-batches or activation checkpointing lower it); beside a model of a few "
            "megabytes, so does what the process itself loads"
        )
    return problems


def _advise_on_mfu(summary: dict) -> str:
    """Where to look next, by the figures at hand; the first that fits."""
    overlapped, communicated = summary.get("overlapped_share"), summary.get("communication_waited_share")
    if communicated is not None and communicated > 0.2:
        share = "" if overlapped is None else f", and {overlapped:.0%} of the communication is overlapped"
        return f"{communicated:.0%} of a step is spent waiting for other ranks{share}: look at docs/parallel.md"
    seconds = summary.get("seconds_per_step")
    if seconds is not None and seconds < _SHORT_STEP:
        return (
            f"A step takes {1e3 * seconds:.1f} ms, of which much goes into starting operators: larger batches or "
            "torch.compile help most"
        )
    return "torch.profiler shows which operators take the time of a step"


def is_memory_judged(summary: dict) -> bool:
    """Whether so much memory was added that the ratio says something about the model."""
    return summary["peak_bytes"] - summary["parameter_bytes"] >= _LITTLE_MEMORY


def find_hints(summary: dict) -> list[str]:
    """What a report says beside the limits."""
    hints = []
    if summary.get("uncounted_operators"):
        names = ", ".join(summary["uncounted_operators"])
        hints.append(f"FLOPs and MFU are not known, since these operators compute and have no formula: {names}")
    if summary["outside_share"] is not None and summary["outside_share"] > _MUCH_OUTSIDE:
        hints.append(
            f"{summary['outside_share']:.0%} of the time passed outside of steps: loading data (num_workers of a "
            "DataLoader), evaluating, saving"
        )
    if summary["mfu"] is not None and summary["mfu"] > 1:
        hints.append("MFU is above 1: the peak was measured while the machine did other work; give peak_flops")
    if summary["odd_losses"]:
        hints.append(f"the loss was not finite at {summary['odd_losses']} of {summary['steps']} steps")
    if summary["target_loss"] is not None and summary["steps_to_target"] is None:
        hints.append(f"the smoothed loss did not reach the target of {summary['target_loss']:g}")
    return hints


def check_limit(name: str, value: float | None) -> None:
    """Raises ValueError unless the limit is None or a number of at least 0."""
    if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
        raise ValueError(f"{name} is {value!r}, expected a number of at least 0, or None to watch nothing")
