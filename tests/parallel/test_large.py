"""Tensors of several gigabytes: beyond what 32 bits can count, and what the kernel reads at once."""

import os

import pytest
import torch
import torch.distributed as dist

BYTES_NEEDED = 7 << 30
MARKS = [0, 1 << 30, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32]


def available_memory():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def marked(count):
    """Zeros, which take no memory as long as they are only read, with some other bytes."""
    tensor, places = torch.zeros(count, dtype=torch.uint8), [*(mark for mark in MARKS if mark < count), count - 1]
    tensor[places] = torch.arange(1, len(places) + 1, dtype=torch.uint8)
    return tensor, places


def check(tensor, factor=1):
    expected, places = marked(tensor.numel())
    assert tensor[places].equal(factor * expected[places])
    words = tensor[: tensor.numel() // 8 * 8].view(torch.int64)  # fewer to count; no two marks share one
    assert torch.count_nonzero(words) + torch.count_nonzero(tensor[8 * words.numel() :]) == len(places)


def broadcast():
    count = (1 << 32) + 5
    tensor = marked(count)[0] if dist.get_rank() == 0 else torch.empty(count, dtype=torch.uint8)
    dist.broadcast(tensor, 0)
    if dist.get_rank() == 1:
        check(tensor)


def send():
    """Two gigabytes and more: the kernel reads less than that at once."""
    count = (1 << 31) + 5
    if dist.get_rank() == 0:
        dist.send(marked(count)[0], 1)
    else:
        tensor = torch.empty(count, dtype=torch.uint8)
        dist.recv(tensor, 0)
        check(tensor)


def all_reduce():
    tensor = marked((1 << 31) + 5)[0]
    dist.all_reduce(tensor)
    check(tensor, factor=2)


@pytest.mark.parametrize("call", [broadcast, send, all_reduce], ids=lambda call: call.__name__)
def test_several_gigabytes(ranks, call):
    if available_memory() < BYTES_NEEDED:
        pytest.skip(f"needs {BYTES_NEEDED >> 30} GB of free memory")
    ranks(2).run(call, seconds=200)
