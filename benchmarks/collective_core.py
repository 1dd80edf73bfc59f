"""The C core as an engine: its collectives through ctypes, every argument converted before the clock starts."""

import ctypes
import functools
from collections.abc import Callable

from benchmarks.collective_cases import ITEM_BYTES, Buffers, Case

TEXT_BYTES = 256
TIMEOUT = 60_000  # milliseconds
DTYPES = {"float32": 0, "bfloat16": 1}  # as ops/sluice/types.h numbers them
SUM = 0


class _Tuning(ctypes.Structure):
    _names = ("flat", "piece", "direct", "direct_send", "streaming", "buffer_streaming")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


class _Options(ctypes.Structure):
    _fields_ = [
        ("rank", ctypes.c_int),
        ("size", ctypes.c_int),
        ("names", ctypes.c_void_p),
        ("buffer_bytes", ctypes.c_size_t),
        ("tuning", ctypes.POINTER(_Tuning)),
    ]


def load_core(path: str) -> ctypes.CDLL:
    """The library; one that is linked against torch's needs that to be loaded before."""
    try:
        library = ctypes.CDLL(path)
    except OSError:
        import torch  # noqa: F401

        library = ctypes.CDLL(path)
    library.sl_last_error.restype = ctypes.c_char_p
    return library


class CoreEngine:
    """A communicator of the C core. exchange_text(text or None) gives every rank the text of rank 0."""

    name = "sluice"

    def __init__(self, library: ctypes.CDLL, rank: int, size: int, exchange_text: Callable, tuning: dict | None = None):
        self._library, self.rank, self.size = library, rank, size
        self._comm = ctypes.c_void_p()
        handle = ctypes.create_string_buffer(TEXT_BYTES)
        options = _Options(rank, size, None, 0, self._make_tuning(size, tuning))
        if rank == 0:
            self._call("sl_comm_create", ctypes.byref(options), ctypes.byref(self._comm), handle)
        text = exchange_text(handle.value if rank == 0 else None)
        if rank != 0:
            self._call("sl_comm_join", ctypes.byref(options), ctypes.c_char_p(text), ctypes.byref(self._comm))
        self._call("sl_comm_start", self._comm, ctypes.c_int64(TIMEOUT))

    def _make_tuning(self, size: int, wanted: dict | None):
        if not wanted:
            return None
        tuning = _Tuning()
        self._library.sl_comm_default_tuning(size, ctypes.byref(tuning))
        for name, value in wanted.items():
            setattr(tuning, name, value)
        return ctypes.pointer(tuning)

    def _call(self, function: str, *arguments) -> None:
        if getattr(self._library, function)(*arguments):
            raise RuntimeError(f"{function}: {self._library.sl_last_error().decode()}")

    def close(self) -> None:
        self._library.sl_comm_close(self._comm)

    def barrier(self) -> None:
        self._call("sl_comm_barrier", self._comm, ctypes.c_int64(TIMEOUT))

    def all_gather(self, own, everyones) -> None:
        """Of two numpy arrays, for the benchmark's own bookkeeping."""
        if self._bind_all_gather(own, everyones)():
            self.raise_if_failed()

    def prepare(self, case: Case, buffers: Buffers) -> Callable[[], None]:
        """What to time."""
        if case.op == "barrier":
            return self._bind("sl_comm_barrier")
        if case.op == "send_recv":
            return self._bind_round_trip(buffers)
        given, taken = buffers.input.ctypes.data, buffers.output.ctypes.data
        if case.op == "broadcast":
            return self._bind("sl_comm_broadcast", ctypes.c_void_p(given), ctypes.c_size_t(case.input_bytes), 0)
        reduction = (DTYPES[case.dtype], SUM, ctypes.c_double(0))
        if case.op == "all_reduce":
            buffer = ctypes.c_void_p(given)
            return self._bind("sl_comm_all_reduce", buffer, buffer, ctypes.c_size_t(case.elements), *reduction)
        if case.op == "all_gather":
            return self._bind_all_gather(buffers.input, buffers.output)
        part = case.input_bytes // self.size
        parts = self._split(given, part)
        if case.op == "all_to_all":
            sizes = self._sizes(part)
            return self._bind("sl_comm_all_to_all", parts, sizes, self._split(taken, part), sizes)
        counts = self._sizes(part // ITEM_BYTES[case.dtype])
        return self._bind("sl_comm_reduce_scatter", parts, counts, ctypes.c_void_p(taken), *reduction)

    def _split(self, address: int, part: int):
        return (ctypes.c_void_p * self.size)(*(address + rank * part for rank in range(self.size)))

    def _sizes(self, size: int):
        return (ctypes.c_size_t * self.size)(*[size] * self.size)

    def _bind(self, name: str, *arguments) -> Callable[[], None]:
        function, comm, timeout = getattr(self._library, name), self._comm, ctypes.c_int64(TIMEOUT)
        return functools.partial(function, comm, *arguments, timeout)

    def raise_if_failed(self) -> None:
        """What prepare() gives returns a status that nobody looks at while time is taken; a group stays broken."""
        self._call("sl_comm_state", self._comm)

    def _bind_all_gather(self, own, everyones) -> Callable[[], None]:
        outputs = self._split(everyones.ctypes.data, own.nbytes)
        return self._bind(
            "sl_comm_all_gather", ctypes.c_void_p(own.ctypes.data), ctypes.c_size_t(own.nbytes), outputs,
            self._sizes(own.nbytes),
        )  # fmt: skip

    def _bind_round_trip(self, buffers: Buffers) -> Callable[[], None]:
        partner = self.rank ^ 1
        if partner >= self.size:
            return lambda: None
        receive = self._bind_transfer("sl_comm_receive", buffers.output, partner)
        if self.rank < partner:
            there, back = self._bind_transfer("sl_comm_send", buffers.input, partner), receive
        else:
            there, back = receive, self._bind_transfer("sl_comm_send", buffers.output, partner)

        def call():
            there()
            back()

        return call

    def _bind_transfer(self, name: str, array, partner: int) -> Callable[[], None]:
        begin, transfer = getattr(self._library, name), ctypes.c_void_p()
        wait, free = self._library.sl_transfer_wait, self._library.sl_transfer_free
        timeout = ctypes.c_int64(TIMEOUT)
        arguments = (
            self._comm, ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), partner, ctypes.c_uint64(7),
            ctypes.byref(transfer),
        )  # fmt: skip

        def call():
            if begin(*arguments) or wait(transfer, timeout):
                raise RuntimeError(f"{name}: {self._library.sl_last_error().decode()}")
            free(transfer)

        return call
