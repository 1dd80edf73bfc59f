"""Whatever Gloo takes, this backend takes and answers alike: every call, for every dtype and operator of torch."""

import itertools

import pytest
import torch
import torch.distributed as dist

OPERATORS = ["SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "AVG"]
DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
LENGTH = 6  # of a tensor: a multiple of the ranks


def numbers(rank, dtype):
    """Of which sums and products are exact in any order."""
    return torch.tensor([0, 1, 2, 1, 2, 1])[torch.arange(LENGTH) - rank].to(dtype)


def all_reduce(tensor, op, group):
    dist.all_reduce(tensor, op, group)
    return [tensor]


def reduce(tensor, op, group):
    dist.reduce(tensor, 0, op, group)
    return [tensor] if dist.get_rank() == 0 else []  # Gloo leaves partial sums on the others


def reduce_scatter(tensor, op, group):
    output = torch.empty_like(tensor.chunk(2)[0])
    dist.reduce_scatter(output, [part.clone() for part in tensor.chunk(2)], op, group)
    return [output]


def reduce_scatter_tensor(tensor, op, group):
    output = torch.empty_like(tensor.chunk(2)[0])
    dist.reduce_scatter_tensor(output, tensor, op, group)
    return [output]


def all_reduce_coalesced(tensor, op, group):
    options = dist.AllreduceCoalescedOptions()
    options.reduceOp = op
    tensors = [part.clone() for part in tensor.chunk(3)]
    group.allreduce_coalesced(tensors, options).wait()
    return tensors


def broadcast(tensor, op, group):
    dist.broadcast(tensor, 1, group)
    return [tensor]


def all_gather(tensor, op, group):
    outputs = [torch.zeros_like(tensor) for _ in range(2)]
    dist.all_gather(outputs, tensor, group)
    return outputs


def all_gather_into_tensor(tensor, op, group):
    output = torch.cat([tensor, tensor])
    dist.all_gather_into_tensor(output, tensor, group)
    return [output]


def gather(tensor, op, group):
    outputs = [torch.zeros_like(tensor) for _ in range(2)] if dist.get_rank() == 1 else None
    dist.gather(tensor, outputs, 1, group)
    return outputs or []


def scatter(tensor, op, group):
    output = torch.zeros_like(tensor)
    dist.scatter(output, [tensor, tensor.flip(0)] if dist.get_rank() == 0 else None, 0, group)
    return [output]


def all_to_all_single(tensor, op, group):
    output = torch.zeros_like(tensor)
    dist.all_to_all_single(output, tensor, group=group)
    return [output]


def send_and_receive(tensor, op, group):
    output = torch.zeros_like(tensor)
    if dist.get_rank() == 0:
        dist.send(tensor, 1, group)
        dist.recv(output, 1, group)
    else:
        dist.recv(output, 0, group)
        dist.send(tensor, 0, group)
    return [output]


REDUCTIONS = [all_reduce, reduce, reduce_scatter, reduce_scatter_tensor, all_reduce_coalesced]
MOVEMENTS = [broadcast, all_gather, all_gather_into_tensor, gather, scatter, all_to_all_single, send_and_receive]
CALLS = {call.__name__: call for call in [*REDUCTIONS, *MOVEMENTS]}


def attempt(call, dtype, op, group):
    """The bytes of what it gives, None where it is refused. Of booleans whether they are true: Gloo's sum may be 2."""
    try:
        tensors = call(numbers(dist.get_rank(), dtype), op, group)
    except (RuntimeError, ValueError, TypeError):
        return None
    found = [tensor.contiguous().view(torch.uint8) for tensor in tensors]
    return [(t != 0 if dtype == torch.bool else t).tolist() for t in found]


def can_be_made(dtype):
    try:
        return len(numbers(0, dtype).view(torch.uint8)) >= LENGTH
    except (RuntimeError, TypeError, NotImplementedError):
        return False  # quantized, or with no conversion from other dtypes


def compare(name):
    """Which (dtype, operator) Gloo takes."""
    gloo, taken = dist.new_group(backend="gloo"), []
    operators = OPERATORS if CALLS[name] in REDUCTIONS else ["SUM"]
    dtypes = [dtype for dtype in DTYPES if can_be_made(dtype)]
    if name == "scatter":  # what Gloo's root refuses there, the other ranks wait for, or their processes end
        dtypes = [d for d in dtypes if not d.is_complex and attempt(all_gather, d, dist.ReduceOp.SUM, gloo) is not None]
    for dtype, operator in itertools.product(dtypes, operators):
        op = getattr(dist.ReduceOp, operator)
        expected = attempt(CALLS[name], dtype, op, gloo)
        if expected is not None:
            assert attempt(CALLS[name], dtype, op, dist.group.WORLD) == expected, (dtype, operator)
            taken.append((str(dtype), operator))
    dist.destroy_process_group(gloo)
    return taken


@pytest.mark.parametrize("name", CALLS)
def test_what_gloo_takes_gives_the_same_here(ranks, name):
    taken = ranks(2).run(compare, name)[0]
    assert len(taken) >= (20 if CALLS[name] in REDUCTIONS else 8), taken
    assert ("torch.float32", "SUM") in taken
