"""What the tests of accumulation train and compare: a network of the field's plainest kind, in one process or ranks."""

import contextlib

import torch
from torch import nn

import torch_sluice

# How far gradients, and weights after a few steps of SGD, may be off, relative to the norm of the right ones.
ERRORS = {"fp32": 2e-6, "fp16": 3e-3, "auto": 3e-3}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 20))


def batches(count, seed=1, rows=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 20, generator=generator) for _ in range(count)]


def loss_of(model, batch):
    return model(batch).square().mean()


def values(model):
    """The weights, of DTensors all of them."""
    found = [parameter.detach() for parameter in model.parameters()]
    return [(one.full_tensor() if hasattr(one, "full_tensor") else one).clone() for one in found]


def gradients(model):
    return [None if parameter.grad is None else parameter.grad.detach().clone() for parameter in model.parameters()]


def session_or_not(model, optimizer, every=None, policy=None, **options):
    """A session with this policy; None: nothing, which is plain PyTorch."""
    if policy is None:
        return contextlib.nullcontext()
    return torch_sluice.accumulate(model, optimizer, every, policy=policy, **options)


def assert_same(found, wanted):
    """Bit by bit."""
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert (one is None) == (other is None), f"tensor {i}: {one is None}, expected {other is None}"
        if one is not None:
            assert torch.equal(one, other), f"tensor {i}: off by {(one - other).abs().max():.3g}"


def assert_close(found, wanted, error=2e-6):
    """Each within ``error``, relative to the norm of what it should be."""
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert (one is None) == (other is None), f"tensor {i}: {one is None}, expected {other is None}"
        if one is not None:
            off = (one.double() - other.double()).norm().item()
            right = other.double().norm().item()
            assert off <= error * right, (
                f"tensor {i}: off by {off:.3g} of {right:.3g}, expected below {error:.1g} of it"
            )


def assert_equal(found, wanted, policy):
    """As ``policy`` promises: the bits in float32, a small error in float16."""
    if policy in (None, "fp32"):
        assert_same(found, wanted)
    else:
        assert_close(found, wanted, ERRORS[policy])


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def both(loop, policy, every=None):
    """What ``loop(model, optimizer, session)`` returns with a session and without, each on a model of its own."""
    results = []
    for one in (policy, None):
        model = net()
        optimizer = sgd(model)
        with session_or_not(model, optimizer, every, one) as session:
            seen = loop(model, optimizer, session)
        results.append(values(model) if seen is None else [*values(model), *seen])
    return results
