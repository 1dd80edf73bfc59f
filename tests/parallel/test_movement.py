"""Collectives that only move data: all dtypes, sizes, strides."""

import itertools

import pytest
import torch
import torch.distributed as dist

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn]
COUNTS = [0, 1, 1000, 300_001]


def example(rank, dtype, count, salt=0):
    numbers = (torch.arange(count) * 7 + 13 * rank + salt) % 101
    return numbers.to(torch.float32).to(dtype) if dtype == torch.float8_e4m3fn else numbers.to(dtype)


def strided(tensor):
    """The same values, every second element of a larger tensor."""
    return torch.stack([tensor, tensor], 1).flatten()[::2] if tensor.numel() else tensor


def same(tensor, expected):
    bits = [t.clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (tensor, expected)]
    return torch.equal(*bits)


def check_broadcast():
    rank, size = dist.get_rank(), dist.get_world_size()
    for root, dtype, count in itertools.product(range(size), DTYPES, COUNTS):
        for layout in (lambda tensor: tensor, strided):
            tensor = layout(example(rank, dtype, count))
            dist.broadcast(tensor, root)
            assert same(tensor, example(root, dtype, count)), (root, dtype, count)


def check_all_gather():
    rank, size = dist.get_rank(), dist.get_world_size()
    for dtype, count in itertools.product(DTYPES, COUNTS):
        expected = [example(r, dtype, count) for r in range(size)]
        for layout in (lambda tensor: tensor, strided):
            outputs = [layout(torch.zeros(count, dtype=dtype)) for _ in range(size)]
            dist.all_gather(outputs, layout(expected[rank]))
            assert all(map(same, outputs, expected)), (dtype, count)
        flat, stacked = torch.zeros(size * count, dtype=dtype), torch.zeros(size, count, dtype=dtype)
        dist.all_gather_into_tensor(flat, expected[rank])
        dist.all_gather_into_tensor(stacked, expected[rank])
        assert same(flat, torch.cat(expected)), (dtype, count)
        assert same(stacked, torch.stack(expected)), (dtype, count)


def check_uneven_all_gather():
    rank, size = dist.get_rank(), dist.get_world_size()
    for factor in (1, 70_001):
        expected = [example(r, torch.float32, r * factor) for r in range(size)]  # rank 0 gives nothing
        outputs = [torch.zeros(r * factor) for r in range(size)]
        dist.all_gather(outputs, expected[rank])
        assert all(map(torch.equal, outputs, expected))


def check_in_place_all_gather():
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = torch.zeros(size * 1001)
    own = whole.chunk(size)[rank]
    own.copy_(example(rank, torch.float32, 1001))
    dist.all_gather_into_tensor(whole, own)
    assert whole.equal(torch.cat([example(r, torch.float32, 1001) for r in range(size)]))


def check_strided_results():
    rank, size = dist.get_rank(), dist.get_world_size()
    wide = torch.zeros(3, 2 * size).t()  # [2 * size, 3], by columns
    dist.all_gather_into_tensor(wide, torch.full((2, 3), float(rank)))
    assert wide.equal(torch.arange(size).repeat_interleave(2)[:, None].expand(-1, 3).float())
    image = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    dist.all_reduce(image)
    assert image.equal(size * torch.arange(24.0).view(1, 2, 3, 4))
    inputs = torch.arange(6.0 * size).view(3, 2 * size).t()
    output = torch.zeros(3, 2).t()
    dist.reduce_scatter_tensor(output, inputs)
    assert output.equal(size * inputs.chunk(size)[rank])


def check_gather_and_scatter():
    rank, size = dist.get_rank(), dist.get_world_size()
    for root, dtype, count in itertools.product(range(size), DTYPES, COUNTS):
        expected = [example(r, dtype, count) for r in range(size)]
        outputs = [strided(torch.zeros(count, dtype=dtype)) for _ in range(size)] if rank == root else None
        dist.gather(expected[rank], outputs, dst=root)
        assert rank != root or all(map(same, outputs, expected)), (root, dtype, count)
        output = strided(torch.zeros(count, dtype=dtype))
        dist.scatter(output, expected if rank == root else None, src=root)
        assert same(output, expected[rank]), (root, dtype, count)


def check_all_to_all():
    rank, size = dist.get_rank(), dist.get_world_size()
    for dtype, count in itertools.product(DTYPES, COUNTS):
        inputs = [example(rank, dtype, count, salt=10 * r) for r in range(size)]
        expected = [example(r, dtype, count, salt=10 * rank) for r in range(size)]
        outputs = [strided(torch.zeros(count, dtype=dtype)) for _ in range(size)]
        dist.all_to_all(outputs, inputs)
        assert all(map(same, outputs, expected)), (dtype, count)
        whole = torch.zeros(size * count, dtype=dtype)
        dist.all_to_all_single(whole, torch.cat(inputs))
        assert same(whole, torch.cat(expected)), (dtype, count)


def check_uneven_all_to_all():
    rank, size = dist.get_rank(), dist.get_world_size()

    def rows(sender, receiver):
        return (sender + 2 * receiver) % 3  # 0 among them

    given, taken = [rows(rank, r) for r in range(size)], [rows(r, rank) for r in range(size)]
    data = torch.cat([torch.full((rows(rank, r), 5), 10.0 * rank + r) for r in range(size)])
    result = torch.zeros(sum(taken), 5)
    dist.all_to_all_single(result, data, taken, given)
    assert result.equal(torch.cat([torch.full((rows(r, rank), 5), 10.0 * r + rank) for r in range(size)]))
    across = torch.zeros(5, sum(taken)).t()
    dist.all_to_all_single(across, data.t().contiguous().t(), taken, given)
    assert across.equal(result)


def check_coalesced():
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    inputs = [torch.full((n,), float(rank + n)) for n in (1, 4, 0)]
    outputs = [torch.zeros(size * n) for n in (1, 4, 0)]
    group.allgather_into_tensor_coalesced(outputs, inputs).wait()
    for n, output in zip((1, 4, 0), outputs, strict=True):
        assert output.equal(torch.arange(size).repeat_interleave(n) + float(n))
    lists = [[torch.zeros(n) for n in (1, 4, 0)] for _ in range(size)]
    group.allgather_coalesced(lists, inputs).wait()
    assert [[t.tolist() for t in row] for row in lists] == [[[r + n] * n for n in (1, 4, 0)] for r in range(size)]
    sums = [torch.zeros(n) for n in (1, 4)]
    group.reduce_scatter_tensor_coalesced(sums, [torch.full((size * n,), float(rank + n)) for n in (1, 4)]).wait()
    assert [s.tolist() for s in sums] == [[float(sum(r + n for r in range(size)))] * n for n in (1, 4)]


CHECKS = [
    *(check_broadcast, check_all_gather, check_uneven_all_gather, check_in_place_all_gather, check_strided_results),
    *(check_gather_and_scatter, check_all_to_all, check_uneven_all_to_all, check_coalesced),
]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_data_arrives(ranks, check, size):
    ranks(size).run(check)


def in_inference_mode(name):
    with torch.inference_mode():
        globals()[name]()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_data_arrives_in_inference_mode(ranks, check):
    ranks(2).run(in_inference_mode, check.__name__)


def move_objects():
    rank, size = dist.get_rank(), dist.get_world_size()
    own = {"rank": rank, "text": "x" * 1000 * rank}
    gathered = [None] * size
    dist.all_gather_object(gathered, own)
    assert [len(item["text"]) for item in gathered] == [1000 * r for r in range(size)]
    collected = [None] * size if rank == 1 else None
    dist.gather_object(own, collected, dst=1)
    assert rank != 1 or [item["rank"] for item in collected] == list(range(size))
    items = [own, "second"] if rank == 0 else [None, None]
    dist.broadcast_object_list(items, src=0)
    assert items == [{"rank": 0, "text": ""}, "second"]
    received = [None]
    dist.scatter_object_list(received, [{"for": r} for r in range(size)] if rank == 0 else None, src=0)
    assert received == [{"for": rank}]
    if rank == 0:
        dist.send_object_list([own, 7], dst=1)
    elif rank == 1:
        items = [None, None]
        assert dist.recv_object_list(items, src=0) == 0
        assert items[1] == 7


def test_objects(ranks):
    ranks(3).run(move_objects)


def refuse_movements():
    rank, size = dist.get_rank(), dist.get_world_size()
    with pytest.raises(RuntimeError, match=r"the output has 3 elements \(sizes \[3\]\), expected 4"):
        dist.all_gather_into_tensor(torch.zeros(3), torch.zeros(2))
    group = dist.group.WORLD
    with pytest.raises(RuntimeError, match="root is rank 2, expected 0 to 1"):
        options = dist.BroadcastOptions()
        options.rootRank = 2
        group.broadcast([torch.zeros(1)], options).wait()
    with pytest.raises(RuntimeError, match="the output holds 1 tensors, expected one for each of the 2 ranks"):
        group.allgather([[torch.zeros(1)]], [torch.zeros(1)]).wait()
    with pytest.raises(RuntimeError, match=r"the input has 3 rows, and is split by \[1, 1\]"):
        dist.all_to_all_single(torch.zeros(2), torch.zeros(3), [1, 1], [1, 1])
    with pytest.raises(RuntimeError, match="this rank's output has 4 elements"):
        group.allgather([[torch.zeros(4)] * size], [torch.zeros(2)]).wait()
    dist.barrier()
    return rank


def test_what_does_not_fit_is_refused_by_name(ranks):
    assert ranks(2).run(refuse_movements) == [0, 1]
