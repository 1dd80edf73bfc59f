"""Runs the tests of c10d that ship with torch (torch.testing._internal.distributed.distributed_test) on some backends.

    python tests/parallel/c10d_suite.py                         # all of them, on gloo and on sluice, and compare
    python tests/parallel/c10d_suite.py -k all_reduce --backends sluice --ranks 3 --json results.json

Torch's own way is a new interpreter for every rank of every test. Here a server for each backend imports torch once. It is
told the names of tests, and forks for each a process that forks the ranks. What is left of a test after its time is
killed, and the next one isn't touched.
"""

import argparse
import collections
import contextlib
import gc
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

_MODULE = "torch.testing._internal.distributed.distributed_test"
_MPI_ONLY = "test_all_to_all"  # so begin the names of the tests for CPU that torch switches on for MPI alone
_GRACE = 15  # seconds that torch's harness has to say which rank hung, after the time of a test is over

# Tests that gloo passes and sluice doesn't, and why. docs/parallel.md says more.
EXPECTED = {}


class Suite:
    """The server of one backend, as seen by who wants tests run."""

    def __init__(self, backend="sluice", ranks=4, seconds=60, variables=None):
        environment = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"} | os.environ | (variables or {})
        environment |= {"DISTRIBUTED_TESTS_DEFAULT_TIMEOUT": str(seconds), "WORLD_SIZE": str(ranks)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", backend], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.names = json.loads(self._process.stdout.readline())

    def run(self, name):
        """``{"name", "outcome", "reason", "output", "seconds"}``; outcomes: passed, skipped, failed, timed out."""
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

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


def _load_tests(backend):
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
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        module.BACKEND = os.environ["BACKEND"] = backend
        if backend != "gloo":
            module.BACKEND = _StandsForGloo(backend)
            for supported in ("PROFILING_SUPPORTED_BACKENDS", "SEND_RECV_PROFILING_SUPPORTED_BACKENDS"):
                getattr(module, supported).append(backend)

        class TestDistBackend(module.TestDistBackend, module.DistributedTest._DistTestBase):
            def setUp(self, module=module):
                super().setUp()
                module.INIT_METHOD = os.environ["INIT_METHOD"]  # a file of this test
                self._start_processes(torch.multiprocessing.get_context("fork").Process)

        module.instantiate_parametrized_tests(TestDistBackend)
        for name in unittest.defaultTestLoader.getTestCaseNames(TestDistBackend):
            if gate == "gloo" or (name.startswith(_MPI_ONLY) and "cuda" not in name):
                classes[name] = TestDistBackend
    return classes


def _run_here(case, path):
    """In the process of one test: leaves the result in a file."""
    result = unittest.TestResult()
    unittest.TestSuite([case]).run(result)
    outcome, reason = "passed", ""
    if result.skipped:
        outcome, reason = "skipped", result.skipped[0][1]
    if result.failures or result.errors:
        reason = (result.failures + result.errors)[0][1]
        outcome = "timed out" if "terminated or timed out after" in reason else "failed"
    path.write_text(json.dumps({"outcome": outcome, "reason": reason}))


def _run_in_fork(case, seconds, folder):
    path, output, start = Path(folder, "result"), Path(folder, "output"), time.monotonic()
    path.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        with open(output, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            _run_here(case, path)
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
    result["output"] = (
        output.read_text(errors="replace")[-6000:] if result["outcome"] in ("failed", "timed out") else ""
    )
    return result


def serve(backend):
    import torch_sluice_backend

    torch_sluice_backend.register()
    seconds = int(os.environ["DISTRIBUTED_TESTS_DEFAULT_TIMEOUT"])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    classes = _load_tests(backend)
    gc.freeze()  # else collections in the forks would copy its pages
    print(json.dumps(sorted(classes)), file=answers, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            name = line.strip()
            result = _run_in_fork(classes[name](name), seconds, folder)
            print(json.dumps({"name": name} | result), file=answers, flush=True)


# ------------------------------------------------------------------------------------------------ compare


def summarize(reason):
    """The line of a traceback that says what was wrong."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line or line.startswith("AssertionError")]
    own = [line for line in errors if "exited with error code" not in line]
    return (own or errors or lines or [""])[0][:300]


def _run_all(backend, options):
    results, names, lock = {}, queue.SimpleQueue(), threading.Lock()

    def work():
        suite = Suite(backend, options.ranks, options.seconds)
        with lock:
            if not work.filled:
                work.filled = True
                for name in suite.names:
                    if not options.k or any(word in name for word in options.k.split(",")):
                        names.put(name)
        while True:
            try:
                name = names.get_nowait()
            except queue.Empty:
                break
            result = results[name] = suite.run(name)
            line = f"{backend:7} {result['outcome']:9} {result['seconds']:6.1f} s  {name}"
            if result["outcome"] in ("failed", "timed out"):
                line += f": {summarize(result['reason'])}"
            print(line, flush=True)
        suite.close()

    work.filled = False
    threads = [threading.Thread(target=work) for _ in range(options.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _compare(results):
    """Prints the summary; the tests that only sluice doesn't pass, without those of which it is known."""
    sluice, gloo = results.get("sluice", {}), results.get("gloo", {})
    groups = collections.defaultdict(list)
    for name in sorted(set(sluice) & set(gloo)):
        ours, theirs = (found[name]["outcome"] for found in (sluice, gloo))
        if ours == theirs:
            groups[f"{ours} on both"].append(name)
        else:
            groups[f"{ours} on sluice, {theirs} on gloo"].append(name)
    unexpected = []
    for title, names in groups.items():
        print(f"\n{len(names)} {title}")
        for name in names:
            if title in ("passed on both", "skipped on both"):
                continue
            print(f"  {name}: {summarize(sluice[name]['reason'] or gloo[name]['reason'])}")
            if gloo[name]["outcome"] == "passed" and name not in EXPECTED:
                unexpected.append(name)
    for name in sorted(set(EXPECTED) & set(sluice)):
        print(f"known: {name}: {EXPECTED[name]}" + (", but it passed" if sluice[name]["outcome"] == "passed" else ""))
    return unexpected


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-k", metavar="WORDS", help="only tests with one of these words, divided by commas, in the name"
    )
    parser.add_argument("--backends", default="gloo,sluice")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=100, help="time for one test")
    parser.add_argument("--jobs", type=int, default=1, help="tests at a time")
    parser.add_argument("--json", type=Path, help="file for the results; what it holds of other tests is kept")
    parser.add_argument("--serve", metavar="BACKEND", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve)
    results = {}
    if options.json and options.json.is_file():
        results = json.loads(options.json.read_text())
    for backend in options.backends.split(","):
        results.setdefault(backend, {}).update(_run_all(backend, options))
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    return 1 if _compare(results) else 0


if __name__ == "__main__":
    sys.exit(main())
