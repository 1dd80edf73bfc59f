"""A rank is killed while it trains: torchrun starts the job again, which goes on from its checkpoint."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support.mesh import write_text
from support.training import TINY

STEPS = 40
COMMAND = (
    *("train", "--mesh", "dp=2", f"--steps={STEPS}", "--save-every=3", "--micro-batches=8", *TINY),
    *("--backend", "sluice"),
)


@contextlib.contextmanager
def started(*command):
    """A process in a session of its own, of which nothing is left afterwards."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env=environment,
    )  # fmt: skip
    try:
        yield process
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def children(pid):
    """Pids of the processes that a process has started."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except OSError:
        return []


def descendants(pid):
    return [pid for child in children(pid) for pid in (child, *descendants(child))]


def rank_of(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        for entry in file.read().split(b"\0"):
            if entry.startswith(b"RANK="):
                return int(entry[5:])
    return None


def is_alive(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for_step(folder, step, process):
    """Until rank 0 has written the figures of this step."""
    while process.poll() is None:
        with contextlib.suppress(OSError):
            if any(f'"step": {step},' in line for line in (folder / "metrics.jsonl").read_text().splitlines()):
                return
        time.sleep(0.02)
    raise AssertionError(f"the job ended with {process.returncode}: {process.communicate()[0]}")


def losses_of(folder):
    results = json.loads((folder / "results.json").read_text())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, STEPS + 1))
    return [line["loss"] for line in steps if "loss" in line], results["heldout_loss"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    """Losses of the job that nothing happens to, whose ranks the command starts itself."""
    folder = tmp_path_factory.mktemp("run") / "uninterrupted"
    with started("torch_sluice.cli", *COMMAND, "--data", text, "--out", folder) as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return losses_of(folder)


def test_one_flag_runs_the_same_over_gloo(text, uninterrupted, tmp_path):
    """To the same losses: the sum of two ranks' gradients is the same in either order."""
    folder = tmp_path / "run"
    with started("torch_sluice.cli", *COMMAND, "--backend=gloo", "--data", text, "--out", folder) as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert json.loads((folder / "results.json").read_text())["layout"]["backend"] == "gloo"
    assert losses_of(folder) == uninterrupted


def test_a_job_whose_rank_was_killed_ends_with_the_losses_it_would_have_had(text, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    torchrun = ("torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1")
    torchrun = (*torchrun, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
    with started(*torchrun, "-m", "torch_sluice.cli", *COMMAND, "--data", text, "--out", folder) as process:
        wait_for_step(folder, 1, process)
        (victim,) = [pid for pid in descendants(process.pid) if rank_of(pid) == 1]
        wait_for_step(folder, 5, process)  # saved after 3
        os.kill(victim, signal.SIGKILL)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "Continuing after step" in output
    assert losses_of(folder) == uninterrupted


def test_ctrl_c_stops_all_ranks_and_the_run_goes_on_on_another_mesh(text, tmp_path):
    folder = tmp_path / "run"
    endless = ("train", "--mesh", "dp=2", "--steps=100000", *TINY, "--data", text, "--out", folder)
    for arguments, step in ((endless, 4), (("train", "--resume", folder, "--mesh", "tp=2"), None)):
        step = step or json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] + 3
        with started("torch_sluice.cli", *arguments) as process:
            wait_for_step(folder, step, process)
            processes = descendants(process.pid)
            assert len(processes) >= 2
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 130, output
            assert f"torch-sluice train --resume {folder}" in output
            assert "Traceback" not in output
            deadline = time.monotonic() + 10  # what Python starts beside them ends when its pipe is closed
            while any(map(is_alive, processes)) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not [pid for pid in processes if is_alive(pid)]
    assert "Continuing after step" in output
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, steps[-1]["step"] + 1))


def test_a_rank_that_dies_ends_the_job_and_is_named(text, tmp_path):
    folder = tmp_path / "run"
    with started("torch_sluice.cli", *COMMAND, "--data", text, "--out", folder) as process:
        wait_for_step(folder, 2, process)
        # All are forked from one, which is a child of the command.
        ranks = [pid for child in children(process.pid) for pid in sorted(children(child))]
        assert len(ranks) == 2
        victim = ranks[1]
        os.kill(victim, signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 2, output
        assert "rank 1 was killed by SIGKILL, and all ranks were ended" in output
        assert f"process {victim}" in output  # of the collective that waited for it
        assert not [pid for pid in ranks if is_alive(pid)]
