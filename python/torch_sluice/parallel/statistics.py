"""What this process has communicated, and the share of it that went on while it computed.

The counters are kept by the backend "sluice", over all of its groups; torch_bindings/c10d/statistics.h defines them.
"""

import ctypes
from dataclasses import dataclass

from torch_sluice.parallel import backend


@dataclass(frozen=True)
class CommunicationStatistics:
    """Counters of this process since it began; the difference of two is what came in between.

    Attributes:
        collectives: collectives that ended.
        bytes: of the tensors that this rank gave to them.
        busy_seconds: time that collectives ran, waiting for other ranks included, added up over those that ran at once.
        waited_seconds: the part of it during which the computation stood still: a thread was in a synchronous
            collective or in ``wait()``, or the backward pass had computed everything and collectives that it had
            launched were left, for which DDP waits then.
        sends, sent_bytes: point-to-point messages that this rank sent.

    Collectives that are left to Gloo or NCCL as a whole, as all are with CUDA tensors, are not in it.
    """

    collectives: int = 0
    bytes: int = 0
    busy_seconds: float = 0.0
    waited_seconds: float = 0.0
    sends: int = 0
    sent_bytes: int = 0

    def __sub__(self, earlier: "CommunicationStatistics") -> "CommunicationStatistics":
        pairs = zip(vars(self).values(), vars(earlier).values(), strict=True)
        return CommunicationStatistics(*(now - then for now, then in pairs))

    def __add__(self, other: "CommunicationStatistics") -> "CommunicationStatistics":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return CommunicationStatistics(*(one + another for one, another in pairs))

    @property
    def overlapped_share(self) -> float | None:
        """1 - waited_seconds / busy_seconds: 1 where all communication went on beside computation, 0 where it was all
        waited for, None where there was none."""
        return 1 - self.waited_seconds / self.busy_seconds if self.busy_seconds > 0 else None


_NOTHING = CommunicationStatistics()


def communication_statistics() -> CommunicationStatistics:
    """The counters now; all are 0 in a process that has made no group of the backend "sluice"."""
    library = backend.loaded_library()
    if library is None:
        return _NOTHING
    numbers = (ctypes.c_uint64 * 6)()
    library.sluice_c10d_read_statistics(numbers)
    collectives, size, busy, waited, sends, sent = numbers
    return CommunicationStatistics(collectives, size, busy / 1e9, waited / 1e9, sends, sent)


def mark_background_thread() -> None:
    """Says that the calling thread exists to call collectives: while it waits, nothing stands still."""
    if (library := backend.loaded_library()) is not None:
        library.sluice_c10d_set_background_thread()


def note_launch() -> bool:
    """Says that a backward pass, if one is calling, has handed a background thread something to reduce. Where this
    returns True, ``note_landing`` has to follow when that is done."""
    library = backend.loaded_library()
    return library is not None and bool(library.sluice_c10d_launch())


def note_landing() -> None:
    backend.loaded_library().sluice_c10d_land()
