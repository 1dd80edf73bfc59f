"""send, recv, their asynchronous forms, and the barrier made of them."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

COUNTS = [0, 1, 1000, 500_000]


def send_and_receive():
    rank = dist.get_rank()
    for count in COUNTS:
        for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex64):
            data = (torch.arange(count) % 50).to(dtype)
            tensor = torch.zeros(count, dtype=dtype)
            if rank == 0:
                dist.send(data, 1)
                assert dist.recv(tensor, 1) == 1
            else:
                assert dist.recv(tensor, 0) == 0
                dist.send(data, 0)
            assert tensor.equal(data), (count, dtype)


def match_tags_and_order():
    rank = dist.get_rank()
    if rank == 0:
        works = [dist.isend(torch.full((3,), float(i)), 1, tag=i % 2) for i in range(6)]
    else:
        odd, even = [torch.zeros(3) for _ in range(3)], [torch.zeros(3) for _ in range(3)]
        works = [dist.irecv(tensor, 0, tag=1) for tensor in odd]  # the other way round
        works += [dist.irecv(tensor, 0, tag=0) for tensor in even]
    for work in works:
        work.wait()
    if rank == 1:
        assert [t[0].item() for t in even + odd] == [0, 2, 4, 1, 3, 5]


def receive_from_any():
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        seen = {}
        for _ in range(size - 1):
            tensor = torch.zeros(4)
            work = dist.irecv(tensor)
            work.wait()
            seen[work._source_rank()] = tensor.tolist()
        assert seen == {r: [float(r)] * 4 for r in range(1, size)}
        dist.barrier()
        assert dist.recv(torch.zeros(2), src=None) in range(1, size)
    else:
        dist.send(torch.full((4,), float(rank)), 0)
        dist.barrier()  # until then a second message of rank 1 could meet the receive meant for rank 2
        if rank == 1:
            dist.send(torch.zeros(2), 0)


def receive_from_any_by_tag():
    """A message with another tag stays for the receive that wants it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank:
        works = [dist.isend(torch.full((50_000,), float(10 * tag + rank)), 0, tag=tag) for tag in (3, 5)]
        for work in works:
            work.wait()
        return
    for tag in (5, 3):
        seen = {}
        for _ in range(size - 1):
            tensor = torch.zeros(50_000)
            sender = dist.recv(tensor, tag=tag)
            seen[sender] = tensor.unique().tolist()
        assert seen == {r: [10.0 * tag + r] for r in range(1, size)}


def transfer_without_waiting():
    """Nobody waits, and collectives go on meanwhile: the driver thread does it."""
    rank = dist.get_rank()
    big = torch.full((2_000_000,), float(rank + 1))
    received = torch.zeros(2_000_000)
    works = [dist.isend(big, 1 - rank), dist.irecv(received, 1 - rank)]
    for _ in range(20):
        dist.all_reduce(torch.ones(10))
    deadline = time.monotonic() + 30
    while not all(work.is_completed() for work in works) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert all(work.is_completed() and work.is_success() for work in works)
    assert received[[0, -1]].tolist() == [2.0 - rank] * 2
    futures = [dist.isend(big, 1 - rank).get_future(), dist.irecv(received, 1 - rank).get_future()]
    assert futures[1].then(lambda future: future.value()[0][0].item()).wait() == 2.0 - rank
    futures[0].wait()


def forget_the_work():
    rank = dist.get_rank()
    if rank == 0:
        dist.isend(torch.arange(1_000_000), 1)  # nobody holds the Work
        dist.barrier()
    else:
        tensor = torch.zeros(1_000_000, dtype=torch.int64)
        work = dist.irecv(tensor, 0)
        dist.barrier()
        work.wait()
        assert tensor[-1] == 999_999


def transfer_strided():
    rank = dist.get_rank()
    if rank == 0:
        dist.send(torch.arange(12.0).view(3, 4).t(), 1)
    else:
        tensor = torch.zeros(3, 4).t()
        dist.recv(tensor, 0)
        assert tensor.equal(torch.arange(12.0).view(3, 4).t())


def batch():
    rank, size = dist.get_rank(), dist.get_world_size()
    received = torch.zeros(7)
    operations = [
        dist.P2POp(dist.irecv, received, (rank - 1) % size),
        dist.P2POp(dist.isend, torch.full((7,), float(rank)), (rank + 1) % size),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert received.tolist() == [float((rank - 1) % size)] * 7


@pytest.mark.parametrize(
    "check", [send_and_receive, match_tags_and_order, transfer_without_waiting, forget_the_work, transfer_strided]
)
def test_between_two(ranks, check):
    ranks(2).run(check)


@pytest.mark.parametrize("check", [receive_from_any, receive_from_any_by_tag, batch])
def test_between_three(ranks, check):
    ranks(3).run(check)


def refuse_transfers():
    rank = dist.get_rank()
    group = dist.group.WORLD
    with pytest.raises(RuntimeError, match=rf"send to rank {rank} of the group, expected another rank"):
        group.send([torch.zeros(1)], rank, 0)
    with pytest.raises(RuntimeError, match="recv from rank 7 of the group, expected another rank"):
        group.recv([torch.zeros(1)], 7, 0)
    with pytest.raises(RuntimeError, match="tag is -1, expected a nonnegative number"):
        group.send([torch.zeros(1)], 1 - rank, -1)
    dist.barrier()


def test_bad_transfers_are_refused_by_name(ranks):
    ranks(2).run(refuse_transfers)


def mismatch():
    group = dist.new_group(timeout=timedelta(seconds=20))
    with pytest.raises(dist.DistBackendError, match="(?s)bytes"):
        if dist.get_rank() == 0:
            dist.isend(torch.zeros(300_000), 1, group=group).wait()
        else:
            dist.recv(torch.zeros(200_000), 0, group=group)


def test_sizes_that_differ_are_an_error_on_both_sides(ranks):
    ranks(2).run(mismatch)


def wait_with_a_timeout():
    """It counts as that of the group: both sides hear of it."""
    group = dist.new_group()
    if dist.get_rank() == 0:
        work = dist.irecv(torch.zeros(10), 1, group)
        with pytest.raises(dist.DistBackendError, match="Timed out waiting 100ms: timeout in recv of 40 bytes from"):
            work.wait(timedelta(seconds=0.1))
        assert work.is_completed()
        assert not work.is_success()
        dist.barrier()
    else:
        dist.barrier()
        with pytest.raises(dist.DistBackendError, match="timeout in recv of 40 bytes"):
            dist.send(torch.zeros(10), 0, group)


def test_a_transfer_is_waited_for_with_a_timeout(ranks):
    ranks(2).run(wait_with_a_timeout)


def monitor(absent, wait_all_ranks):
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group()
    for _ in range(2):
        group.monitored_barrier(timedelta(seconds=30), wait_all_ranks=wait_all_ranks)
    if rank == 0:
        text = ", ".join(map(str, absent if wait_all_ranks else absent[:1]))
        with pytest.raises(RuntimeError, match=f"Ranks? {text} failed to pass monitoredBarrier in 200 ms"):
            group.monitored_barrier(timedelta(seconds=0.2), wait_all_ranks=wait_all_ranks)
    elif rank not in absent:
        with pytest.raises(RuntimeError, match=f"Rank {rank} successfully reached monitoredBarrier, but"):
            group.monitored_barrier(timedelta(seconds=0.2))
    tensor = torch.ones(1)
    dist.all_reduce(tensor, group=group)  # the group is still whole
    assert tensor.item() == size


@pytest.mark.parametrize("wait_all_ranks", [False, True])
def test_monitored_barrier_names_who_is_absent(ranks, wait_all_ranks):
    ranks(4).run(monitor, [1, 3], wait_all_ranks)


def monitor_at_once():
    group = dist.new_group()
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match="Rank 0 timed out in monitoredBarrier after 0 ms"):
            group.monitored_barrier(timedelta(0))
    dist.barrier()


def test_monitored_barrier_without_any_time(ranks):
    ranks(2).run(monitor_at_once)
