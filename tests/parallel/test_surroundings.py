"""Process groups where the machine gives little: a tiny /dev/shm or none, little memory; two jobs on one machine."""

import contextlib
import ctypes
import os
import re
import resource
import subprocess
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.rank_pool import Ranks

NEW_NAMESPACE, PRIVATE_AND_BELOW, NO_EXECUTION = 0x20000, 0x44000, 8  # CLONE_NEWNS, MS_PRIVATE | MS_REC, MS_NOEXEC


@pytest.fixture
def two():
    """A pool of two ranks that the test may break."""
    pool = Ranks(2)
    yield pool
    pool.close()


def may_mount():
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


def mount_over(folder, options=""):
    """This rank alone sees an empty folder there from now on."""
    system = ctypes.CDLL(None, use_errno=True)

    def check(result):
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(system.unshare(NEW_NAMESPACE))
    check(system.mount(None, b"/", None, ctypes.c_ulong(PRIVATE_AND_BELOW), None))
    check(system.mount(b"none", folder.encode(), b"tmpfs", ctypes.c_ulong(NO_EXECUTION), options.encode()))


def use_everything(options):
    mount_over("/dev/shm" if options else "/dev", options or "")
    if options:
        with pytest.raises(OSError, match="No space left"):
            Path("/dev/shm/full").write_bytes(bytes(1 << 20))
        Path("/dev/shm/full").unlink()
    else:
        assert not Path("/dev/shm").exists()
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group()
    tensor = torch.full((2_000_000,), float(rank + 1))
    dist.all_reduce(tensor, group=group)
    assert tensor.unique().tolist() == [3.0]
    outputs = [torch.zeros(500_000) for _ in range(size)]
    dist.all_gather(outputs, torch.full((500_000,), float(rank)), group=group)
    assert [output.unique().tolist() for output in outputs] == [[0.0], [1.0]]
    received = torch.zeros(1_000_000)
    works = [dist.isend(torch.full((1_000_000,), 5.0), 1 - rank, group), dist.irecv(received, 1 - rank, group)]
    for work in works:
        work.wait()
    assert received.unique().tolist() == [5.0]
    dist.destroy_process_group(group)
    return list(Path("/dev/shm").iterdir()) if options else []


@pytest.mark.skipif(not may_mount(), reason="making a mount namespace isn't allowed here")
@pytest.mark.parametrize("options", ["size=4k", None], ids=["tiny, noexec", "missing"])
def test_nothing_depends_on_dev_shm(two, options):
    assert two.run(use_everything, options) == [[], []]


def memories():
    """By inode: what this process has mapped of groups."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "memfd:sluice" in line}


def hide_the_first_rank(pid):
    """From the others, so that what it makes can't be opened by them, though all say that they are on one host."""
    if dist.get_rank():
        mount_over(f"/proc/{pid}")
    before, group = memories(), dist.new_group()
    found = memories() - before
    tensor = torch.full((3000,), dist.get_rank() + 1.0)
    dist.all_reduce(tensor, group=group)
    assert tensor.unique().tolist() == [6.0]
    dist.destroy_process_group(group)
    return found


@pytest.mark.skipif(not may_mount(), reason="making a mount namespace isn't allowed here")
def test_ranks_share_memory_if_they_can_open_it_whatever_they_say_of_their_host():
    pool = Ranks(3)
    try:
        first, *others = pool.run(hide_the_first_rank, pool.processes[0].pid)
        assert others[0] == others[1]
        assert len(others[0]) == 1
        assert not first & others[0]
    finally:
        pool.close()


@contextlib.contextmanager
def limit(kind, value):
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def make_a_group(kind, value, limited):
    """With the limit on one rank, all hear of it; without it, the next group can be made."""
    if kind == resource.RLIMIT_AS:
        value += 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    with limit(kind, value) if dist.get_rank() == limited else contextlib.nullcontext():
        try:
            dist.new_group()
            text = ""
        except (dist.DistBackendError, torch.OutOfMemoryError) as error:
            text = str(error)
    group = dist.new_group()
    tensor = torch.ones(10)
    dist.all_reduce(tensor, group=group)
    assert tensor.tolist() == [2.0] * 10
    return text


@pytest.mark.parametrize(
    ("kind", "limited", "expected"),
    [
        (resource.RLIMIT_AS, 0, r"mapping \d+ bytes of shared memory failed: Cannot allocate memory"),
        (resource.RLIMIT_AS, 1, r"rank 1: mapping \d+ bytes of shared memory failed: Cannot allocate memory"),
        (resource.RLIMIT_FSIZE, 0, r"\d+ bytes of shared memory for a group of 2 could not be had: File too large"),
    ],
    ids=["memory of the first", "memory of another", "size of files"],
)
def test_too_little_is_an_error_with_what_is_needed(two, kind, limited, expected):
    for text in two.run(make_a_group, kind, 1 << 20, limited):
        assert re.search(expected, text), text


def reduce_often(job):
    """Numbers that no other job has."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for step in range(100):
        tensor = torch.full((1 + 997 * step,), float(1000 * job + step + rank))
        dist.all_reduce(tensor)
        assert tensor.unique().tolist() == [float(size * (1000 * job + step) + sum(range(size)))]
        group = dist.new_group() if step % 25 == 0 else None
        dist.barrier(group)


def test_two_jobs_side_by_side_do_not_meet():
    jobs = [Ranks(2), Ranks(2)]
    problems = []

    def run(job):
        try:
            jobs[job].run(reduce_often, job)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=run, args=(job,)) for job in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for job in jobs:
        job.close()
    assert not problems, problems[0]
