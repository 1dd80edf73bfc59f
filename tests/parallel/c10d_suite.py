"""Runs the tests of c10d that ship with torch (torch.testing._internal.distributed.distributed_test) on some backends.

    python tests/parallel/c10d_suite.py                         # all of them, on gloo and on sluice, and compare
    python tests/parallel/c10d_suite.py -k all_reduce --backends sluice --ranks 3 --json results.json

Torch's own way is a new interpreter for every rank of every test. Here a server imports torch once. It is told names of
tests, and forks for each a process that forks the ranks. What is left of a test after its time is killed, and the next
one isn't touched.
"""

import argparse
import collections
import contextlib
import gc
import importlib.util
import inspect
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
from pathlib import Path

_MODULE = "torch.testing._internal.distributed.distributed_test"
_MPI_ONLY = "test_all_to_all"  # so begin the names of the tests for CPU that torch switches on for MPI alone
_GRACE = 15  # seconds that torch's harness has to say which rank hung, after the time of a test is over
_BAD = ("failed", "timed out")

# Tests that gloo passes and sluice doesn't, and why. docs/parallel.md says more.
EXPECTED = {
    "test_ddp_logging_data_cpu": "torch logs every backend that isn't its own as 'custom'",
}


class Suite:
    """The server, as seen by who wants tests run. ``names``: of all tests."""

    def __init__(self, ranks=4, seconds=60, variables=None):
        environment = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"} | os.environ | (variables or {})
        environment |= {"DISTRIBUTED_TESTS_DEFAULT_TIMEOUT": str(seconds), "WORLD_SIZE": str(ranks)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.names = json.loads(self._process.stdout.readline())

    def run(self, name, backend="sluice"):
        """``{"outcome", "reason", "output", "seconds"}``; outcomes: passed, skipped, failed, timed out."""
        self._process.stdin.write(f"{backend} {name}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server of torch's tests ended in {name}, with status {self._process.wait()}")
        return json.loads(answer)

    def close(self):
        self._process.stdin.close()
        self._process.wait()


# ------------------------------------------------------------------------------------------------ in the server


class _StandsForGloo(str):
    """The name of a backend that is treated as gloo wherever the tests ask for that name."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other):
        return other == "gloo" or str.__eq__(self, other)

    def __ne__(self, other):
        return not self == other


def _load_tests():
    """The test class for each name: that which runs for gloo, or that for MPI where gloo has none."""
    import torch
    import torch.testing._internal.common_distributed as common

    common.TIMEOUT_OVERRIDE.clear()
    # These tests need three ranks, and it wants eight.
    common.skip_if_small_worldsize = lambda function: function
    if not torch.cuda.is_available():
        # Decided here instead of on every rank, when the group has been made.
        common.skip_if_no_gpu = unittest.skip("needs a GPU for each rank")
        common.skip_if_lt_x_gpu = lambda gpus, allow_cpu=False: unittest.skipIf(not allow_cpu, f"needs {gpus} GPUs")
    os.environ["INIT_METHOD"] = "file://"
    classes = {}
    for gate in ("gloo", "mpi"):
        # What is skipped is decided when the module is loaded.
        os.environ["BACKEND"] = gate
        specification = importlib.util.find_spec(_MODULE)
        loaded = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(loaded)
        loaded.Barrier.sync.__func__.__defaults__ = (None, 60)  # its 10 s are too few for ranks on a busy machine
        loaded.PROFILING_SUPPORTED_BACKENDS.append("sluice")
        loaded.SEND_RECV_PROFILING_SUPPORTED_BACKENDS.append("sluice")

        class TestDistBackend(loaded.TestDistBackend, loaded.DistributedTest._DistTestBase):
            module = loaded

            def setUp(self):
                super().setUp()
                self.module.INIT_METHOD = os.environ["INIT_METHOD"]  # a file of this test
                self._start_processes(torch.multiprocessing.get_context("fork").Process)

        loaded.instantiate_parametrized_tests(TestDistBackend)
        for name in unittest.defaultTestLoader.getTestCaseNames(TestDistBackend):
            if gate == "gloo" or (name.startswith(_MPI_ONLY) and "cuda" not in name):
                classes[name] = TestDistBackend
    return classes


def _open_monitored_barrier():
    """Makes torch.distributed.monitored_barrier(), which refuses every backend but gloo, take each group for gloo's."""
    from torch import distributed
    from torch.distributed import distributed_c10d

    original = inspect.unwrap(distributed_c10d.monitored_barrier)
    names = vars(distributed_c10d) | {"get_backend": lambda group: "gloo"}
    distributed.monitored_barrier = types.FunctionType(original.__code__, names, argdefs=original.__defaults__)


def _run_here(case, backend, path):
    """In the process of one test: leaves the result in a file."""
    if backend != "gloo":
        _open_monitored_barrier()
    sys.modules[_MODULE] = case.module  # where pickle looks for its classes
    os.environ["BACKEND"] = backend
    case.module.BACKEND = _StandsForGloo(backend)
    result = unittest.TestResult()
    unittest.TestSuite([case]).run(result)
    outcome, reason = "passed", ""
    if result.skipped:
        outcome, reason = "skipped", result.skipped[0][1]
    if result.failures or result.errors:
        reason = (result.failures + result.errors)[0][1]
        outcome = "timed out" if "terminated or timed out after" in reason else "failed"
    path.write_text(json.dumps({"outcome": outcome, "reason": reason}))


def _run_in_fork(case, backend, seconds, folder):
    path, output, start = Path(folder, "result"), Path(folder, "output"), time.monotonic()
    path.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        with open(output, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            _run_here(case, backend, path)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    while os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < start + seconds + _GRACE:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it may have left nothing behind
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    result = {"outcome": "timed out", "reason": "its process left no result"}
    if path.is_file() and path.stat().st_size:
        result = json.loads(path.read_text())
    result["seconds"] = round(time.monotonic() - start, 2)
    result["output"] = output.read_text(errors="replace")[-6000:] if result["outcome"] in _BAD else ""
    return result


def _run(test_class, name, backend, seconds, folder):
    method = getattr(test_class, name)
    if getattr(method, "__unittest_skip__", False):
        return {"outcome": "skipped", "reason": method.__unittest_skip_why__, "seconds": 0, "output": ""}
    return _run_in_fork(test_class(name), backend, seconds, folder)


def serve():
    import torch_sluice.parallel.backend  # noqa: F401, once instead of on every rank
    import torch_sluice_backend

    torch_sluice_backend.register()
    seconds = int(os.environ["DISTRIBUTED_TESTS_DEFAULT_TIMEOUT"])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    classes = _load_tests()
    gc.freeze()  # else collections in the forks would copy its pages
    print(json.dumps(sorted(classes)), file=answers, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            backend, name = line.split()
            print(json.dumps(_run(classes[name], name, backend, seconds, folder)), file=answers, flush=True)


# ------------------------------------------------------------------------------------------------ compare


def summarize(reason):
    """The line of a traceback that says what was wrong."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line or line.startswith("AssertionError")]
    own = [line for line in errors if "exited with error code" not in line]
    return (own or errors or lines or [""])[0][:300]


def _run_all(suites, names, options, results):
    """Each test on one backend after the other."""
    tests, lock = queue.SimpleQueue(), threading.Lock()
    for name in names:
        tests.put(name)

    def work(suite):
        while not tests.empty():
            with contextlib.suppress(queue.Empty):
                name = tests.get_nowait()
                for backend in options.backends:
                    record(name, backend, suite.run(name, backend))

    def record(name, backend, result):
        reason = f": {summarize(result['reason'])}" if result["outcome"] in _BAD else ""
        print(f"{backend:7} {result['outcome']:9} {result['seconds']:6.1f} s  {name}{reason}", flush=True)
        with lock:
            results.setdefault(backend, {})[name] = result
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))

    threads = [threading.Thread(target=work, args=(suite,)) for suite in suites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _compare(results):
    """Prints the summary. Returns the tests that sluice does not pass though gloo does, and that are not expected."""
    sluice, gloo = results.get("sluice", {}), results.get("gloo", {})
    groups = collections.defaultdict(list)
    for name in sorted(set(sluice) & set(gloo)):
        ours, theirs = (found[name]["outcome"] for found in (sluice, gloo))
        groups[f"{ours} on both" if ours == theirs else f"{ours} on sluice, {theirs} on gloo"].append(name)
    for title, names in groups.items():
        print(f"\n{len(names)} {title}")
        for name in names if title not in ("passed on both", "skipped on both") else ():
            known = f" ({EXPECTED[name]})" if name in EXPECTED else ""
            print(f"  {name}: {summarize(sluice[name]['reason'] or gloo[name]['reason'])}{known}")
    worse = {name for name in set(sluice) & set(gloo) if gloo[name]["outcome"] == "passed" != sluice[name]["outcome"]}
    return sorted(worse - set(EXPECTED))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-k", metavar="WORDS", help="only tests with one of these words, divided by commas, in the name"
    )
    parser.add_argument("--backends", default="gloo,sluice", type=lambda text: text.split(","))
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=100, help="time for one test")
    parser.add_argument("--jobs", type=int, default=1, help="tests at a time")
    parser.add_argument("--json", type=Path, help="file for the results; what it holds of other tests is kept")
    parser.add_argument("--resume", action="store_true", help="only tests that this file doesn't hold yet")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    results = json.loads(options.json.read_text()) if options.json and options.json.is_file() else {}
    suites = [Suite(options.ranks, options.seconds) for _ in range(options.jobs)]
    names = [name for name in suites[0].names if not options.k or any(word in name for word in options.k.split(","))]
    if options.resume:
        names = [name for name in names if any(name not in results.get(backend, {}) for backend in options.backends)]
    _run_all(suites, names, options, results)
    for suite in suites:
        suite.close()
    return 1 if _compare(results) else 0


if __name__ == "__main__":
    sys.exit(main())
