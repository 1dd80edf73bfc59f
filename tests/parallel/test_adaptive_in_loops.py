"""Gradients reduced in few bytes where the loop has a GradScaler, and where ranks have batches in unlike numbers."""

import itertools

import pytest
import torch
import torch.distributed as dist
from parallel.test_adaptive_all_reduce import channel_of, digest, evaluate, make_model, normal, train, wrap
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_sluice.parallel import AdaptiveAllReduce
from torch_sluice.parallel.channel import rescale


class Scaler:
    """What is used of a GradScaler, with a scale for each step."""

    def __init__(self):
        self.scale = 1.0

    def get_scale(self):
        return self.scale


class Product(nn.Module):
    """Of which the gradient is what it is called with."""

    def __init__(self, elements):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(elements))

    def forward(self, factors):
        return (self.weight * factors).sum()


def deliver_scaled(kind, policy, scales, follow=True, interrupted=None):
    """The reduced gradients of each step, divided by its scale. ``interrupted``: a step before which a new state goes
    on from what the old one saved."""
    from torch.distributed.fsdp import fully_shard

    def make(model):
        scaler = Scaler()
        state = AdaptiveAllReduce(policy, grad_scaler=scaler if follow else None)
        state.apply_to_ddp(model) if kind == "ddp" else state.apply_to_fsdp(model)
        return state, scaler

    def wrap_again():
        model = Product(6000)
        return DistributedDataParallel(model) if kind == "ddp" else fully_shard(model)

    model = wrap_again()
    (state, scaler), delivered = make(model), []
    for step, scale in enumerate(scales):
        if step == interrupted:
            saved, model = state.state_dict(), wrap_again()
            state, scaler = make(model)
            state.load_state_dict(saved)
        scaler.scale = scale
        model.zero_grad()
        (model(normal(step, 6000)) * scale).backward()
        (gradient,) = (p.grad.full_tensor() if kind == "fsdp" else p.grad for p in model.parameters())
        delivered.append(gradient / scale)
    return delivered


def follow_scales():
    scales = [1.0, 64.0, 64.0, 0.25, 2.0**16, 1.0, 2.0, 1.0]
    wanted = torch.stack([torch.stack([normal(s, 6000, r) for r in range(2)]).mean(0) for s in range(len(scales))])
    for kind, policy in itertools.product(("ddp", "fsdp"), ("int8", "auto")):
        constant = deliver_scaled(kind, policy, [1.0] * len(scales), follow=False)
        for interrupted in (None, 4):
            followed = deliver_scaled(kind, policy, scales, interrupted=interrupted)
            assert all(map(torch.equal, followed, constant)), (kind, policy, interrupted)
        ignored = torch.stack(deliver_scaled(kind, policy, scales, follow=False)).sum(0)
        bias, bias_ignored = ((total - wanted.sum(0)).norm() for total in (torch.stack(followed).sum(0), ignored))
        assert bias_ignored > 100 * bias
    channel = channel_of("int8")
    channel.residual = torch.tensor([1e-30, 3e38, -1.0])
    rescale(channel.residual, 4.0)
    assert channel.residual.tolist() == [torch.tensor(4e-30).item(), 0, -4]


def test_residuals_follow_the_scale_of_a_grad_scaler(ranks):
    ranks(2).run(follow_scales)


def train_on_uneven_inputs(policy, **options):
    """A rank that has no more batches goes on taking part with gradients of zero, and with what it has not yet sent."""
    state = policy and AdaptiveAllReduce(policy)
    wrapped = wrap(state)
    with wrapped.join(**options):
        train(wrapped, wrapped, steps=4 + 16 * dist.get_rank())
    dist.barrier()
    return evaluate(wrapped.module), digest(*wrapped.parameters()), state and sum(state.traffic.formats.values())


def test_ranks_with_fewer_batches_join_in(ranks):
    (expected, *_), _ = ranks(2).run(train_on_uneven_inputs, None)
    by_rank = ranks(2).run(train_on_uneven_inputs, "int8")
    assert by_rank[0] == by_rank[1]
    assert by_rank[0][0] == pytest.approx(expected, rel=0.05)
    assert by_rank[0][0] < 0.8 * evaluate(make_model())
    assert by_rank[0][2] == 1 + 19 * 2  # DDP arranges its buckets anew after the first step
    assert ranks(2).run(train_on_uneven_inputs_divided_otherwise)[0] == by_rank[0]  # no hook can know of that


def train_on_uneven_inputs_divided_otherwise():
    return train_on_uneven_inputs("int8", divide_by_initial_world_size=False)
