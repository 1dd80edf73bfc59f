"""A rank that is killed, or stopped, in the middle of each collective: what the others hear, and what is left."""

import gc
import os
import re
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.rank_pool import Ranks

VICTIM = 1
AT_ONCE = 10  # seconds: far from the timeout of a minute, on any machine; a quiet one takes a tenth of a second
ELEMENTS = 3 << 20  # of float32; several pieces, so that nearly all of the time passes in the middle of a collective


@pytest.fixture
def three():
    """A pool of three ranks that the test may break."""
    pool = Ranks(3)
    yield pool
    pool.close()


def whole():
    return torch.ones(ELEMENTS)


def parts():
    return list(torch.ones(3 * ELEMENTS).chunk(3))


def at(root, tensors):
    return tensors() if dist.get_rank() == root else None


def send_or_receive(group):
    """From the victim to the one, and from the other to the victim."""
    rank = dist.get_rank()
    if rank != 2:
        (dist.send if rank == VICTIM else dist.recv)(whole(), 1 - rank, group)
    if rank != 0:
        (dist.send if rank == 2 else dist.recv)(whole(), 3 - rank, group)


def receive_from_any_and_answer(group):
    """The one that answers waits for both of the others."""
    if dist.get_rank() == 0:
        for _ in range(2):
            dist.recv(whole(), group=group)
        for rank in (1, 2):
            dist.send(torch.ones(1), rank, group)
    else:
        dist.send(whole(), 0, group)
        dist.recv(torch.ones(1), 0, group)


# What errors call it, where it is something else.
SPOKEN = dict.fromkeys(("send", "recv from any", "monitored_barrier"), "(?:send|recv)")

# The victim is the root where others wait for the root alone, and no root where the root waits for the others.
CALLS = {
    "broadcast": lambda group: dist.broadcast(whole(), VICTIM, group),
    "all_reduce": lambda group: dist.all_reduce(whole(), group=group),
    "reduce": lambda group: dist.reduce(whole(), 0, group=group),
    "all_gather": lambda group: dist.all_gather(parts(), whole(), group),
    "gather": lambda group: dist.gather(whole(), at(0, parts), 0, group),
    "scatter": lambda group: dist.scatter(whole(), at(VICTIM, parts), VICTIM, group),
    "reduce_scatter": lambda group: dist.reduce_scatter(whole(), parts(), group=group),
    "all_to_all": lambda group: dist.all_to_all(parts(), parts(), group),
    "barrier": lambda group: dist.barrier(group),
    "send": send_or_receive,
    "recv from any": receive_from_any_and_answer,
    "monitored_barrier": lambda group: group.monitored_barrier(),
}


def call_until_it_fails(name, seconds, marker, number):
    """When it failed and with which words; the victim sends itself the signal while it is in the calls."""
    group = dist.new_group()
    dist.barrier(group)
    group.set_timeout(timedelta(seconds=seconds))
    if dist.get_rank() == VICTIM:

        def strike():
            time.sleep(0.1)
            Path(marker).write_text(repr(time.monotonic()))
            os.kill(os.getpid(), number)

        threading.Thread(target=strike).start()
    try:
        while True:
            CALLS[name](group)
    except RuntimeError as error:  # DistBackendError, but from monitored_barrier
        return time.monotonic(), str(error)


def strike(pool, path, name, seconds, number):
    """By surviving rank: how long after the signal it heard of it, and how."""
    for rank in (0, 2, VICTIM):
        pool.send(rank, call_until_it_fails, name, seconds, str(path), number)
    heard = pool.receive(only=[0, 2], seconds=200)
    return [(heard[rank][0] - float(path.read_text()), heard[rank][1]) for rank in (0, 2)]


@pytest.mark.parametrize("name", CALLS)
def test_a_rank_killed_in_the_middle_is_named_at_once(three, tmp_path, name):
    pid = three.processes[VICTIM].pid
    for seconds, text in strike(three, tmp_path / "time", name, 60, signal.SIGKILL):
        print(f"{name}: after {1000 * seconds:.0f} ms: {text.splitlines()[0]}")
        assert re.search(rf"rank 1 \(process {pid}\) has ended; it was awaited for {SPOKEN.get(name, name)}\b", text), (
            text
        )
        assert seconds < AT_ONCE


@pytest.mark.parametrize("name", [name for name in CALLS if name != "monitored_barrier"])  # which names the absent
def test_a_stopped_rank_is_named_at_the_timeout(ranks, tmp_path, name):
    pool = ranks(3)
    pid = pool.processes[VICTIM].pid
    try:
        for seconds, text in strike(pool, tmp_path / "time", name, 1, signal.SIGSTOP):
            assert re.search(rf"Timed out waiting 1000ms: .*rank 1 \(process {pid}\).* is stopped", text), text
            assert seconds > 0.5
    finally:
        os.kill(pid, signal.SIGCONT)
    assert "is stopped" in pool.receive(only=[VICTIM])[VICTIM][1]  # it hears of it too, once it goes on


def count_what_is_held():
    gc.collect()
    names = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    mappings = Path("/proc/self/maps").read_text().count("memfd:sluice")
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return (
        sum("memfd:sluice" in name for name in names),
        mappings,
        len(list(Path("/proc/self/task").iterdir())),
        children,
    )


def leave():
    before = count_what_is_held()
    dist.destroy_process_group()
    return before, count_what_is_held()


@pytest.mark.parametrize("end", ["success", "error", "kill one", "kill all"])
def test_nothing_is_left(three, tmp_path, end):
    shared = sorted(Path("/dev/shm").iterdir())
    pids = [process.pid for process in three.processes]
    if end == "error":
        three.run(disagree)
    if end == "kill one":
        strike(three, tmp_path / "time", "all_reduce", 60, signal.SIGKILL)
    if end == "kill all":
        for rank in range(3):
            three.send(rank, call_until_it_fails, "all_gather", 60, str(tmp_path / "time"), signal.SIGKILL)
        while not (tmp_path / "time").exists():
            time.sleep(0.01)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    else:
        survivors = [0, 2] if end == "kill one" else [0, 1, 2]
        for rank, held in enumerate(three.run(leave, only=survivors)):
            if held:
                before, after = held
                assert before[0] >= 1, (rank, before)
                assert after[:2] == (0, 0), (rank, after)
                assert before[3] == after[3] == [], "a rank has a child process"
    three.close()
    assert sorted(Path("/dev/shm").iterdir()) == shared
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "zombies, or processes that go on"


def disagree():
    group = dist.new_group()
    with pytest.raises(dist.DistBackendError):
        dist.all_reduce(torch.ones(3 + dist.get_rank()), group=group)
