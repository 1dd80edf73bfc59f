"""Loops and what people do to ``.grad`` in them, each with a session and in the same lines without."""

import warnings

import pytest
import torch
from support.accumulate_training import (
    assert_close,
    assert_equal,
    assert_same,
    batches,
    both,
    gradients,
    loss_of,
    net,
    session_or_not,
    sgd,
    values,
)
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

import torch_sluice

POLICIES = ["fp32", "fp16", "auto"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_epochs_of_windows_the_last_of_which_is_short(policy, clip):
    def loop(model, optimizer, session):
        norms = []
        for epoch in range(3):
            for start in (0, 4, 8, 12, 16):
                window = batches(18, seed=epoch)[start : start + 4]
                for batch in window:
                    (loss_of(model, batch) / len(window)).backward()
                if clip:
                    norms.append(clip_grad_norm_(model.parameters(), clip))
                optimizer.step()
                optimizer.zero_grad()
        assert session is None or session.steps == 15
        return norms

    assert_equal(*both(loop, policy), policy)


def test_epochs_that_never_fill_a_window_of_four():
    def loop(model, optimizer, session):
        for epoch in range(5):
            for batch in batches(3, seed=epoch):
                (loss_of(model, batch) / 4).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_same(*both(loop, "fp32"))


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_used_twice_each_time_in_a_checkpoint(reentrant, every):
    def loop(model, optimizer, session):
        shared = nn.Sequential(model[0], model[1])
        for i, batch in enumerate(batches(16)):
            first = checkpoint(shared, batch.requires_grad_(), use_reentrant=reentrant)
            second = checkpoint(shared, first[:, :20], use_reentrant=reentrant)
            loss = model[2](second).square().mean()
            each = every is not None and session is not None
            (loss if each else loss / 2).backward()
            if each or i % 2:
                optimizer.step()
                optimizer.zero_grad()
        assert session is None or (session.steps, session.held_steps) == (8, 8 if every else 0)

    assert_close(*both(loop, "fp32", every))


@pytest.mark.parametrize("policy", POLICIES)
def test_two_backward_passes_in_a_micro_batch(policy):
    def loop(model, optimizer, session):
        for i, batch in enumerate(batches(8)):
            weight = 1 if session else 1 / 2
            (weight * loss_of(model, batch)).backward()
            (weight * 1e-2 * sum(p.square().sum() for p in model.parameters())).backward()
            if session or i % 2:
                optimizer.step()
                optimizer.zero_grad()
        assert session is None or (session.steps, session.held_steps) == (4, 4)

    assert_close(*both(loop, policy, every=2), 2e-6 if policy == "fp32" else 3e-3)


@pytest.mark.parametrize("every", [None, 2])
def test_a_session_that_is_left_and_entered_again(every):
    found, wanted = net(), net()
    optimizer, plain = sgd(found), sgd(wanted)
    session = torch_sluice.accumulate(found, optimizer, every, policy="fp32")
    for epoch in range(3):
        data = batches(4, seed=epoch)
        with session:
            for i, batch in enumerate(data):
                (loss_of(found, batch) / (1 if every else 2)).backward()
                if every or i % 2:
                    optimizer.step()
                    optimizer.zero_grad()
        for i, batch in enumerate(data):
            (loss_of(wanted, batch) / 2).backward()
            if i % 2:
                plain.step()
                plain.zero_grad()
        assert_close(values(found), values(wanted))
    assert session.steps == 6


def test_a_new_session_begins_a_window_of_its_own():
    model = net()
    optimizer = sgd(model)
    with pytest.warns(UserWarning, match="1 of 2"), torch_sluice.accumulate(model, optimizer, every=2):
        loss_of(model, batches(1)[0]).backward()
        optimizer.step()
    model.zero_grad()
    with torch_sluice.accumulate(model, optimizer, every=2) as session:
        for batch in batches(4):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (session.steps, session.held_steps) == (2, 2)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("whose", ["optimizer", "model"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_batch_thrown_away_in_the_middle_of_a_window(policy, whose, set_to_none):
    def loop(model, optimizer, session):
        for i, batch in enumerate(batches(9)):
            loss_of(model, batch if i != 4 else 100 * batch).backward()
            if i == 4:
                (optimizer if whose == "optimizer" else model).zero_grad(set_to_none=set_to_none)
            elif i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()

    assert_equal(*both(loop, policy), policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", ["zero_grad", "zero_grad to zero", "assigned", "deleted", "reset"])
def test_a_spoiled_batch_that_was_thrown_away_spoils_no_step(policy, how):
    model = net()
    optimizer = sgd(model)
    good, bad = batches(1)[0], 1e30 * batches(1, seed=2)[0]
    with warnings.catch_warnings(), torch_sluice.accumulate(model, optimizer, policy=policy) as session:
        warnings.simplefilter("error")
        for step in range(1, 5):
            loss_of(model, bad).backward()
            if how == "reset":
                session.reset()
            elif how.startswith("zero_grad"):
                optimizer.zero_grad(set_to_none=how == "zero_grad")
            for parameter in model.parameters():
                if how == "assigned":
                    parameter.grad = torch.zeros_like(parameter)
                elif how == "deleted":
                    del parameter.grad
            loss_of(model, good).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert (session.steps, session.skipped_steps) == (step, 0)
            assert all(value.isfinite().all() for value in values(model))


def test_a_window_thrown_away_where_step_is_called_after_each_micro_batch():
    found, wanted = net(), net()
    optimizer, plain = sgd(found), sgd(wanted)
    data = batches(6)
    with torch_sluice.accumulate(found, optimizer, every=3, policy="fp32") as session:
        for i, batch in enumerate(data):
            if i == 2:
                loss_of(found, batches(1, seed=9)[0]).backward()
                with pytest.warns(UserWarning, match="window"):
                    optimizer.zero_grad()
            loss_of(found, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert (session.steps, session.held_steps) == (1, 5)
        sum_so_far = gradients(found)
    for batch in data[2:5]:
        (loss_of(wanted, batch) / 3).backward()
    plain.step()
    plain.zero_grad()
    assert_close(values(found), values(wanted))
    (loss_of(wanted, data[5]) / 3).backward()
    assert_close(sum_so_far, gradients(wanted))


def test_a_discriminator_that_gets_gradients_in_the_generators_turn():
    """Without ``every`` it is as plain; with it, gradients that no step() takes are an error that says what to do."""

    def train(policy):
        generator, critic = net(0), net(1)
        ours, theirs = sgd(generator), sgd(critic)
        with session_or_not(generator, ours, None, policy), session_or_not(critic, theirs, None, policy):
            for i, batch in enumerate(batches(6)):
                if i % 2 == 0:
                    theirs.zero_grad()
                (loss_of(critic, generator(batch).detach()) + loss_of(critic, batch)).backward()
                if i % 2:
                    theirs.step()
                    ours.zero_grad()
                    (-loss_of(critic, generator(batch))).backward()  # the critic gets gradients that nobody wants
                    ours.step()
        return [*values(generator), *values(critic)]

    for policy in POLICIES:
        assert_equal(train(policy), train(None), policy)
    generator, critic = net(0), net(1)
    theirs = sgd(critic)
    with torch_sluice.accumulate(critic, theirs, every=2):
        for _ in range(3):
            loss_of(critic, batches(1)[0]).backward()
            theirs.step()
        loss_of(critic, generator(batches(1)[0])).backward()
        with pytest.raises(RuntimeError, match="every"):
            theirs.zero_grad()
