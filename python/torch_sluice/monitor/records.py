"""What a monitor keeps of the steps: times, the way to a target loss, and curves of bounded length."""

import math
import statistics
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

_SMOOTHING = 0.9  # of loss curves
_POINTS = 2048  # of a curve


class MovingAverage:
    """Exponential moving average, unbiased at the start. What is not finite is left out."""

    def __init__(self, smoothing: float = _SMOOTHING):
        self._smoothing = smoothing
        self._sum = self._weight = 0.0

    @property
    def value(self) -> float | None:
        """None before the first finite value."""
        return self._sum / self._weight if self._weight else None

    def add(self, value: float) -> float | None:
        if math.isfinite(value):
            self._sum = self._smoothing * self._sum + (1 - self._smoothing) * value
            self._weight = self._smoothing * self._weight + (1 - self._smoothing)
        return self.value

    def state_dict(self) -> dict:
        return {"sum": self._sum, "weight": self._weight}

    def load_state_dict(self, state: dict) -> None:
        self._sum, self._weight = float(state["sum"]), float(state["weight"])


def smooth(values: list[float]) -> list[float]:
    """The moving average after each value."""
    average = MovingAverage()
    return [average.add(value) for value in values]


class Curve:
    """Values by step for a plot: at most ``points`` of them, each the mean over a stretch that doubles when need be."""

    def __init__(self, points: int = _POINTS):
        self._most, self._stretch = points, 1
        self.steps: list[int] = []
        self.values: list[float] = []
        self._pending: list[float] = []

    def add(self, step: int, value: float) -> None:
        self._pending.append(value)
        if len(self._pending) < self._stretch:
            return
        self.steps.append(step)
        self.values.append(sum(self._pending) / len(self._pending))
        self._pending.clear()
        if len(self.values) >= self._most:
            pairs = zip(self.values[::2], self.values[1::2], strict=False)
            self.values = [(one + other) / 2 for one, other in pairs]
            self.steps = self.steps[1::2]
            self._stretch *= 2


class StepTimes:
    """Seconds of each timed step, in order."""

    def __init__(self):
        self.seconds = array("d")

    def add(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def quantile(self, share: float, last: int | None = None) -> float | None:
        """The smallest time that this share of the steps (of the ``last`` ones) does not exceed."""
        ordered = sorted(self.seconds[-last:] if last else self.seconds)
        return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else None


class Budget:
    """Keeps the cost of looking below a share of the time of the steps, after a number of seconds that are free: look
    only while ``open``."""

    def __init__(self, share: float, free: float = 0.0):
        self._share, self._spent, self._earned = share, -free, 0.0

    def earn(self, seconds: float) -> None:
        self._earned += seconds

    @property
    def open(self) -> bool:
        return self._spent <= self._share * self._earned

    @contextmanager
    def spend(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent += time.perf_counter() - start
