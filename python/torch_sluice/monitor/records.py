"""What a monitor keeps of the steps: times, the way to a target loss, and curves of bounded length."""

import math
import statistics
import threading
import time
import weakref
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


class Step:
    """A step that a monitor times: begun in a thread, then stopped, then recorded."""

    def __init__(self):
        self.thread = threading.get_ident()
        self.begun = time.perf_counter()
        self.seconds: float | None = None  # None while it runs
        self.counter = None  # the ``StepFlopCounter`` under which it runs
        self.is_mixed = False  # another step ran in its thread at the same time


class Occupation:
    """How much of the time passes outside of steps, of which several may run at a time. What monitors take for
    themselves between steps (``own_work``) belongs neither to the steps nor to the time outside of them."""

    def __init__(self):
        self._lock = threading.Lock()
        self._steps = self._own = 0  # that are going on
        self._since: float | None = None  # up to when time is accounted for; None before the first step
        self._inside = self._outside = 0.0
        self._up_to_last_end = 0.0, 0.0
        with _lock:
            _occupations.add(self)

    def begin_step(self, now: float) -> None:
        with self._lock:
            self._account(now)
            self._since = now
            self._steps += 1

    def end_step(self, now: float) -> None:
        with self._lock:
            self._account(now)
            self._steps -= 1
            self._up_to_last_end = self._inside, self._outside

    def change_own(self, by: int, now: float) -> None:
        with self._lock:
            self._account(now)
            self._own += by

    @property
    def outside_share(self) -> float | None:
        """From the first step's begin to the last one's end; None before it."""
        inside, outside = self._up_to_last_end
        return outside / (inside + outside) if inside + outside > 0 else None

    def _account(self, now: float) -> None:
        if self._since is None:
            return
        passed = max(now - self._since, 0.0)
        self._since = max(now, self._since)
        if self._steps:
            self._inside += passed
        elif not self._own:
            self._outside += passed


_lock = threading.Lock()
_occupations: "weakref.WeakSet[Occupation]" = weakref.WeakSet()


@contextmanager
def own_work() -> Iterator[None]:
    """What a monitor does for itself, which no monitor takes for time outside of steps."""
    with _lock:
        watched = list(_occupations)
    now = time.perf_counter()
    for occupation in watched:
        occupation.change_own(1, now)
    try:
        yield
    finally:
        now = time.perf_counter()
        for occupation in watched:
            occupation.change_own(-1, now)


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
