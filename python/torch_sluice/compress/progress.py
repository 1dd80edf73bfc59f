"""A progress bar that only shows for work of more than two seconds."""

import sys
import time

_PATIENCE = 2.0  # seconds before a bar appears


class Progress:
    """Steps of phases on standard error; silent where it is switched off, for quick work, or without rich."""

    def __init__(self, enabled: bool):
        self._enabled, self._begin = enabled, time.monotonic()
        self._bar = self._task = None
        self._phase, self._total, self._done = "", None, 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, phase: str, total: int | None = None) -> None:
        """A new phase of so many steps; None: unknown."""
        self._phase, self._total, self._done = phase, total, 0
        if self._bar is not None:
            self._bar.reset(self._task, description=phase, total=total)

    def step(self, text: str = "") -> None:
        """One step is about to begin."""
        self._done += 1
        if self._bar is None and self._enabled and time.monotonic() - self._begin > _PATIENCE:
            self._show()
        if self._bar is not None:
            description = f"{self._phase} {text}".strip()
            self._bar.update(self._task, completed=self._done, description=description)

    def _show(self) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar
        except ModuleNotFoundError:
            self._enabled = False
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._bar = Bar(*columns, TimeElapsedColumn(), console=Console(file=sys.stderr), transient=True)
        self._task = self._bar.add_task(self._phase, total=self._total)
        self._bar.start()
