"""Collectives that reduce, for every dtype and operator, against the same sum made in one process."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
COMPLEX = [torch.complex64, torch.complex128]
OPERATORS = {
    "SUM": [*FLOATS, *INTEGERS, torch.bool, *COMPLEX],
    "AVG": [*FLOATS, torch.int32, torch.int64, *COMPLEX],
    "PRODUCT": [*FLOATS, *INTEGERS, torch.bool],
    "MIN": [*FLOATS, *INTEGERS, torch.bool],
    "MAX": [*FLOATS, *INTEGERS, torch.bool],
    "BAND": [*INTEGERS, torch.bool],
    "BOR": [*INTEGERS, torch.bool],
    "BXOR": [*INTEGERS, torch.bool],
}
CASES = [(name, dtype) for name, dtypes in OPERATORS.items() for dtype in dtypes]
COUNTS = [0, 1, 7, 1000, 300_001]


def example(rank, dtype, count):
    generator = torch.Generator().manual_seed(1000 * count + rank)
    if dtype == torch.bool:
        return torch.rand(count, generator=generator) < 0.5
    if dtype in INTEGERS:
        return torch.randint(-20 if dtype.is_signed else 0, 20, (count,), generator=generator).to(dtype)
    if dtype.is_complex:
        return torch.view_as_complex(torch.randn(count, 2, generator=generator, dtype=torch.float64)).to(dtype)
    return torch.randn(count, generator=generator).to(dtype)


def reduced(name, inputs):
    """In the order of the ranks; half precision in float32, rounded at the end."""
    dtype = inputs[0].dtype
    if dtype.is_complex:
        return torch.view_as_complex(reduced(name, [torch.view_as_real(tensor) for tensor in inputs]))
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    combine = {
        "SUM": torch.logical_or if dtype == torch.bool else torch.add,
        "AVG": torch.add,
        "PRODUCT": torch.logical_and if dtype == torch.bool else torch.mul,
        "MIN": torch.minimum,
        "MAX": torch.maximum,
        "BAND": torch.bitwise_and,
        "BOR": torch.bitwise_or,
        "BXOR": torch.bitwise_xor,
    }[name]
    total = inputs[0].to(wide)
    for tensor in inputs[1:]:
        total = combine(total, tensor.to(wide))
    if name == "AVG":
        size = len(inputs)
        total = torch.div(total, size, rounding_mode="trunc") if dtype in INTEGERS else total / size
    return total.to(dtype)


def check_all_reduce(cases, counts):
    rank, size = dist.get_rank(), dist.get_world_size()
    for (name, dtype), count in itertools.product(cases, counts):
        expected = reduced(name, [example(r, dtype, count) for r in range(size)])
        tensor = example(rank, dtype, count)
        dist.all_reduce(tensor, op=getattr(ReduceOp, name))
        assert tensor.equal(expected), (name, dtype, count)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_reduce_is_the_sum_in_the_order_of_the_ranks(ranks, size):
    ranks(size).run(check_all_reduce, CASES, COUNTS if size == 2 else [5, 20_003])


def check_reduce(cases):
    rank, size = dist.get_rank(), dist.get_world_size()
    for root, (name, dtype) in itertools.product(range(size), cases):
        tensor = example(rank, dtype, 1003)
        before = tensor.clone()
        dist.reduce(tensor, root, op=getattr(ReduceOp, name))
        expected = reduced(name, [example(r, dtype, 1003) for r in range(size)]) if rank == root else before
        assert tensor.equal(expected), (name, dtype, root)


def test_reduce_leaves_other_ranks_tensors_as_they_are(ranks):
    ranks(3).run(check_reduce, CASES)


def check_reduce_scatter(cases, counts):
    rank, size = dist.get_rank(), dist.get_world_size()
    for (name, dtype), count in itertools.product(cases, counts):
        everyone = [example(r, dtype, count * size) for r in range(size)]
        expected = reduced(name, [tensor.chunk(size)[rank] if count else tensor for tensor in everyone])
        whole = torch.empty(count, dtype=dtype)
        dist.reduce_scatter_tensor(whole, everyone[rank], op=getattr(ReduceOp, name))
        listed = torch.empty(count, dtype=dtype)
        pieces = [piece.clone() for piece in everyone[rank].view(size, count)]
        dist.reduce_scatter(listed, pieces, op=getattr(ReduceOp, name))
        assert whole.equal(expected), (name, dtype, count)
        assert listed.equal(expected), (name, dtype, count)


@pytest.mark.parametrize("size", [2, 4])
def test_reduce_scatter_gives_each_rank_its_part_of_the_sum(ranks, size):
    ranks(size).run(check_reduce_scatter, CASES, [0, 3, 5001])


def reduce_in_inference_mode():
    with torch.inference_mode():
        check_all_reduce(CASES, [5])
        check_reduce(CASES)
        check_reduce_scatter(CASES, [3])
        check_premultiplied()
        reduce_coalesced(torch.float32)
        sum_sparse()


def test_all_of_it_in_inference_mode(ranks):
    ranks(2).run(reduce_in_inference_mode)


def check_premultiplied():
    rank, size = dist.get_rank(), dist.get_world_size()
    for dtype, factor in itertools.product(FLOATS, (0.3, torch.tensor(0.3, dtype=torch.float64))):
        op, wide = dist._make_nccl_premul_sum(factor), torch.float32 if dtype.itemsize < 4 else dtype
        inputs = [example(r, dtype, 999).to(wide) * torch.tensor(0.3, dtype=wide) for r in range(size)]
        expected = reduced("SUM", inputs).to(dtype)
        tensor, kept, part = example(rank, dtype, 999), example(rank, dtype, 999), torch.zeros(333, dtype=dtype)
        dist.all_reduce(tensor, op=op)
        dist.reduce(kept, 1, op=op)
        dist.reduce_scatter_tensor(part, example(rank, dtype, 999)[: 333 * size], op=op)
        assert tensor.equal(expected), dtype
        assert rank != 1 or kept.equal(expected), dtype
        assert part.equal(expected[333 * rank : 333 * (rank + 1)]), dtype


def test_premultiplied_sum(ranks):
    ranks(2).run(check_premultiplied)


def check_nan():
    rank = dist.get_rank()
    for dtype in FLOATS:
        for op in (ReduceOp.MIN, ReduceOp.MAX):
            tensor = torch.full((17,), float(rank), dtype=dtype)
            tensor[3 + rank] = float("nan")
            dist.all_reduce(tensor, op=op)
            assert tensor.isnan().nonzero().flatten().tolist() == [3, 4], (dtype, op)


def test_minimum_and_maximum_of_nan_are_nan(ranks):
    ranks(2).run(check_nan)


def reduce_coalesced(dtype):
    rank, size = dist.get_rank(), dist.get_world_size()
    counts = [0, 1, 5, 100, 70_000] if dtype == torch.float32 else [3, 9]
    tensors = [example(rank, dtype, count) for count in counts]
    tensors[-1] = tensors[-1].repeat_interleave(2)[::2]  # not contiguous
    expected = [reduced("SUM", [example(r, dtype, count) for r in range(size)]) for count in counts]
    group = dist.group.WORLD
    options = dist.AllreduceCoalescedOptions()
    group.allreduce_coalesced(tensors, options).wait()
    assert all(map(torch.equal, tensors, expected))
    large = [torch.full((200_000,), float(rank + i)) for i in range(3)]
    group.allreduce_coalesced(large, options).wait()
    assert [t[0].item() for t in large] == [sum(r + i for r in range(size)) for i in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_coalesced_all_reduce(ranks, dtype):
    ranks(2).run(reduce_coalesced, dtype)


def sum_sparse():
    rank, size = dist.get_rank(), dist.get_world_size()

    def make(r):
        count = 3 * r  # none at all on rank 0
        indices = torch.stack([torch.arange(count) % 7, torch.arange(count) * (r + 2) % 5])
        return torch.sparse_coo_tensor(indices, torch.arange(count * 2.0).view(count, 2) + r, (7, 5, 2))

    tensor = make(rank).coalesce()
    dist.all_reduce(tensor)
    expected = torch.stack([make(r).to_dense() for r in range(size)]).sum(0)
    assert tensor.to_dense().equal(expected)
    with pytest.raises(RuntimeError, match="expected the operator SUM"):
        dist.all_reduce(make(rank), op=ReduceOp.MAX)


def test_sparse_sum(ranks):
    ranks(3).run(sum_sparse)


def refuse_reductions():
    group = dist.group.WORLD
    with pytest.raises(RuntimeError, match="all_reduce of Float with BXOR, expected an integer or boolean dtype"):
        dist.all_reduce(torch.ones(2), op=ReduceOp.BXOR)
    with pytest.raises(RuntimeError, match="Float8_e4m3fn"):
        group.allreduce([torch.zeros(2).to(torch.float8_e4m3fn)]).wait()
    with pytest.raises(RuntimeError, match="with PRODUCT, expected SUM, AVG or PREMUL_SUM"):
        options = dist.AllreduceOptions()
        options.reduceOp = ReduceOp.PRODUCT
        group.allreduce([torch.zeros(2, dtype=torch.complex64)], options).wait()
    with pytest.raises(RuntimeError, match="holds 2 tensors, expected one"):
        group.allreduce([torch.zeros(2), torch.zeros(2)]).wait()
    with pytest.raises(RuntimeError, match=r"the input has 5 elements \(sizes \[5\]\), expected 4"):
        dist.reduce_scatter_tensor(torch.zeros(2), torch.zeros(5))
    tensor = torch.ones(3)
    dist.all_reduce(tensor)  # none of these was the group's affair
    assert tensor.tolist() == [2.0] * 3


def test_what_cannot_be_reduced_is_refused_by_name(ranks):
    ranks(2).run(refuse_reductions)
