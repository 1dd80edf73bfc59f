"""Loops, policies, what stands around the model, and optimizers: with a session each gives what it gives without.

Not all combinations, but each pair of a loop, a policy, a wrapper and an optimizer.
"""

import contextlib

import pytest
import torch
from support.accumulate_loops import BFLOAT16_ERROR, ERRORS, LOOPS, OPTIMIZERS, Side, check, pairs
from support.accumulate_training import assert_close, assert_same, batches, loss_of, net, session_or_not, values
from torch.utils.checkpoint import checkpoint

POLICIES = ["fp32", "fp16", "auto"]


class Checkpointed(torch.nn.Module):
    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        hidden = checkpoint(self.model[:2], x.requires_grad_(), use_reentrant=self.reentrant)
        return checkpoint(self.model[2], hidden, use_reentrant=self.reentrant)


class Cast(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x).float()


def compiled(model):
    return torch.compile(model, backend="aot_eager")


WRAPPERS = {
    "none": lambda model: model,
    "reentrant checkpoint": lambda model: Checkpointed(model, True),
    "checkpoint": lambda model: Checkpointed(model, False),
    "compile": compiled,
    "autocast": Cast,
    "scaler": lambda model: model,
}


def make_side(wrapper, optimizer, policy):
    model = net()
    side = Side(model, WRAPPERS[wrapper](model), OPTIMIZERS[optimizer](model.parameters()), policy, batches(8))
    if wrapper == "scaler":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)

        def step(optimizer):
            scaler.step(optimizer)
            scaler.update()
            side.seen.append(torch.tensor(scaler.get_scale()) if not side.seen else side.seen.pop())

        side.backward, side.step = lambda loss: scaler.scale(loss).backward(), step
    return side


def possible(loop, wrapper, optimizer, policy):
    if loop == "closure":  # GradScaler takes none; a line search turns small errors into other steps
        return wrapper != "scaler" and (optimizer != "lbfgs" or policy == "fp32")
    # Line search needs a closure. Clipping before a scaler unscales is no loop that anybody wants.
    return optimizer != "lbfgs" and not (wrapper == "scaler" and "clip" in loop)


CASES = pairs(LOOPS, WRAPPERS, OPTIMIZERS, POLICIES, allowed=possible)
CASES += [case for case in pairs(LOOPS, WRAPPERS, OPTIMIZERS, ["fp32"], allowed=possible) if case not in CASES]


@pytest.mark.parametrize(("loop", "wrapper", "optimizer", "policy"), CASES)
def test_training_with_a_session_is_training_without(loop, wrapper, optimizer, policy):
    error = BFLOAT16_ERROR if wrapper == "autocast" else 0.0
    check(loop, policy, [make_side(wrapper, optimizer, one) for one in (policy, None)], error)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("optimizer", ["sgd", "foreach adamw"])
def test_two_optimizers_and_heads_that_take_turns(policy, optimizer):
    """A trunk with two heads, each with an optimizer; heads alternate, and each steps every other time."""
    results, start = [], [*values(net()), *values(net(1)), *values(net(2))]
    for one in (policy, None):
        trunk, heads = net(), [net(1), net(2)]
        makers = [OPTIMIZERS[optimizer](module.parameters()) for module in (trunk, *heads)]
        with contextlib.ExitStack() as stack:
            for module, made in zip((trunk, *heads), makers, strict=True):
                stack.enter_context(session_or_not(module, made, None, one))
            for i, batch in enumerate(batches(12)):
                head, made = heads[i % 2], makers[1 + i % 2]
                (loss_of(head, trunk(batch)) / 3).backward()
                if i % 4 == 3 or i % 4 == 2:
                    made.step()
                    made.zero_grad()
                if i % 3 == 2:
                    makers[0].step()
                    makers[0].zero_grad()
        results.append([*values(trunk), *values(heads[0]), *values(heads[1])])
    found, wanted = ([one - first for one, first in zip(side, start, strict=True)] for side in results)
    assert_same(found, wanted) if policy == "fp32" else assert_close(found, wanted, ERRORS[policy])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_generator_and_its_critic(policy):
    results = []
    for one in (policy, None):
        generator, critic = net(), net(1)
        ours, theirs = OPTIMIZERS["adamw"](generator.parameters()), OPTIMIZERS["momentum"](critic.parameters())
        with session_or_not(generator, ours, None, one), session_or_not(critic, theirs, None, one):
            for start in range(0, 12, 2):
                pair = batches(12)[start : start + 2]
                theirs.zero_grad()
                for batch in pair:
                    (loss_of(critic, generator(batch).detach()) / 2).backward()
                    (-loss_of(critic, batch) / 2).backward()
                theirs.step()
                ours.zero_grad()
                for batch in pair:
                    (-loss_of(critic, generator(batch)) / 2).backward()  # the critic gets gradients too, and drops them
                ours.step()
        results.append([*values(generator), *values(critic)])
    if policy == "fp32":
        assert_same(*results)
    else:
        first = [*values(net()), *values(net(1))]
        assert_close(*([one - old for one, old in zip(side, first, strict=True)] for side in results), ERRORS[policy])
