"""Groups over several hosts, for which ranks of this one stand: they are told that they are elsewhere."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from support.rank_pool import Ranks
from torch.distributed import ReduceOp

LAYOUTS = ["ab", "aab", "abab", "abcc"]


def reduce_everything():
    rank, size = dist.get_rank(), dist.get_world_size()
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int16, torch.int64, torch.uint8]
    for dtype in dtypes:
        inputs = [((torch.arange(1001) * (r + 3)) % 7).to(dtype) for r in range(size)]
        total = torch.stack([tensor.double() for tensor in inputs]).sum(0)
        expected = {
            ReduceOp.SUM: total.to(dtype),
            ReduceOp.AVG: total.div(size, rounding_mode=None if dtype.is_floating_point else "trunc").to(dtype),
            ReduceOp.MAX: torch.stack(inputs).amax(0),
            ReduceOp.MIN: torch.stack(inputs).amin(0),
            ReduceOp.PRODUCT: torch.stack([tensor.double() for tensor in inputs]).prod(0).to(dtype),
        }
        for op, wanted in expected.items():
            tensor = inputs[rank].repeat_interleave(2)[::2]  # not contiguous
            dist.all_reduce(tensor, op=op)
            torch.testing.assert_close(tensor, wanted, msg=lambda text, case=(op, dtype): f"{case}: {text}")
            bits = [torch.zeros_like(wanted) for _ in range(size)]
            dist.all_gather(bits, tensor)
            assert all(other.equal(tensor) for other in bits)
            kept = inputs[rank].clone()
            dist.reduce(kept, size - 1, op=op)
            torch.testing.assert_close(kept, wanted if rank == size - 1 else inputs[rank])
            part = torch.zeros(77, dtype=dtype)
            dist.reduce_scatter(part, [t.clone() for t in inputs[rank][: 77 * size].chunk(size)], op=op)
            torch.testing.assert_close(part, wanted[: 77 * size].chunk(size)[rank])
    flags = torch.tensor([True, rank == 0, False])
    for op, wanted in {ReduceOp.SUM: [1, 1, 0], ReduceOp.PRODUCT: [1, 0, 0], ReduceOp.BXOR: [size % 2, 1, 0]}.items():
        tensor = flags.clone()
        dist.all_reduce(tensor, op=op)
        assert tensor.tolist() == list(map(bool, wanted)), op
    tensor = torch.full((2,), rank + 1j * rank)
    dist.all_reduce(tensor)
    assert tensor.tolist() == [sum(range(size)) * (1 + 1j)] * 2
    tensor = torch.tensor([float("nan") if rank == size - 1 else 1.0, float(rank)])
    dist.all_reduce(tensor, op=ReduceOp.MAX)
    assert tensor.isnan().tolist() == [True, False]
    tensor = torch.ones(3)
    dist.all_reduce(tensor, op=dist._make_nccl_premul_sum(0.5))
    assert tensor.tolist() == [0.5 * size] * 3
    nothing = torch.ones(0)
    dist.all_reduce(nothing)


def move_everything():
    rank, size = dist.get_rank(), dist.get_world_size()
    for root in range(size):
        for dtype in (torch.float32, torch.bool, torch.complex64):
            tensor = torch.full((5, 3), rank + 1).to(dtype).t()
            dist.broadcast(tensor, root)
            assert tensor.equal(torch.full((3, 5), root + 1).to(dtype))
    uneven = [torch.zeros(3 * r + 1, dtype=torch.float64) for r in range(size)]
    dist.all_gather(uneven, torch.full((3 * rank + 1,), float(rank), dtype=torch.float64))
    assert [t.tolist() for t in uneven] == [[float(r)] * (3 * r + 1) for r in range(size)]
    mixed = [torch.zeros(3, dtype=torch.bool) for _ in range(size)]
    dist.all_gather(mixed, torch.tensor([rank == 0, True, False]))
    assert [t.tolist() for t in mixed] == [[r == 0, True, False] for r in range(size)]
    nothing = [torch.zeros(0) for _ in range(size)]
    dist.all_gather(nothing, torch.zeros(0))
    whole = torch.zeros(size * 2)
    dist.all_gather_into_tensor(whole, torch.full((2,), float(rank)), async_op=True).wait()
    assert whole.tolist() == [float(r) for r in range(size) for _ in range(2)]
    dist.barrier()


def use_what_is_delegated():
    rank, size = dist.get_rank(), dist.get_world_size()
    result = torch.zeros(size)
    dist.all_to_all_single(result, torch.full((size,), float(rank)))
    assert result.tolist() == list(range(size))
    gathered = [torch.zeros(2) for _ in range(size)] if rank == 1 else None
    dist.gather(torch.full((2,), float(rank)), gathered, dst=1)
    assert rank != 1 or [t[0].item() for t in gathered] == list(range(size))
    received = torch.zeros(1)
    works = [dist.isend(torch.ones(1) * rank, (rank + 1) % size), dist.irecv(received, (rank - 1) % size)]
    for work in works:
        work.wait()
    assert received.item() == (rank - 1) % size
    objects = [None] * size
    dist.all_gather_object(objects, rank)
    assert objects == list(range(size))
    sparse = torch.sparse_coo_tensor([[rank % 2]], [1.0], (2,))
    dist.all_reduce(sparse)
    assert sparse.to_dense().sum().item() == size
    dist.group.WORLD.monitored_barrier()


def coalesce():
    """Calls that are delegated are waited for like others, also where their backend is made for the first of them."""
    from torch.distributed.distributed_c10d import _coalescing_manager

    rank, size = dist.get_rank(), dist.get_world_size()
    group, device = dist.new_group(), torch.device("cpu")
    after, before, elements = (rank + 1) % size, (rank - 1) % size, 300_000
    for _ in range(2):
        received, given = torch.zeros(elements), torch.full((elements,), float(rank))
        whole, total = torch.zeros(size * 3), torch.full((elements,), float(rank))
        with _coalescing_manager(group, device, async_ops=True) as manager:
            dist.isend(given, after, group)
            dist.irecv(received, before, group)
            dist.all_reduce(total, group=group, async_op=True)
            dist.all_to_all_single(whole, torch.full((size * 3,), float(rank)), group=group, async_op=True)
        (work,) = manager.works
        work.wait()
        assert work.is_completed()
        assert work.is_success()
        assert received.unique().tolist() == [float(before)]
        assert total.unique().tolist() == [float(sum(range(size)))]
        assert whole.tolist() == [float(r) for r in range(size) for _ in range(3)]
    received = torch.zeros(elements)
    with _coalescing_manager(group, device):  # which waits itself
        dist.isend(given, after, group)
        dist.irecv(received, before, group)
    assert received.unique().tolist() == [float(before)]
    received = torch.zeros(elements)
    transfers = [dist.P2POp(dist.isend, given, after, group), dist.P2POp(dist.irecv, received, before, group)]
    for work in dist.batch_isend_irecv(transfers):
        work.wait()
    assert received.unique().tolist() == [float(before)]
    tensors = [torch.full((n,), float(rank)) for n in (1, 500)]
    with _coalescing_manager(group):  # those that torch itself makes one call of
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)
    assert [tensor.unique().tolist() for tensor in tensors] == [[float(sum(range(size)))]] * 2
    dist.destroy_process_group(group)


@pytest.mark.parametrize("hosts", LAYOUTS)
@pytest.mark.parametrize("check", [reduce_everything, move_everything, use_what_is_delegated, coalesce])
def test_across_hosts(ranks, check, hosts):
    ranks(len(hosts), hosts).run(check)


def make_groups():
    """Of one host, across, and of one rank: each finds out for itself, whatever a launcher says."""
    os.environ.update(LOCAL_WORLD_SIZE="4", LOCAL_RANK=os.environ["RANK"], GROUP_RANK="0")
    rank = dist.get_rank()
    for members in ([0, 2], [1, 3], [0, 1], [1, 2, 3], [2]):
        group = dist.new_group(members)
        if rank in members:
            tensor = torch.full((10,), float(rank))
            dist.all_reduce(tensor, group=group)
            assert tensor.tolist() == [float(sum(members))] * 10
            dist.destroy_process_group(group)


def test_groups_inside_and_across_hosts(ranks):
    ranks(4, "abab").run(make_groups)


def train_in_parallel():
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 2))
    rank, size = dist.get_rank(), dist.get_world_size()
    model(torch.full((3, 4), float(rank))).sum().backward()
    assert model.module.weight.grad.unique().tolist() == [3.0 * sum(range(size)) / size]


def test_data_parallel_across_hosts(ranks):
    ranks(3, "aab").run(train_in_parallel)


def process_number():
    return os.getpid()


def fail(pid):
    with pytest.raises(dist.DistBackendError if dist.get_rank() < 2 else RuntimeError, match=".") as caught:
        dist.all_reduce(torch.ones(1000))
    return str(caught.value)


def test_a_loss_on_one_host_ends_the_call_on_all():
    pool = Ranks(4, hosts="aabb")
    try:
        pool.run(move_everything)
        pid = pool.run(process_number)[1]
        os.kill(pid, signal.SIGKILL)
        texts = pool.run(fail, pid, only=[0, 2, 3])
        assert f"rank 1 (process {pid})" in texts[0]
        assert texts[2]
        assert texts[3]
    finally:
        pool.close()
