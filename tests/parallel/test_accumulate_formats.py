"""Ranks that share gradients agree on the format of each sum, and ask each other while training goes on."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import torch_sluice

SIZE = 4096


class Given(nn.Module):
    """A model whose gradient is its input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, SIZE // 2))

    def forward(self, gradient):
        return (self.weight * gradient).sum()


def normal(seed):
    return torch.randn(2, SIZE // 2, generator=torch.Generator().manual_seed(seed))


def formats_of_windows(kind, cancels, windows):
    """The format that each window's sum began in on this rank: windows of three gradients, which cancel where
    ``cancels(rank, window)`` says so."""
    rank = dist.get_rank()
    model = Given()
    if kind == "ddp":
        called = DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        called = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    formats = []
    with torch_sluice.accumulate(model, optimizer) as session:
        for window in range(windows):
            gradients = [normal(3 * window + number) for number in range(3)]
            if cancels(rank, window):
                gradients[2] = 1e-4 * gradients[2] - gradients[0] - gradients[1]
            for number, gradient in enumerate(gradients):
                if kind == "ddp":
                    called.require_backward_grad_sync = number == 2
                called(gradient).backward()
                if number == 0:
                    formats.append(session.stats().parameters["weight"].format)
            optimizer.step()
            optimizer.zero_grad()
    return formats


def compare(kind, cancels, windows, expected):
    mine = formats_of_windows(kind, cancels, windows)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    assert everyone[0] == everyone[1] == expected, everyone


def always_on_rank_0(rank, window):
    return rank == 0


def never(rank, window):
    return False


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_all_ranks_go_to_float16_in_the_same_window(ranks, kind):
    ranks(2).run(compare, kind, never, 5, ["fp32", "fp32", "fp16", "fp16", "fp16"])


def test_a_rank_whose_sums_cancel_keeps_all_in_float32(ranks):
    ranks(2).run(compare, "ddp", always_on_rank_0, 5, ["fp32"] * 5)


def promote_on_one_rank():
    return formats_of_windows("ddp", lambda rank, window: rank == 0 and window == 3, 7)


def test_a_promotion_is_heard_by_the_others_a_window_later(ranks):
    first, second = ranks(2).run(promote_on_one_rank)
    assert first == ["fp32", "fp32", "fp16", "fp16", "fp32", "fp32", "fp32"]
    assert second == ["fp32", "fp32", "fp16", "fp16", "fp16", "fp32", "fp32"]
