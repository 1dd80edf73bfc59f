"""Where a monitor's figures go. Each output has ``write(step, figures)`` and ``close()`` and may raise."""

from collections.abc import Callable

from torch_sluice.monitor.limits import warn
from torch_sluice.monitor.records import Budget


class Output:
    """An output that never stops the run: what goes wrong in it is said once, and the rest goes on.

    Args:
        what: how it is called in a warning.
        make: makes the output. What it raises is warned of, too, except ImportError, ValueError and TypeError: those
            are mistakes of the caller.
        share: of the time of the steps that writing may take; None: every step is written.
        free: seconds that writing may take beside that, so that a short run is written whole.
    """

    def __init__(self, what: str, make: Callable[[], object], share: float | None = None, free: float = 0.2):
        self._what, self._warned = what, False
        self._budget = None if share is None else Budget(share, free)
        self._output = None
        try:
            self._output = make()
        except OSError as error:
            self._complain(error)

    def write(self, step: int, seconds: float, figures: dict[str, float]) -> None:
        if self._output is None:
            return
        if self._budget is not None:
            self._budget.earn(seconds)
            if not self._budget.open:
                return
            with self._budget.spend():
                self._try(self._output.write, step, figures)
        else:
            self._try(self._output.write, step, figures)

    def close(self) -> None:
        output, self._output = self._output, None
        if output is not None:
            self._try(output.close)

    def _try(self, call: Callable, *arguments) -> None:
        try:
            call(*arguments)
        except Exception as error:  # a full disk, a thread that died of one, a folder that was removed
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            reason = getattr(error, "strerror", None) or error
            warn(f"{self._what}: figures are being lost, the run goes on: {reason}")
