"""Operations that go on while the caller does something else: order, Futures, groups that overlap, inference mode."""

import itertools
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist


def run_in_order():
    size = dist.get_world_size()
    tensor = torch.ones(1000, dtype=torch.float64)
    for _ in range(50):
        tensor.fill_(1)
        works = [dist.all_reduce(tensor, async_op=True) for _ in range(30)]
        dist.barrier()  # comes after them all
        assert all(work.is_completed() and work.is_success() for work in works)
    assert tensor.unique().tolist() == [float(size) ** 30]
    tensors = [torch.full((5,), float(i)) for i in range(20)]
    works = [dist.all_reduce(t, async_op=True) for t in tensors]
    for i in reversed(range(20)):
        assert works[i].wait() is True
        assert works[i].result()[0].tolist() == [float(i * size)] * 5
        assert works[i].exception() is None


def synchronous_after_asynchronous():
    size = dist.get_world_size()
    for _ in range(50):
        a = torch.ones(3)
        work = dist.all_reduce(a, async_op=True)
        dist.all_reduce(a)  # waits for the other by being behind it
        assert a.tolist() == [float(size) ** 2] * 3
        work.wait()


def wait_for_the_first():
    """Waiting for one operation must not mean waiting for a later one, for which another rank isn't ready."""
    rank = dist.get_rank()
    for _ in range(50):
        first, second = torch.ones(4), torch.ones(4)
        if rank == 0:
            works = [dist.all_reduce(first, async_op=True), dist.all_reduce(second, async_op=True)]
            works[0].wait()
            dist.send(torch.ones(1), 1)
            works[1].wait()
        else:
            dist.all_reduce(first)
            dist.recv(torch.ones(1), 0)
            dist.all_reduce(second)


def futures():
    size = dist.get_world_size()
    values = [dist.all_reduce(torch.full((2,), float(i)), async_op=True).get_future() for i in range(5)]
    doubled = [future.then(lambda f: f.value()[0] * 2) for future in values]
    assert [f.wait()[0].item() for f in doubled] == [2.0 * i * size for i in range(5)]
    work = dist.all_reduce(torch.ones(2), async_op=True)
    work.wait()
    assert work.get_future().done()  # asked for only now
    assert work.get_future().value()[0].tolist() == [float(size)] * 2
    outputs = [torch.zeros(1) for _ in range(size)]
    dist.all_gather(outputs, torch.ones(1), async_op=True).get_future().wait()
    assert torch.cat(outputs).tolist() == [1.0] * size
    dist.barrier(async_op=True).get_future().wait()


def wait_within_a_callback():
    """A communication hook may run another collective of its group to the end in a callback of the first."""
    size = dist.get_world_size()

    def again(future):
        return dist.all_reduce(future.value()[0], async_op=True).get_future().wait()[0]

    for _ in range(30):  # one after the other: in callbacks of several, ranks would come to them in different orders
        assert dist.all_reduce(torch.ones(2), async_op=True).get_future().then(again).wait().tolist() == [size**2] * 2


def wait_with_a_timeout():
    rank = dist.get_rank()
    group = dist.new_group()
    tensor = torch.ones(3)
    if rank == 0:
        work = dist.all_reduce(tensor, group=group, async_op=True)
        with pytest.raises(RuntimeError, match=" Timed out waiting 100ms"):
            work.wait(timedelta(seconds=0.1))
        assert not work.is_completed()
        dist.barrier()
        work.wait()  # nothing is lost
    else:
        dist.barrier()
        dist.all_reduce(tensor, group=group)
    assert tensor.tolist() == [float(dist.get_world_size())] * 3


def groups_that_overlap():
    """Each thread uses groups of its own, with the same ranks in another order of calls; nothing may mix."""
    rank, size = dist.get_rank(), dist.get_world_size()
    members = [list(ranks) for n in (2, 3) for ranks in itertools.combinations(range(size), n)] * 2
    groups = [dist.new_group(ranks) for ranks in members]
    mine = [(i, g, m) for i, (g, m) in enumerate(zip(groups, members, strict=True)) if rank in m]
    problems = []

    def use(i, group, ranks):
        try:
            for step in range(15):
                tensors = [torch.full((n,), float(100 * i + rank + step)) for n in (1, 3000)]
                works = [dist.all_reduce(tensor, group=group, async_op=step % 2 == 0) for tensor in tensors]
                for work in works:
                    if work is not None:
                        work.wait()
                expected = sum(100.0 * i + r + step for r in ranks)
                assert all(tensor.unique().tolist() == [expected] for tensor in tensors), (i, step)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=use, args=item) for item in mine]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]
    for _, group, _ in mine:
        dist.destroy_process_group(group)


def in_inference_mode():
    rank, size = dist.get_rank(), dist.get_world_size()
    with torch.inference_mode():
        tensor = torch.ones(2, 3)
        dist.all_reduce(tensor)
        assert tensor.unique().tolist() == [size]
        across = torch.ones(2, 3).t()
        dist.all_reduce(across, async_op=True).wait()
        assert across.unique().tolist() == [size]
        dist.broadcast(across, 0)
        output = torch.zeros(3, size).t()
        dist.all_gather_single(output, torch.full((3,), float(rank))) if hasattr(dist, "all_gather_single") else (
            dist.all_gather_into_tensor(output, torch.full((3,), float(rank)))
        )
        assert output[:, 0].tolist() == list(range(size))
        group = dist.group.WORLD
        group.allreduce_coalesced([tensor, across], dist.AllreduceCoalescedOptions()).wait()
        assert tensor.unique().tolist() == [size * size]
        parts = [torch.zeros(1) for _ in range(size)]
        dist.all_to_all(parts, [torch.ones(1)] * size, async_op=True).wait()
        received = torch.zeros(3, 2).t()
        works = [dist.isend(across, (rank + 1) % size), dist.irecv(received, (rank - 1) % size)]
        for work in works:
            work.wait()
        gathered = [None] * size
        dist.all_gather_object(gathered, rank)
        assert gathered == list(range(size))
        inside = torch.ones(2)
    dist.all_reduce(inside)  # a tensor of inference mode, outside
    assert inside.tolist() == [float(size)] * 2


def of_leaves_that_need_gradients():
    size = dist.get_world_size()
    parameter = torch.nn.Parameter(torch.ones(2, 2).t())
    dist.all_reduce(parameter.data)
    with torch.no_grad():
        dist.broadcast(parameter, 0)
    assert parameter.unique().tolist() == [size]
    assert parameter.requires_grad


def coalesce():
    rank, size = dist.get_rank(), dist.get_world_size()
    group, device = dist.group.WORLD, torch.device("cpu")
    from torch.distributed.distributed_c10d import _coalescing_manager

    tensors = [torch.full((3,), float(i)) for i in range(4)]
    with _coalescing_manager(group, async_ops=True) as manager:
        for tensor in tensors:
            dist.all_reduce(tensor)
    manager.wait()
    received = torch.zeros(2)
    with _coalescing_manager(group, device, async_ops=True) as manager:  # of any kind
        dist.all_reduce(tensors[0], async_op=True)
        dist.isend(torch.full((2,), float(rank)), (rank + 1) % size)
        dist.irecv(received, (rank - 1) % size)
    (work,) = manager.works
    work.wait()
    assert work.is_completed()
    assert work.is_success()
    assert tensors[1].tolist() == [float(size)] * 3
    assert received.tolist() == [float((rank - 1) % size)] * 2
    with _coalescing_manager(group, device, async_ops=True) as manager:
        dist.all_reduce(torch.ones(1), async_op=True)
    manager.works[0].get_future().wait()


CHECKS = [
    *(run_in_order, synchronous_after_asynchronous, wait_for_the_first, futures, wait_within_a_callback),
    *(wait_with_a_timeout, in_inference_mode, of_leaves_that_need_gradients, coalesce),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_two_ranks(ranks, check):
    ranks(2).run(check)


@pytest.mark.parametrize("check", [run_in_order, groups_that_overlap], ids=lambda check: check.__name__)
def test_on_four_ranks(ranks, check):
    ranks(4).run(check)


def profile():
    tensor = torch.ones(3, 4)
    with torch.profiler.profile(record_shapes=True) as profiler:
        dist.all_reduce(tensor)
        dist.all_reduce(tensor, async_op=True).wait()
        dist.barrier()
    events = [event for event in profiler.events() if event.name == "sluice:all_reduce"]
    assert [event.input_shapes for event in events] == [[[3, 4]]] * 2
    assert sum(event.name == "sluice:barrier" for event in profiler.events()) == 1


def test_profiler_sees_the_collectives(ranks):
    ranks(2).run(profile)


def look_at_the_backend():
    group = dist.new_group(timeout=timedelta(seconds=12))
    backend = group._get_backend(torch.device("cpu"))
    before = backend._get_sequence_number_for_group()
    dist.all_reduce(torch.ones(1), group=group)
    assert backend._get_sequence_number_for_group() == before + 1
    assert backend.name() == "sluice"
    assert group._get_backend(torch.device("cuda")) is not None
    group.set_timeout(timedelta(seconds=0.2))
    assert dist.get_backend(group) == "sluice"
    if dist.get_rank() == 0:
        with pytest.raises(dist.DistBackendError, match="Timed out waiting 200ms"):
            dist.barrier(group)
    dist.barrier()
    return before


def test_what_a_backend_says_of_itself(ranks):
    assert ranks(2).run(look_at_the_backend) == [0, 0]


def split():
    rank = dist.get_rank()
    parts = [[0, 2], [1]]
    part = next(part for part in parts if rank in part)
    for i in range(20):  # c10d splits once for each kind of device, with the same keys in the store every time
        group = dist.group.WORLD.split_group(part, group_name=f"split{part}{i}")
        tensor = torch.full((3,), float(rank))
        group.allreduce([tensor]).wait()
        assert (group.rank(), group.size()) == (part.index(rank), len(part))
        assert tensor.tolist() == [float(sum(part))] * 3


def test_groups_are_split(ranks):
    ranks(3).run(split)


def make_a_group_again():
    """c10d gives the name of a group that was destroyed to the next one of the same ranks."""
    rank, names = dist.get_rank(), set()
    for i in range(3):
        if rank == 0:
            time.sleep(0.1 * i)  # the other finds only what an earlier group left in the store
        group = dist.new_group([0, 1], use_local_synchronization=True)
        names.add(group.group_name)
        tensor = torch.full((3,), float(rank))
        dist.all_reduce(tensor, group=group)
        assert tensor.tolist() == [1.0] * 3
        dist.destroy_process_group(group)
    return len(names)


def test_a_name_that_was_used_before(ranks):
    names = ranks(3).run(make_a_group_again, only=[0, 1])
    assert names == [1, 1, None] or torch.__version__ >= "2.14"  # which counts on
