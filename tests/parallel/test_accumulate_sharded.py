"""Accumulation of gradients whose parameters are DTensors: FSDP2 and tensor parallel, against one process."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import torch_sluice
from torch_sluice.accumulate.access import read_grad

EVERY, STEPS = 3, 4


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))


def batch(rank, number):
    generator = torch.Generator().manual_seed(100 * number + rank)
    return torch.randn(8, 16, generator=generator), torch.randn(8, 4, generator=generator)


def shard(model, kind, mesh):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if kind == "fsdp":
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def train(model, optimizer, batches, session=None):
    """Micro-batches in windows of EVERY, each of which clips and steps."""
    for number in range(EVERY * STEPS):
        inputs, targets = batches(number)
        (nn.functional.mse_loss(model(inputs), targets) / EVERY).backward()
        if number % EVERY == EVERY - 1:
            for parameter in model.parameters():
                assert parameter.grad is not None
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        elif session is not None:
            assert all(read_grad(parameter) is None for parameter in model.parameters())
    return model


def accumulate_sharded(kind, policy):
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    expected = make_model()

    def everyone(number):
        parts = [batch(r, number) for r in range(size)] if kind == "fsdp" else [batch(0, number)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    train(expected, torch.optim.AdamW(expected.parameters(), 0.01), everyone)
    model = shard(make_model(), kind, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, foreach=False)
    with torch_sluice.accumulate(model, optimizer, policy=policy) as session:
        train(model, optimizer, lambda n: batch(rank if kind == "fsdp" else 0, n), session)
    assert session.steps == STEPS
    assert session.stats().fp16_share == (policy == "fp16")
    tolerance = dict(rtol=1e-4, atol=1e-6) if policy == "fp32" else dict(rtol=0.02, atol=4e-3)
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found.full_tensor(), wanted, **tolerance)


@pytest.mark.parametrize("policy", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["fsdp", "tensor parallel"])
def test_sums_of_parts_are_parts_of_the_sum(ranks, kind, policy):
    ranks(2).run(accumulate_sharded, kind, policy)


def spoil_one_part():
    from torch.distributed.tensor import DTensor

    model = shard(make_model(), "tensor parallel", init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [p.full_tensor().detach().clone() for p in model.parameters()]
    with torch_sluice.accumulate(model, optimizer) as session:
        if dist.get_rank() == 1:
            model[0].weight.register_hook(
                lambda grad: DTensor.from_local(grad.to_local() * math.nan, grad.device_mesh, grad.placements)
            )
        nn.functional.mse_loss(model(batch(0, 0)[0]), batch(0, 0)[1]).backward()
        with pytest.warns(UserWarning, match="step skipped"):
            optimizer.step()
    assert session.skipped_steps == 1
    assert all(p.full_tensor().equal(b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_part_that_is_not_finite_has_all_ranks_skip_the_step(ranks):
    ranks(2).run(spoil_one_part)
