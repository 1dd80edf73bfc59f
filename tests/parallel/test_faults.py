"""What ranks hear of each other's failures, through torch.distributed. The C core's own tests go further."""

import gc
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.rank_pool import Ranks


@pytest.fixture
def two():
    """A pool of two ranks that the test may break."""
    pool = Ranks(2)
    yield pool
    pool.close()


def process_number():
    return os.getpid()


def hear_of_a_loss(call, pid):
    before = time.monotonic()
    with pytest.raises(dist.DistBackendError, match=rf"rank 1 \(process {pid}\)"):
        call()
    return time.monotonic() - before


def all_reduce_alone(pid):
    return hear_of_a_loss(lambda: dist.all_reduce(torch.ones(100)), pid)


def wait_alone(pid):
    work = dist.all_reduce(torch.ones(100), async_op=True)
    future = work.get_future()
    hear_of_a_loss(work.wait, pid)
    assert not work.is_success()
    with pytest.raises(RuntimeError, match=f"process {pid}"):
        future.wait()
    with pytest.raises(RuntimeError, match=f"process {pid}"):
        work.get_future().wait()
    hear_of_a_loss(lambda: dist.barrier(), pid)  # from now on at once


def receive_alone(pid):
    return hear_of_a_loss(lambda: dist.recv(torch.ones(100), 1), pid)


def receive_without_waiting(pid):
    """Nobody is in a call of the group: the driver thread hears of it."""
    work = dist.irecv(torch.ones(100), 1)
    future = dist.irecv(torch.ones(100), 1).get_future()
    with pytest.raises(RuntimeError, match=rf"rank 1 \(process {pid}\) has ended"):
        future.wait()
    while not work.is_completed():
        time.sleep(0.01)
    assert not work.is_success()


LONELY = [all_reduce_alone, wait_alone, receive_alone, receive_without_waiting]


@pytest.mark.parametrize("alone", LONELY, ids=lambda alone: alone.__name__)
def test_a_rank_that_was_killed_is_named(two, alone):
    pid = two.run(process_number)[1]
    os.kill(pid, signal.SIGKILL)
    two.run(alone, pid, only=[0])


def disagree():
    rank = dist.get_rank()
    group = dist.new_group()
    with pytest.raises(dist.DistBackendError, match="(?s)all_reduce.*barrier|barrier.*all_reduce"):
        dist.all_reduce(torch.ones(3), group=group) if rank == 0 else dist.barrier(group)
    group = dist.new_group()
    with pytest.raises(dist.DistBackendError, match="(?s)12 bytes.*16 bytes|16 bytes.*12 bytes"):
        dist.all_reduce(torch.ones(3 + rank), group=group)
    group = dist.new_group()
    with pytest.raises(dist.DistBackendError, match="(?s)float32.*int32|int32.*float32"):
        dist.all_reduce(torch.ones(3, dtype=[torch.float32, torch.int32][rank]), group=group)
    dist.barrier()  # of another group, which has nothing to do with these


def test_ranks_that_disagree_hear_of_both_sides(two):
    two.run(disagree)


def call_in_another_order():
    rank, group = dist.get_rank(), dist.new_group()
    first, second = torch.ones(3), torch.ones(500)
    with pytest.raises(dist.DistBackendError, match="(?s)12 bytes.*2000 bytes|2000 bytes.*12 bytes"):
        for tensor in (first, second) if rank == 0 else (second, first):
            dist.all_reduce(tensor, group=group)
    group = dist.new_group()
    calls = [lambda: dist.all_reduce(first, group=group), lambda: dist.broadcast(first, 0, group)]
    with pytest.raises(dist.DistBackendError, match="(?s)all_reduce.*broadcast|broadcast.*all_reduce"):
        for call in calls if rank == 0 else reversed(calls):
            call()
        dist.barrier(group)
    group = dist.new_group()
    with pytest.raises(dist.DistBackendError, match="(?s)12 bytes.*2000 bytes|2000 bytes.*12 bytes"):
        works = [dist.all_reduce(t, group=group, async_op=True) for t in ((first, second) if rank else (second, first))]
        for work in works:
            work.wait()
    dist.barrier()


def test_another_order_of_calls_is_an_error_that_names_both_sides(two):
    two.run(call_in_another_order)


def come_too_late():
    group = dist.new_group(timeout=timedelta(seconds=0.3))
    if dist.get_rank() == 0:
        with pytest.raises(dist.DistBackendError, match=r" Timed out waiting 300ms.*rank 1 \(process \d+\)"):
            dist.barrier(group)
    else:
        time.sleep(1)
        with pytest.raises(dist.DistBackendError, match="timeout"):
            dist.barrier(group)


def test_a_rank_that_is_late_is_named(two):
    two.run(come_too_late)


def abort():
    group = dist.new_group()
    if dist.get_rank() == 0:
        time.sleep(0.2)
        group.abort()
    with pytest.raises(dist.DistBackendError, match="was aborted"):
        dist.barrier(group)
    dist.barrier()


def test_an_aborted_group_ends_the_calls_of_all(two):
    two.run(abort)


def end_with_work_in_flight():
    size = dist.get_world_size()
    group = dist.new_group()
    tensors = [torch.full((50_000,), float(i)) for i in range(10)]
    works = [dist.all_reduce(tensor, group=group, async_op=True) for tensor in tensors]
    seen = []
    works[-1].get_future().then(lambda future: seen.append(future.value()[0][0].item()))
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert seen == [9.0 * size]
    assert [work.is_success() for work in works] == [True] * 10
    assert tensors[9][-1].item() == 9.0 * size


def test_what_was_begun_is_done_before_a_group_ends(two):
    two.run(end_with_work_in_flight)


def use_after_the_end():
    group = dist.new_group()
    backend = group._get_backend(torch.device("cpu"))
    dist.destroy_process_group(group)
    with pytest.raises(RuntimeError, match="was shut down"):
        backend.barrier().wait()


def test_a_group_that_was_shut_down_says_so(two):
    two.run(use_after_the_end)


def fork_a_child():
    """A data loader's worker has a copy of the group, and ends without its parent being taken for lost."""
    tensor = torch.ones(2)
    dist.all_reduce(tensor, async_op=True).wait()
    child = os.fork()
    if child == 0:
        dist.destroy_process_group()
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    dist.all_reduce(tensor)
    assert tensor.tolist() == [4.0, 4.0]


def test_a_forked_child_is_no_rank(two):
    two.run(fork_a_child)


def descriptors_and_mappings():
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return len(list(Path("/proc/self/fd").iterdir())), maps.count("sluice"), len(list(Path("/dev/shm").iterdir()))


def make_and_drop_groups():
    for _ in range(5):
        group = dist.new_group()
        dist.all_reduce(torch.ones(1000), group=group)
        dist.all_reduce(torch.ones(1000), group=group, async_op=True).wait()
        dist.destroy_process_group(group)
    del group
    dist.barrier()
    return descriptors_and_mappings()


def test_groups_leave_nothing_behind(two):
    two.run(make_and_drop_groups)
    before = two.run(descriptors_and_mappings)
    after = two.run(make_and_drop_groups)
    assert [a[:2] for a in after] == [b[:2] for b in before]
    assert after[0][2] <= before[0][2]


def leave():
    dist.destroy_process_group()


def init_alone(path):
    store = dist.FileStore(path, 2)
    store.set_timeout(timedelta(seconds=0.5))
    with pytest.raises(dist.DistStoreError, match="a process group of 2 ranks was created, nothing came from rank 1"):
        dist.init_process_group("sluice", store=store, rank=0, world_size=2, timeout=timedelta(seconds=5))


def test_a_rank_that_never_comes_is_named(two, tmp_path):
    two.run(leave)
    two.run(init_alone, str(tmp_path / "store"), only=[0])
