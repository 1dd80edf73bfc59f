"""Processes that stand as the ranks of a job, kept from test to test: to start them takes longer than most tests do.

``Ranks(4).run(function, *arguments)`` calls a function of a test file on every rank, inside a process group, and
returns what it returned there. Ranks are forked from a server that has imported torch, so that a new pool is cheap.
"""

import importlib.util
import inspect
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from functools import cache
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_preloaded = ["torch", "torch.distributed.tensor", "torch_sluice", "support.rank_pool"]
_CONTEXT.set_forkserver_preload(_preloaded)


def preload(*modules):
    """Has the server import these, too, which every rank would have to by itself otherwise. For test files, while they
    are loaded: later the server runs."""
    _preloaded.extend(module for module in modules if module not in _preloaded)
    _CONTEXT.set_forkserver_preload(_preloaded)


class RankFailed(AssertionError):
    """A test function failed on some rank; the text holds the traceback of each."""


class Ranks:
    """``size`` processes in one process group. ``hosts``: a letter for each rank, where they stand on several hosts."""

    def __init__(self, size, backend="sluice", hosts=None, timeout=60):
        self.size, self.processes, self.pipes = size, [], []
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        for rank in range(size):
            ours, theirs = _CONTEXT.Pipe()
            variables = {"SLUICE_COMM_HOST": hosts[rank]} if hosts else {}
            arguments = (theirs, rank, size, store, backend, variables, timeout)
            process = _CONTEXT.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    @property
    def alive(self):
        return all(process.is_alive() for process in self.processes)

    def send(self, rank, function, *arguments):
        """Has one rank call it; ``receive`` waits for what it returns."""
        self.pipes[rank].send((inspect.getsourcefile(function), function.__name__, arguments))

    def run(self, function, *arguments, seconds=60, only=None):
        """The results by rank. ``only``: the ranks that call it; None stands for what the others return."""
        for rank in range(self.size) if only is None else only:
            self.send(rank, function, *arguments)
        return self.receive(seconds, only)

    def receive(self, seconds=60, only=None):
        """What these ranks return, or all; fails as soon as one of them does."""
        ranks = range(self.size) if only is None else only
        results, failures = [None] * self.size, []
        waiting = {self.pipes[rank]: rank for rank in ranks}
        deadline = time.monotonic() + seconds
        while waiting:
            ready = multiprocessing.connection.wait(waiting, max(0, deadline - time.monotonic()))
            if not ready:
                failures += [f"rank {rank}: nothing came from it in time" for rank in waiting.values()]
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    failed, results[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    failed, results[rank] = True, "its process ended"
                if failed:
                    failures.append(f"rank {rank}: {results[rank]}")
                    deadline = min(deadline, time.monotonic() + 5)  # the others may be waiting for this one
        if failures:
            self.close()
            raise RankFailed("\n".join(failures))
        return results

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


class Pools:
    """A pool of each kind, made when it is first asked for and again when it is lost; ``options`` are of ``Ranks``."""

    def __init__(self, **options):
        self._pools, self._options = {}, options

    def __call__(self, size, hosts=None):
        pool = self._pools.get((size, hosts))
        if pool is None or not pool.alive:
            pool = self._pools[size, hosts] = Ranks(size, hosts=hosts, **self._options)
        return pool

    def close(self):
        for pool in self._pools.values():
            pool.close()


@cache
def _module(path):
    name = f"ranks_{Path(path).stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _serve(pipe, rank, size, store, backend, variables, timeout):
    os.environ.update(variables, RANK=str(rank), WORLD_SIZE=str(size))
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    problem = None
    try:
        distributed.init_process_group(
            backend, store=distributed.FileStore(store, size), rank=rank, world_size=size,
            timeout=timedelta(seconds=timeout),
        )  # fmt: skip
    except Exception:
        problem = traceback.format_exc()
    while True:
        try:
            path, name, arguments = pipe.recv()
        except (EOFError, ConnectionResetError):
            break
        try:
            if problem:
                raise RuntimeError(problem)
            result = (False, getattr(_module(path), name)(*arguments))
        except Exception:
            result = (True, traceback.format_exc())
        pipe.send(result)
    if distributed.is_initialized():
        distributed.destroy_process_group()
