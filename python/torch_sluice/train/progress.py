"""What the user sees while training: a live bar on a terminal, a line now and then elsewhere."""

import math
import statistics
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from torch_sluice.train.loop import Run

_LINE_EVERY_SECONDS = 20.0
RECENT = 15  # steps that step time and time left are judged by


class StepProgress:
    """Shows each step of a run, which has ``step`` and ``settings``; subclasses say what ``describe`` it."""

    def __init__(self, run, console: Console):
        self._console = console
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=console,
            auto_refresh=console.is_terminal,
        )
        self._task = self._bar.add_task("", total=run.settings.steps, completed=run.step)
        self._last_line = -math.inf  # the first step is shown at once

    def __enter__(self):
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def update(self, run) -> None:
        """Call it after each step."""
        text = self.describe(run)
        if self._console.is_terminal:
            self._bar.update(self._task, completed=run.step, description=text)
        elif time.monotonic() - self._last_line > _LINE_EVERY_SECONDS or run.step == run.settings.steps:
            self._last_line = time.monotonic()
            self._console.print(
                f"step {run.step}/{run.settings.steps}  {text}", markup=False, highlight=False, soft_wrap=True
            )


class TrainProgress(StepProgress):
    """Use as ``with TrainProgress(run, console) as progress: run.train(progress.update)``."""

    def describe(self, run: Run) -> str:
        return describe_step(run)


def describe_step(run: Run) -> str:
    """Loss of each side, density, step times and time left, in one line."""
    parts, left = [], 0.0
    for name, side in run.sides.items():
        recent = statistics.median(side.history.seconds[-RECENT:])
        left += recent * (run.settings.steps - run.step)
        density = f" at {side.history.density[-1]:.0%} of pairs" if side.gated else ""
        parts.append(f"{name} {side.history.loss[-1]:.3f}{density}, {recent:.2f} s")
    minutes, seconds = divmod(round(left), 60)
    return "  |  ".join(parts) + f"  |  {minutes}:{seconds:02d} left"
