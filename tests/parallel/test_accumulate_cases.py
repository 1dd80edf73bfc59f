"""Loops over several ranks, each with a session and in the same lines without: what the ranks decide, and what
collectives write to gradients."""

import contextlib
import warnings

import pytest
import torch
import torch.distributed as dist
from support.accumulate_training import (
    assert_close,
    assert_equal,
    assert_same,
    batches,
    gradients,
    loss_of,
    net,
    session_or_not,
    values,
)  # fmt: skip
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import torch_sluice


def everyones(tensors):
    """What each rank has of them."""
    found = []
    for tensor in tensors:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        found.append(parts)
    return found


def assert_ranks_agree(model):
    for parts in everyones(values(model)):
        assert torch.equal(parts[0], parts[1])


def fsdp(every, policy, reshard):
    from torch.distributed.fsdp import fully_shard

    results = []
    for one in (policy, None):
        model = net()
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=reshard)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        each = bool(every and one)
        with session_or_not(model, optimizer, every, one) as session:
            for i, batch in enumerate(batches(8, seed=dist.get_rank())):
                model.set_requires_gradient_sync(i % 4 == 3)
                (loss_of(model, batch) / (1 if each else 4)).backward()
                if each or i % 4 == 3:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                    optimizer.step()
                    optimizer.zero_grad()
        assert session is None or session.steps == 2
        results.append(values(model))
    assert_close(*results, 2e-6 if policy == "fp32" else 3e-3)


@pytest.mark.parametrize("policy", ["fp32", "fp16"])
@pytest.mark.parametrize("every", [None, 4])
@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp_that_reduces_in_the_last_micro_batch_only(ranks, every, policy, reshard):
    ranks(2).run(fsdp, every, policy, reshard)


def average_by_hand(policy):
    results = []
    for one in (policy, None):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with session_or_not(model, optimizer, None, one):
            for start in (0, 3):
                for batch in batches(6, seed=dist.get_rank())[start : start + 3]:
                    (loss_of(model, batch) / 3).backward()
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)  # leaves the tensor's version as it is
                    parameter.grad /= 2
                (1e-2 * sum(p.square().sum() for p in model.parameters())).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert_ranks_agree(model)
        results.append(values(model))
    assert_equal(*results, policy)


@pytest.mark.parametrize("policy", ["fp32", "fp16", "auto"])
def test_gradients_averaged_by_hand_before_another_pass(ranks, policy):
    ranks(2).run(average_by_hand, policy)


def spoil_one_rank(every, policy):
    """A NaN in rank 0's data: its own gradients show it before the reduction, all others' after."""
    model = net()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    data = batches(8, seed=dist.get_rank())
    if dist.get_rank() == 0:
        data[3][0, 0] = torch.nan
    with torch_sluice.accumulate(wrapped, optimizer, every, policy=policy) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, batch in enumerate(data):
            with contextlib.nullcontext() if i % 2 else wrapped.no_sync():
                (loss_of(wrapped, batch) / (1 if every else 2)).backward()
            if every or i % 2:
                before = values(model)
                optimizer.step()
                if i == 3:
                    assert_same(values(model), before)
                optimizer.zero_grad()
    assert (session.steps, session.skipped_steps) == (3, 1)
    assert all(value.isfinite().all() for value in values(model))
    assert_ranks_agree(model)


@pytest.mark.parametrize("policy", ["fp32", "fp16"])
@pytest.mark.parametrize("every", [None, 2])
def test_all_ranks_skip_a_step_that_one_has_spoiled(ranks, every, policy):
    ranks(2).run(spoil_one_rank, every, policy)


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.always, self.sometimes = net(), net(1)

    def forward(self, x, both):
        return self.always(x) + self.sometimes(x) if both else self.always(x)


def unused(policy, every, quiet):
    results = []
    for one in (policy, None):
        model = Sometimes()
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        each = bool(every and one)
        seen = []
        with session_or_not(wrapped, optimizer, every, one):
            for i, batch in enumerate(batches(9, seed=dist.get_rank())):
                last = i % 3 == 2
                with wrapped.no_sync() if quiet and not last else contextlib.nullcontext():
                    loss = wrapped(batch, both=not last).square().mean()
                    (loss / (1 if each else 3)).backward()
                if last:
                    seen += gradients(model)
                if each or last:
                    optimizer.step()
                    optimizer.zero_grad()
        assert_ranks_agree(model)
        results.append([*values(model), *seen])
    assert_close(*results, 2e-6 if policy == "fp32" else 3e-3)


@pytest.mark.parametrize("policy", ["fp32", "fp16"])
@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("quiet", [True, False])
def test_a_parameter_unused_in_the_micro_batch_that_reduces(ranks, policy, every, quiet):
    ranks(2).run(unused, policy, every, quiet)
