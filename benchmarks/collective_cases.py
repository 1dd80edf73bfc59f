"""What the benchmark of collectives times: cases, their buffers, what must come out, and the least memory traffic.

``bytes`` of a case is each rank's input: the whole of what it reduces, gathers, spreads or sends. Nothing here imports
torch, so that a rank can be timed without it.
"""

import mmap
from dataclasses import asdict, dataclass

import numpy as np

KB, MB = 1 << 10, 1 << 20
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv", "barrier")


@dataclass(frozen=True)
class Case:
    """One row of the table. A send_recv is a round trip of ranks 0 and 1, 2 and 3, ... at the same time."""

    op: str
    bytes: int
    dtype: str
    ranks: int

    @property
    def elements(self) -> int:
        """Of each rank's input; a multiple of the ranks where each gets a part of it."""
        elements = self.bytes // ITEM_BYTES[self.dtype]
        parts = self.ranks if self.op in ("reduce_scatter", "all_to_all") else 1
        return elements // parts * parts

    @property
    def input_bytes(self) -> int:
        """The elements in bytes."""
        return self.elements * ITEM_BYTES[self.dtype]

    @property
    def output_bytes(self) -> int:
        """Of the buffer beside the input; 0 where the result replaces the input."""
        if self.op == "all_gather":
            return self.input_bytes * self.ranks
        if self.op == "reduce_scatter":
            return self.input_bytes // self.ranks
        return self.input_bytes if self.op in ("all_to_all", "send_recv") else 0

    @property
    def least_traffic(self) -> int:
        """Bytes that all ranks together must move: every input read once, every output written once.

        With n ranks and b bytes of input: all_reduce and all_to_all 2nb, all_gather nb + n²b, reduce_scatter nb + b,
        broadcast b + (n-1)b, a round trip of two ranks 4b.
        """
        n, b = self.ranks, self.input_bytes
        return {
            "all_reduce": 2 * n * b,
            "all_to_all": 2 * n * b,
            "all_gather": n * b + n * n * b,
            "reduce_scatter": n * b + b,
            "broadcast": n * b,
            "send_recv": n // 2 * 4 * b,
            "barrier": 0,
        }[self.op]

    def as_dict(self) -> dict:
        return asdict(self)


def default_cases(ranks: int, quick: bool) -> list[Case]:
    """The table's rows for one number of ranks; for a quick look nothing over 1 MB."""
    largest = MB if quick else 64 * MB
    sizes = sorted({min(size, largest) for size in (KB, 64 * KB, MB, 64 * MB)})
    cases = [Case("all_reduce", size, dtype, ranks) for dtype in ITEM_BYTES for size in sizes]
    for op in ("all_gather", "reduce_scatter", "all_to_all", "broadcast"):
        cases.append(Case(op, largest, "float32", ranks))
    return [*cases, Case("send_recv", min(16 * MB, largest), "float32", ranks), Case("barrier", 0, "float32", ranks)]


def select_cases(ranks: int, quick: bool, ops=None, sizes=None, dtypes=None) -> list[Case]:
    """The default cases, with other sizes if given, of the ops and dtypes that are wanted."""
    cases = default_cases(ranks, quick)
    if sizes:
        cases = [
            Case(op, size, dtype, ranks)
            for op in OPS
            for dtype in ITEM_BYTES
            for size in (sizes if op != "barrier" else [0])
            if dtype == "float32" or op == "all_reduce"
        ]
    return [case for case in cases if (not ops or case.op in ops) and (not dtypes or case.dtype in dtypes)]


def allocate(bytes: int) -> np.ndarray:
    """Memory that has been touched, on small pages as torch's own, at the start of a page."""
    array = np.frombuffer(mmap.mmap(-1, max(bytes, 1)), dtype=np.uint8)[:bytes]
    array[:] = 1
    return array


def _encode(values: list[int], dtype: str) -> np.ndarray:
    floats = np.array(values, dtype=np.float32)
    return floats if dtype == "float32" else (floats.view(np.uint32) >> 16).astype(np.uint16)


def _repeat(pattern: np.ndarray, elements: int) -> np.ndarray:
    return np.resize(pattern, elements).view(np.uint8)


def _values_of(rank: int) -> list[int]:
    """1, 2 and 3 in an order of the rank's own: sums of these are exact in every dtype, in any order of adding."""
    return [1 + (rank + place) % 3 for place in range(3)]


class Buffers:
    """A rank's memory for one case, which all engines share in turn."""

    def __init__(self, case: Case, rank: int):
        self._case, self._rank = case, rank
        self.input, self.output = allocate(case.input_bytes), allocate(case.output_bytes)

    def fill(self) -> None:
        """Writes the input that check() knows the result of."""
        self.input[:] = _repeat(_encode(_values_of(self._rank), self._case.dtype), self._case.elements)
        self.output[:] = 0

    def check(self, engine: str) -> None:
        """Raises RuntimeError if one call has not put there what it should have."""
        case, rank = self._case, self._rank
        partner = rank ^ 1
        sent = [_encode(_values_of(other), case.dtype) for other in range(case.ranks)]
        total = _encode([sum(_values_of(other)[i] for other in range(case.ranks)) for i in range(3)], case.dtype)
        got, part = self.output, case.input_bytes // case.ranks
        if case.op == "all_reduce":
            got, wanted = self.input, _repeat(total, case.elements)
        elif case.op == "broadcast":
            got, wanted = self.input, _repeat(sent[0], case.elements)
        elif case.op == "all_gather":
            wanted = np.concatenate([_repeat(each, case.elements) for each in sent])
        elif case.op == "reduce_scatter":
            wanted = _repeat(total, case.elements)[rank * part : (rank + 1) * part]
        elif case.op == "all_to_all":
            wanted = np.concatenate([_repeat(each, case.elements)[rank * part : (rank + 1) * part] for each in sent])
        elif case.op == "send_recv" and partner < case.ranks:
            wanted = _repeat(sent[rank & ~1], case.elements)
        else:
            return
        if not np.array_equal(got, wanted):
            raise RuntimeError(f"{engine} computes a wrong {case.op} of {case.bytes} bytes of {case.dtype}")
