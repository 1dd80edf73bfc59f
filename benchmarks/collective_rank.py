"""One rank of the benchmark of collectives, started by collective_launch: times its engines in turn, round by round.

Every round of every engine begins when all ranks are there; its time is that of the slowest rank. Rank 0 prints a line
of JSON for each case; anything that goes wrong on any rank ends that rank, and by that the run.
"""

import argparse
import ctypes
import gc
import json
import os
import signal
import statistics
import time

import numpy as np

from benchmarks.collective_cases import MB, Buffers, Case, allocate
from benchmarks.collective_core import CoreEngine, load_core
from benchmarks.collective_engines import MpiEngine, TorchEngine, begin_torch

ROUND_SECONDS = 0.01  # what is faster is called so often in a row that it takes this long
MOST_CALLS = 500
LIFE_SECONDS = 5
MARK = "ROW "  # of lines for the launcher, among whatever else a library prints


def die_with_parent() -> None:
    """Whoever started this rank may be killed without a chance to end it."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Bench:
    """Times engines against each other; control is a group of its own that aligns the ranks and collects figures."""

    def __init__(self, control: CoreEngine, repeats: int):
        self._control, self._repeats, self._reported = control, repeats, time.monotonic()

    def report(self, **row) -> None:
        """Rank 0 prints it; an empty one is a sign of life."""
        now = time.monotonic()
        if self._control.rank == 0 and (row or now - self._reported > LIFE_SECONDS):
            print(MARK + json.dumps(row), flush=True)
            self._reported = now

    def _of_all_ranks(self, figures: list[float]) -> np.ndarray:
        own = np.array(figures, dtype=np.float64)
        everyones = np.empty(len(own) * self._control.size)
        self._control.all_gather(own, everyones)
        return everyones.reshape(self._control.size, len(own))

    def _time(self, call, calls: int) -> float:
        self._control.barrier()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begin) / calls

    def time_calls(self, calls: dict) -> dict[str, list[float]]:
        """name -> what to time; returns name -> seconds of the slowest rank in each round."""
        times = {}
        for name, call in calls.items():
            once = self._of_all_ranks([min(self._time(call, 1) for _ in range(5))]).max()
            times[name] = min(MOST_CALLS, max(1, round(ROUND_SECONDS / once)))
        names, own = list(calls), {name: [] for name in calls}
        gc.collect()
        gc.disable()
        for turn in range(self._repeats):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                own[name].append(self._time(calls[name], times[name]))
                self.report()
        gc.enable()
        return {name: self._of_all_ranks(own[name]).max(axis=0).tolist() for name in names}

    def time_case(self, case: Case, engines: list) -> dict[str, list[float]]:
        """Checks that every engine computes the case, then times them. An engine that can't do it is left out."""
        buffers, calls = Buffers(case, self._control.rank), {}
        for engine in engines:
            call = engine.prepare(case, buffers)
            buffers.fill()
            self._control.barrier()
            call()
            self._control.barrier()
            if getattr(engine, "sums_exactly", lambda _: True)(case):
                buffers.check(engine.name)
            calls[engine.name] = call
        seconds = self.time_calls(calls)
        for engine in engines:
            if isinstance(engine, CoreEngine):
                engine.raise_if_failed()
        return seconds

    def time_copy(self, alone: CoreEngine, bytes: int = 64 * MB) -> float:
        """Bytes a second that all ranks together read and write when each copies into memory that is there already.

        By the faster of numpy and a communicator of one rank, which copies past the caches.
        """
        source, target = allocate(bytes), allocate(bytes)
        copies = {"numpy": lambda: np.copyto(target, source), "core": lambda: alone.all_gather(source, target)}
        seconds = min(statistics.median(each) for each in self.time_calls(copies).values())
        return 2 * bytes * self._control.size / seconds


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, help="torch:BACKEND, torch:BACKEND,PEER, mpich or openmpi")
    parser.add_argument("--library", required=True)
    parser.add_argument("--cases", required=True, help="JSON list")
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--pin", action="store_true")
    parser.add_argument("--tuning", default="{}", help="JSON, of the measured group of the C core")
    return parser.parse_args()


def start_engines(options) -> tuple[CoreEngine, list]:
    """The control group, and the engines to compare."""
    library = load_core(options.library)
    if not options.peer.startswith("torch:"):
        mpi = MpiEngine(options.peer)
        place, exchange = (mpi.rank, mpi.size), mpi.exchange_text
        engines = [mpi]
    else:
        place = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        exchange = begin_torch(*place, int(os.environ["MASTER_PORT"]))
        backend, _, peer = options.peer.removeprefix("torch:").partition(",")
        engines = [TorchEngine(backend, "torch"), *([TorchEngine(peer, peer)] if peer else [])]
    control = CoreEngine(library, *place, exchange)
    own = CoreEngine(library, *place, _over(control), json.loads(options.tuning))
    own.name = "core"
    return control, [own, *engines]


def _over(control: CoreEngine):
    """An exchange of rank 0's text over a group that works already."""

    def exchange_text(text: bytes | None) -> bytes:
        own = np.frombuffer((text or b"").ljust(256, b"\0"), dtype=np.uint8).copy()
        everyones = np.empty(256 * control.size, dtype=np.uint8)
        control.all_gather(own, everyones)
        return everyones[:256].tobytes().rstrip(b"\0")

    return exchange_text


def main() -> None:
    die_with_parent()
    options = parse_options()
    place = os.environ.get("RANK") or os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK")
    if options.pin:  # before any library starts a thread
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {processors[int(place) % len(processors)]})
    control, engines = start_engines(options)
    bench = Bench(control, options.repeats)

    alone = CoreEngine(load_core(options.library), 0, 1, lambda text: text)
    bench.report(bandwidth=bench.time_copy(alone))
    for case in json.loads(options.cases):
        bench.report(case=case, seconds=bench.time_case(Case(**case), engines))
    control.barrier()
    if options.peer.startswith("torch:"):
        os._exit(0)  # what is left of a backend's threads must not hold up the end; MPI has to end by itself


if __name__ == "__main__":
    main()
