"""Measures which algorithm serves which size on this machine: what ``torch-sluice tune-comm`` runs.

For each number of ranks, processes are started, and groups that differ in one of the five sizes of ``Tuning`` make the
same calls in turn. A threshold is put where it makes the calls of all sizes fastest together.
"""

import contextlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from torch_sluice.parallel import tuning
from torch_sluice.parallel.tuning import NEVER, Tuning

KB, MB = 1 << 10, 1 << 20
_PIECES = (128 * KB, 256 * KB, 512 * KB, MB, 2 * MB)
_TIMEOUT_SECONDS = 120
_LEAST_GAIN = 0.02  # of the time; less isn't worth leaving the default for


@dataclass(frozen=True)
class Question:
    """One of the six sizes, and how it is decided: calls of these sizes, with it and without it."""

    name: str
    sizes: tuple[int, ...]
    calls: tuple[str, ...]
    serves_small: bool = False  # it is used up to the threshold rather than from there on


QUESTIONS = (
    Question("piece", (16 * MB,), ("all_reduce", "all_gather")),
    Question("buffer_streaming", (32 * KB, 128 * KB, 512 * KB, 2 * MB), ("all_reduce",)),
    Question("flat", (KB, 4 * KB, 16 * KB, 64 * KB, 256 * KB, MB), ("all_reduce",), serves_small=True),
    Question("direct", (16 * KB, 128 * KB, MB, 8 * MB), ("all_gather", "broadcast")),
    Question("direct_send", (32 * KB, 256 * KB, 2 * MB, 16 * MB), ("send",)),
    Question("streaming", (256 * KB, MB, 4 * MB, 16 * MB), ("all_gather",)),
)


@dataclass(frozen=True)
class Measured:
    """What came of one question: seconds of a call by size, for each alternative; sizes in bytes."""

    ranks: int
    question: str
    chosen: int
    seconds: dict[str, dict[int, float]]


def choose_threshold(question: Question, seconds_without: dict[int, float], seconds_with: dict[int, float]) -> int:
    """The threshold that makes the sum of the logarithms of the times least.

    Returns one of the sizes; or, where it never pays, ``NEVER``, and 0 if it serves the small sizes.
    """
    sizes = sorted(seconds_with)
    gains = [math.log(seconds_without[size] / seconds_with[size]) for size in sizes]
    if question.serves_small:
        totals = {0: 0.0} | {size: sum(gains[: i + 1]) for i, size in enumerate(sizes)}
        none = 0
    else:
        totals = {NEVER: 0.0} | {size: sum(gains[i:]) for i, size in enumerate(sizes)}
        none = NEVER
    best = max(totals, key=totals.get)
    return best if totals[best] > _LEAST_GAIN else none


def measure(ranks: int, rounds: int, report: Callable[[Measured], None]) -> Tuning:
    """Starts so many processes of one thread each, and asks them all questions, in turn.

    Args:
        ranks: 2 or more.
        rounds: how often the alternatives take turns; the median counts.
        report: called with the result of each question as it comes in.

    Raises:
        RuntimeError: a process failed.
    """
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="sluice-tune-") as folder:
        processes = multiprocessing.start_processes(
            _run_rank, (ranks, rounds, folder, results), ranks, join=False, daemon=True, start_method="spawn"
        )
        try:
            answer = None
            while answer is None:
                while not results.empty():
                    item = results.get()
                    if isinstance(item, Tuning):
                        answer = item
                    else:
                        report(item)
                if answer is None and processes.join(timeout=0.1) and results.empty():
                    raise RuntimeError("the processes ended without a result")
            while not processes.join():
                pass
            return answer
        except multiprocessing.ProcessRaisedException as failure:
            raise RuntimeError(f"measuring with {ranks} ranks failed:\n{failure}") from failure
        finally:
            for process in processes.processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _run_rank(rank: int, ranks: int, rounds: int, folder: str, results) -> None:
    from torch_sluice.parallel.backend import load_library

    torch.set_num_threads(1)
    with contextlib.suppress(KeyboardInterrupt):
        store = distributed.FileStore(str(Path(folder) / "store"), ranks)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        rank_of_all = _Rank(load_library(), rank, ranks, rounds)
        try:
            for question in QUESTIONS:
                measured = rank_of_all.answer(question)
                if rank == 0:
                    results.put(measured)
            if rank == 0:
                results.put(rank_of_all.tuning)
        finally:
            distributed.destroy_process_group()


class _Rank:
    def __init__(self, library, rank: int, ranks: int, rounds: int):
        self._library, self._rank, self._ranks, self._rounds = library, rank, ranks, rounds
        library.sluice_c10d_clear_tunings()
        self.tuning = tuning.default_tuning(ranks)

    def answer(self, question: Question) -> Measured:
        alternatives = self._alternatives(question)
        groups = {name: self._make_group(candidate) for name, candidate in alternatives.items()}
        seconds = {name: {} for name in groups}
        for size in question.sizes:
            for name, value in self._time(groups, question.calls, size).items():
                seconds[name][size] = value
        for group in groups.values():
            distributed.destroy_process_group(group)
        if question.name == "piece":
            default = str(self.tuning.piece)
            totals = {name: sum(by_size.values()) for name, by_size in seconds.items()}
            best = min(totals, key=totals.get)
            chosen = int(best if totals[best] < totals[default] * (1 - _LEAST_GAIN) else default)
        else:
            chosen = choose_threshold(question, seconds["without"], seconds["with"])
        chosen = self._agree(chosen)
        self.tuning = replace(self.tuning, **{question.name: chosen})
        return Measured(self._ranks, question.name, chosen, seconds)

    def _alternatives(self, question: Question) -> dict[str, Tuning]:
        if question.name == "piece":
            return {str(piece): replace(self.tuning, piece=piece) for piece in _PIECES}
        ends = (0, NEVER) if question.serves_small else (NEVER, 0)
        return {
            name: replace(self.tuning, **{question.name: end})
            for name, end in zip(("without", "with"), ends, strict=True)
        }

    def _make_group(self, candidate: Tuning):
        tuning.set_tuning(self._library, self._ranks, candidate)
        return distributed.new_group(backend="sluice")

    def _agree(self, value: float) -> float:
        """Rank 0's."""
        box = [value]
        distributed.broadcast_object_list(box, 0)
        return box[0]

    def _time(self, groups: dict, calls: tuple[str, ...], size: int) -> dict[str, float]:
        """Median seconds of one call of each kind, by group."""
        operations = {
            name: [_operation(call, size, self._ranks, group) for call in calls] for name, group in groups.items()
        }
        for each in operations.values():  # so that memory is there
            for operation in each:
                operation()
        started = time.perf_counter()
        for each in operations.values():
            for operation in each:
                operation()
        elapsed = time.perf_counter() - started
        repeats = max(1, min(1000, round(self._agree(0.01 * len(groups) / max(elapsed, 1e-6)))))
        samples = {name: [] for name in groups}
        for _ in range(self._rounds):
            for name, group in groups.items():
                distributed.barrier(group)
                started = time.perf_counter()
                for _ in range(repeats):
                    for operation in operations[name]:
                        operation()
                samples[name].append((time.perf_counter() - started) / repeats)
        return {name: statistics.median(values) for name, values in samples.items()}


def _operation(call: str, size: int, ranks: int, group) -> Callable[[], object]:
    tensor = torch.ones(size // 4)
    if call == "all_reduce":
        tensor.zero_()
        return lambda: distributed.all_reduce(tensor, group=group)
    if call == "broadcast":
        return lambda: distributed.broadcast(tensor, 0, group=group)
    if call == "send":  # between neighbours in pairs
        rank = distributed.get_rank()
        if rank ^ 1 >= ranks:
            return lambda: None
        if rank % 2 == 0:
            return lambda: distributed.send(tensor, rank + 1, group=group)
        return lambda: distributed.recv(tensor, rank - 1, group=group)
    gathered = list(torch.empty(ranks, tensor.numel()))
    return lambda: distributed.all_gather(gathered, tensor, group=group)
