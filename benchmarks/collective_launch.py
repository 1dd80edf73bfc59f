"""Starts the ranks of the benchmark of collectives and reads what rank 0 reports; none of them outlives the run.

A run ends with an error as soon as one rank does, or when no rank has reported anything for a while.
"""

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import collective_peers
from benchmarks.collective_rank import MARK

ROOT = Path(__file__).parents[1]
SILENCE = 120  # seconds without a line from rank 0 after which a run counts as stuck
GRACE = 3  # seconds in which a launcher may end its own ranks


class RunFailed(Exception):
    """A rank has ended, or nothing happens any more."""


def _end_with_parent() -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Run:
    """The processes of one run, as a context: outside of it there are none."""

    def __init__(self, peer: str, ranks: int, arguments: list[str], program: str = "benchmarks.collective_rank"):
        self._peer, self._ranks = peer, ranks
        self._rank_command = [sys.executable, "-m", program, "--peer", peer, *arguments]
        self._processes: list[subprocess.Popen] = []
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._lines: queue.Queue = queue.Queue()

    def __enter__(self) -> "Run":
        try:
            if self._peer.startswith("torch:"):
                self._start_torch()
            else:
                prefix = collective_peers.install_mpi(self._peer)
                command = collective_peers.mpi_command(self._peer, prefix, self._ranks)
                self._start([*command, *self._rank_command], collective_peers.mpi_environment(self._peer, prefix))
            threading.Thread(target=self._read, daemon=True).start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_torch(self) -> None:
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self._ranks):
            place = {"RANK": str(rank), "WORLD_SIZE": str(self._ranks), "LOCAL_RANK": str(rank)}
            place |= {"LOCAL_WORLD_SIZE": str(self._ranks), "MASTER_PORT": str(self._store.port)}
            self._start(self._rank_command, dict(os.environ) | {"MASTER_ADDR": "127.0.0.1", **place})

    def _start(self, command: list[str], environment: dict[str, str]) -> None:
        environment["OMP_NUM_THREADS"] = "1"
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # a process group to end, and no signal from the terminal behind our back
            preexec_fn=_end_with_parent,
        )
        self._processes.append(process)

    def _read(self) -> None:
        """Rank 0's, or the launcher's, which passes on what its ranks print."""
        for line in self._processes[0].stdout:
            self._lines.put(line.decode(errors="replace"))
        self._lines.put(None)

    def rows(self) -> Iterator[dict]:
        """What rank 0 reports. Raises RunFailed."""
        heard, open_ = time.monotonic(), True
        while True:
            try:
                line = self._lines.get(timeout=0.1)
            except queue.Empty:
                line = ""
            if line is None:
                open_ = False
            elif line.startswith(MARK):
                heard, row = time.monotonic(), json.loads(line.removeprefix(MARK))
                if row:
                    yield row
            states = [process.poll() for process in self._processes]
            failed = [rank for rank, state in enumerate(states) if state]
            if failed:
                raise RunFailed(self._describe(failed[0], states[failed[0]]))
            if not open_ and None not in states:
                return
            if time.monotonic() - heard > SILENCE:
                raise RunFailed(f"no rank has reported anything for {SILENCE} seconds\n{self._last_errors()}")

    def _describe(self, rank: int, state: int) -> str:
        how = f"ended with exit status {state}" if state > 0 else f"was ended by {signal.Signals(-state).name}"
        who = f"rank {rank}" if self._peer.startswith("torch:") else f"the launcher of {self._peer}"
        return f"{who} of {self._ranks} {how}\n{self._last_errors()}"

    def _last_errors(self) -> str:
        time.sleep(0.2)  # the others may be writing why
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-20:])

    def __exit__(self, *_) -> None:
        signals = [signal.SIGKILL] if self._peer.startswith("torch:") else [signal.SIGTERM, signal.SIGKILL]
        for number in signals:
            descendants = _descendants({process.pid for process in self._processes})
            for process in self._processes:
                if process.poll() is None:
                    _kill(process.pid, number)
            if number == signal.SIGKILL:
                for pid in descendants:  # a launcher's, which may have groups of their own
                    _kill(pid, number)
                break
            deadline = time.monotonic() + GRACE
            while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
                time.sleep(0.02)
        for process in self._processes:
            process.wait()
            process.stdout.close()
        self._errors.close()


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number) if os.getpgid(pid) == pid else os.kill(pid, number)


def _descendants(ancestors: set[int]) -> list[int]:
    """All processes below these, from /proc."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, grown = set(ancestors), True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in found and pid not in found}
        found, grown = found | more, bool(more)
    return sorted(found - ancestors)
