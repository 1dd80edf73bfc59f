"""The share of communication that goes on beside computation: what is waited for counts, and nothing else does.

No test looks at how long anything takes: who comes late waits for a message of the other rank before it goes on.
"""

import itertools
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import torch_sluice
from torch_sluice.parallel import (
    AdaptiveAllReduce,
    CommunicationStatistics,
    adaptive_all_reduce_hook,
    communication_statistics,
)

_numbers = itertools.count()


class Signal:
    """Given by one rank, waited for by another, outside of any process group."""

    def __init__(self):
        self.key = f"test_overlap/{next(_numbers)}"  # the same on every rank

    def give(self):
        dist.distributed_c10d._get_default_store().set(self.key, "given")

    def await_it(self):
        dist.distributed_c10d._get_default_store().wait([self.key])


def poll(condition):
    end = time.monotonic() + 50
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


def wait_at_once():
    dist.barrier()
    before, tensor = communication_statistics(), torch.ones(1000)
    for _ in range(3):
        dist.all_reduce(tensor)
    dist.broadcast(tensor, 0)
    found = communication_statistics() - before
    assert found.collectives == 4
    assert found.bytes == 4 * 4000
    assert found.busy_seconds > 0
    # Each nanosecond of a synchronous collective is waited for; the difference is that of two sums of floats.
    assert found.waited_seconds == pytest.approx(found.busy_seconds, rel=1e-9)
    assert found.overlapped_share == pytest.approx(0, abs=1e-9)


def compute_meanwhile():
    """Rank 1 joins in when rank 0 has computed; rank 0 asks for the result when it is there."""
    computed = Signal()
    dist.barrier()
    before = communication_statistics()
    if dist.get_rank() == 0:
        work = dist.all_reduce(torch.ones(1000), async_op=True)
        # Nobody waits for it, so that the progress thread runs it.
        poll(lambda: (communication_statistics() - before).busy_seconds > 0)
        computed.give()
        poll(work.is_completed)
        work.wait()
        found = communication_statistics() - before
        assert (found.collectives, found.bytes) == (1, 4000)
        assert found.busy_seconds > 0
        assert found.waited_seconds == 0
        assert found.overlapped_share == 1
    else:
        computed.await_it()
        dist.all_reduce(torch.ones(1000))


def wait_after_a_while():
    """Of what rank 0 waits for at last, the part before the wait is overlapped, the part in it is not."""
    waits = Signal()
    dist.barrier()
    before = communication_statistics()
    if dist.get_rank() == 0:
        work = dist.all_reduce(torch.ones(10), async_op=True)
        poll(lambda: (communication_statistics() - before).busy_seconds > 0)

        def release():  # rank 1, when this rank has begun to wait
            poll(lambda: (communication_statistics() - before).waited_seconds > 0)
            waits.give()

        helper = threading.Thread(target=release)
        helper.start()
        work.wait()
        helper.join()
        found = communication_statistics() - before
        assert 0 < found.waited_seconds < found.busy_seconds
        assert 0 < found.overlapped_share < 1
    else:
        waits.await_it()
        dist.all_reduce(torch.ones(10))


def count_sends():
    before, tensor = communication_statistics(), torch.ones(300)
    if dist.get_rank() == 0:
        dist.send(tensor, 1)
        dist.isend(tensor, 1).wait()
    else:
        dist.recv(tensor, 0)
        dist.recv(tensor, 0)
    found = communication_statistics() - before
    assert (found.sends, found.sent_bytes) == ((2, 2400) if dist.get_rank() == 0 else (0, 0))


def fail():
    """A collective that fails ends, too."""
    group = dist.new_group()
    before = communication_statistics()
    with pytest.raises(dist.DistBackendError):
        dist.all_reduce(torch.ones(2 + dist.get_rank()), group=group)
    found = communication_statistics() - before
    time.sleep(0.01)
    later = communication_statistics() - before
    assert found.collectives == 1
    assert later == found


@pytest.mark.parametrize(
    "check", [wait_at_once, compute_meanwhile, wait_after_a_while, count_sends, fail], ids=lambda check: check.__name__
)
def test_counters(ranks, check):
    ranks(2).run(check)


class InBackward(torch.autograd.Function):
    """Passes a tensor on, and calls a function when the backward pass comes by."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.function()
        return grad, None


def train_one_step(hooked):
    """A backward pass that goes on computing while the bucket of the last layer is reduced, and then waits for the
    bucket of the first: rank 1 comes to the latter only when rank 0 has nothing left to compute."""
    first, last = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    rank, over = dist.get_rank(), Signal()
    called = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = first, last

        def forward(self, x):
            return self.last(InBackward.apply(self.first(x), lambda: called[-1]()))

    wrapped = nn.parallel.DistributedDataParallel(Model(), bucket_cap_mb=0.01)
    if hooked:
        state = AdaptiveAllReduce("int8")
        wrapped.register_comm_hook(state, adaptive_all_reduce_hook)
    # DDP arranges its buckets anew after the first pass.
    called.append(lambda: None)
    for _ in range(2):
        wrapped(torch.ones(2, 64)).sum().backward()
    dist.barrier()
    monitor = torch_sluice.Monitor(wrapped, peak_flops=1e9)
    buckets_of = lambda: sum(state.traffic.formats.values()) if hooked else None  # noqa: E731
    begin, buckets = communication_statistics(), buckets_of()

    def compute():
        """Between the buckets."""
        if hooked:
            poll(lambda: buckets_of() > buckets)
            poll(lambda: (communication_statistics() - begin).collectives >= 3)
        else:
            poll(lambda: (communication_statistics() - begin).collectives == 1)
        if rank == 0:
            torch.autograd.Variable._execution_engine.queue_callback(over.give)
        else:
            over.await_it()

    called.append(compute)
    with monitor.step():
        wrapped(torch.ones(2, 64)).sum().backward()
    found = monitor.communication
    # Numbers to decide on, an exchange of parts and a gathering for each bucket; else one all-reduce.
    assert found.collectives == (6 if hooked else 2)
    assert found.waited_seconds > 0 or rank == 1
    assert found.waited_seconds < found.busy_seconds
    assert 0 < monitor.overlapped_share <= 1
    assert monitor.summary()["overlapped_share"] == monitor.overlapped_share
    assert monitor.summary()["communication_bytes_per_step"] == found.bytes > 0
    time.sleep(0.01)
    assert communication_statistics().waited_seconds == monitor._communication_before.waited_seconds
    return monitor.overlapped_share, found.bytes


@pytest.mark.parametrize("hooked", [False, True])
def test_the_monitor_shows_what_a_backward_pass_overlaps(ranks, hooked):
    (share, size), _ = ranks(2).run(train_one_step, hooked)
    assert share < 1
    whole, message = 64 * 64 * 4, 64 * 64 // 2 + 2 * 4  # int8 and two steps for a half
    assert size == 2 * (7 * 8 + 3 * message if hooked else whole)


def scalars_of(folder):
    monitor = torch_sluice.Monitor(nn.Linear(2, 2), peak_flops=1e9, log_dir=f"{folder}/{dist.get_rank()}")
    with monitor.step():
        dist.all_reduce(torch.ones(1000))
    dist.all_reduce(torch.ones(1000))  # between steps
    with monitor.step():
        pass
    monitor.record(0.1)
    dist.all_reduce(torch.ones(500))
    monitor.record(0.1)
    monitor.close()
    assert monitor.communication.collectives == 2
    assert monitor.summary()["communication_bytes_per_step"] == 6000 / 4


def test_the_monitor_writes_scalars_of_the_steps_that_communicate(ranks, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ranks(2).run(scalars_of, str(tmp_path))
    events = EventAccumulator(str(tmp_path / "0")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("communication_bytes")] == [(1, 4000), (4, 2000)]
    assert [e.step for e in events.Scalars("overlapped_share")] == [1, 4]


def test_a_job_without_groups_has_none():
    monitor = torch_sluice.Monitor(nn.Linear(2, 2), peak_flops=1e9)
    assert monitor.summary()["communication_bytes_per_step"] is None
    monitor.record(1.0)
    assert monitor.summary()["communication_bytes_per_step"] == 0
    assert monitor.summary()["overlapped_share"] is None
    difference = CommunicationStatistics(3, 30, 3.0, 1.0) - CommunicationStatistics(1, 10, 1.0, 0.5)
    assert difference == CommunicationStatistics(2, 20, 2.0, 0.5)
    assert difference.overlapped_share == 0.75
