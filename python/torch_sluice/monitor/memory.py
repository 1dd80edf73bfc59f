"""Peak memory since a moment: of the process, or of torch's allocator on a CUDA device."""

import contextlib
import resource
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch

from torch_sluice._memory import release_memory

_STATUS = Path("/proc/self/status")
_meters: "weakref.WeakSet[MemoryMeter]" = weakref.WeakSet()


class MemoryMeter:
    """The peak of memory in use since the meter was made.

    Both sources keep one high-water mark for all who look. A new meter sets it back to what is in use, after the others
    have taken down what it stood at, so several meters do not disturb each other. Where it can't be set back (no
    Linux), what is in use when somebody looks counts until it exceeds the old mark.
    """

    def __init__(self, device: torch.device):
        self._device = device
        for meter in list(_meters):
            if meter._device == device:
                meter._note()
        if device.type != "cuda":
            release_memory()  # or what was freed before is taken again, unseen: it stayed resident
        self.before = self._current()
        self._highest = self.before
        self._stopped = False
        self._reset()
        self._stale = self._high_water() if device.type != "cuda" else 0
        if self._stale < 1.01 * self.before:  # pages come and go while one looks
            self._stale = 0
        _meters.add(self)

    @property
    def added(self) -> int:
        """Bytes by which the peak exceeds what was in use when the meter was made."""
        self._note()
        return self._highest - self.before

    @contextlib.contextmanager
    def excluding(self) -> Iterator[None]:
        """What is added in the block, and stays, is not counted."""
        start = self._current()
        yield
        self.before += max(self._current() - start, 0)
        self._highest = max(self._highest, self.before)

    def stop(self) -> None:
        """What comes after this is not counted."""
        self._note()
        self._stopped = True

    def _note(self) -> None:
        if self._stopped:
            return
        mark = self._high_water()
        if mark <= self._stale:  # the mark could not be set back, and is still that of an earlier time
            mark = self._current()
        self._highest = max(self._highest, mark)

    def _current(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return _status_bytes("VmRSS:") or peak_resident_bytes()

    def _high_water(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return peak_resident_bytes()

    def _reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident, since it began or a ``MemoryMeter`` was made."""
    # Not getrusage where there is another way: a new process inherits its parent's mark there.
    mark = _status_bytes("VmHWM:")
    if mark is None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        mark = peak if sys.platform == "darwin" else peak * 1024
    return mark


def _status_bytes(name: str) -> int | None:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
