"""A progress bar that only shows for work of more than two seconds, and says how much longer it will take."""

import sys
import time
from collections.abc import Callable

_PATIENCE = 2.0  # seconds before a bar appears
_PRIOR = 2.0  # steps that what was foreseen of a phase counts for, against those that were measured


class Progress:
    """Steps of phases on standard error; silent where it is switched off, for quick work, or without rich.

    The rest of the time is what was foreseen for the phases to come, corrected by how those before kept to it, as far
    as they were of the same order, and the rest of the phase that goes on, by its own steps.
    """

    def __init__(self, enabled: bool, clock: Callable[[], float] = time.monotonic):
        self._enabled, self._clock = enabled, clock
        self._begin = self._phase_begin = clock()
        self._bar = self._task = None
        self._phase, self._total, self._done, self._budget = "", None, 0, 0.0
        self._foreseen: dict[str, float] = {}
        self._expected = self._spent = 0.0  # of the phases that are over and were foreseen

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def foresee(self, phase: str, seconds: float) -> None:
        """Seconds that a phase to come will take, in place of what was said of it before."""
        self._foreseen[phase] = max(0.0, seconds)

    def forget(self, phase: str) -> None:
        """A phase that will not come."""
        self._foreseen.pop(phase, None)

    def start(self, phase: str, total: int | None = None) -> None:
        """A new phase of so many steps; None: unknown. A phase may come in several parts, which share its seconds."""
        now = self._clock()
        if self._budget > 0:
            self._expected += self._budget
            self._spent += now - self._phase_begin
        self._phase, self._total, self._done, self._phase_begin = phase, total, 0, now
        self._budget = self._foreseen.pop(phase, 0.0)
        self._show()

    def step(self, text: str = "") -> None:
        """One step is about to begin."""
        self._done += 1
        self._show(text)

    def skip(self, steps: int) -> None:
        """So many steps of the phase will not be needed."""
        if self._total:
            left = max(self._done, self._total - steps)
            self._budget *= left / self._total
            self._total = left

    @property
    def elapsed(self) -> float:
        return self._clock() - self._begin

    @property
    def remaining(self) -> float:
        """Seconds that are foreseen."""
        scale = 1.0
        if self._expected > 0:  # half of what phases took beyond what was foreseen will be so again
            beyond = min(4.0, max(0.25, self._spent / self._expected)) - 1
            whole = self._expected + self._budget + sum(self._foreseen.values())
            scale = 1 + 0.5 * beyond * min(1.0, 2 * self._expected / whole)
        spent = self._clock() - self._phase_begin
        if self._total:
            over = max(0, self._done - 1)
            prior = scale * self._budget / self._total if self._budget else (spent / over if over else 0.0)
            each = (_PRIOR * prior + spent) / (_PRIOR + over) if over else prior
            here = max(0.0, each * self._total - spent)
        else:
            here = max(0.0, scale * self._budget - spent)
        return here + scale * sum(self._foreseen.values())

    def _show(self, text: str = "") -> None:
        elapsed = self.elapsed
        if self._bar is None and self._enabled and elapsed > _PATIENCE:
            self._open()
        if self._bar is not None:
            left = self.remaining
            description = f"{self._phase} {text}".strip()
            self._bar.update(
                self._task, completed=elapsed, total=elapsed + left, description=description, left=_in_words(left)
            )

    def _open(self) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar
        except ModuleNotFoundError:
            self._enabled = False
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        left = TextColumn("{task.fields[left]}", markup=False)
        self._bar = Bar(*columns, left, console=Console(file=sys.stderr), transient=True)
        self._task = self._bar.add_task(self._phase, total=None, left="")
        self._bar.start()


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(1, round(seconds))} s left"
    return f"about {round(seconds / 60)} min left"
