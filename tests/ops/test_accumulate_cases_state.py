"""States of sessions and counts of tokens, and what compiles, prepares or holds models and optimizers."""

import io

import pytest
import torch
from support.accumulate_training import (
    assert_close,
    assert_same,
    batches,
    gradients,
    loss_of,
    net,
    session_or_not,
    sgd,
    values,
)
from support.devices import INDUCTOR

import torch_sluice


def trained(every=None, policy="fp16", model=None):
    """A session in the middle of a window, open."""
    model = model or net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    session = torch_sluice.accumulate(model, optimizer, every, policy=policy)
    session.__enter__()
    for i, batch in enumerate(batches(5)):
        loss_of(model, batch).backward()
        if every or i % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer, session


def test_a_state_that_is_refused_changes_nothing():
    _, _, session = trained()
    state = session.state_dict()
    session.__exit__(None, None, None)
    model, _, other = trained(policy="fp32")
    before, steps = gradients(model), other.steps
    for spoil in (dict.clear, lambda one: one.update(extra=1)):
        broken = torch.load(io.BytesIO(saved(state)), weights_only=True)
        last = max(broken["parameters"])
        if spoil is dict.clear:
            broken["parameters"][last].clear()
        else:
            broken["parameters"]["no such parameter"] = broken["parameters"].pop(last)
        with pytest.raises(ValueError, match=last):
            other.load_state_dict(broken)
        assert_same(gradients(model), before)
        assert other.steps == steps
    other.__exit__(None, None, None)


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@INDUCTOR
@pytest.mark.parametrize("direction", ["into the plain model", "into the compiled model"])
def test_the_state_of_a_compiled_model_is_that_of_the_plain_one(direction):
    from_compiled = direction == "into the plain model"
    source = torch.compile(net(), backend="eager") if from_compiled else net()
    model, _, session = trained(model=source)
    state, wanted = session.state_dict(), gradients(model)
    assert not any("_orig_mod" in name for name in state["parameters"])
    target = net() if from_compiled else torch.compile(net(), backend="eager")
    with torch_sluice.accumulate(target, sgd(target), policy="fp16") as other:
        other.load_state_dict(state)
        assert_same(gradients(target), wanted)
    session.__exit__(None, None, None)


@INDUCTOR
@pytest.mark.filterwarnings("ignore")
def test_compiled_autograd():
    import torch._dynamo.compiled_autograd

    results = []
    for policy in ("fp32", None):
        model = net()
        optimizer = sgd(model)
        with session_or_not(model, optimizer, None, policy):
            for i, batch in enumerate(batches(4)):
                loss = loss_of(model, batch)
                with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
                    loss.backward()
                if i % 2:
                    optimizer.step()
                    optimizer.zero_grad()
        results.append(values(model))
    assert_close(*results)


def test_micro_batches_without_tokens_count():
    model, plain = net(), net()
    optimizer, other = torch.optim.SGD(model.parameters(), 1.0), torch.optim.SGD(plain.parameters(), 1.0)
    first, second, third = batches(3, rows=5)
    with torch_sluice.accumulate(model, optimizer, every=3, policy="fp32") as session:
        for batch in (first[:0], second, third[:2]):
            session.count(len(batch))
            loss = loss_of(model, batch) if len(batch) else 0 * sum(p.sum() for p in model.parameters())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    loss_of(plain, torch.cat([second, third[:2]])).backward()
    other.step()
    assert_close(values(model), values(plain))


@pytest.mark.parametrize("every", [None, 1, 2])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_tokens_of_a_micro_batch_that_was_thrown_away_go_too(every, set_to_none):
    model, plain = net(), net()
    optimizer = sgd(model)
    first, second = batches(2)
    with torch_sluice.accumulate(model, optimizer, every, policy="fp32") as session:
        session.count(2)
        loss_of(model, first).backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        session.count(5)
        loss_of(model, second).backward()
        found = gradients(model)
        session.reset()
    loss_of(plain, second).backward()
    assert_close(found, gradients(plain))


@pytest.mark.parametrize("every", [None, 3])
def test_an_optimizer_that_accelerate_prepared(every, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=1 if every else 3, cpu=True)
    model, optimizer = net(), None
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    with torch_sluice.accumulate(model, optimizer, every, policy="fp32") as session:
        for batch in batches(18):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch))
                optimizer.step()
                optimizer.zero_grad()
    plain = net()
    other = sgd(plain)
    for i, batch in enumerate(batches(18)):
        (loss_of(plain, batch) / 3).backward()
        if i % 3 == 2:
            other.step()
            other.zero_grad()
    assert_close(values(model), values(plain))
    assert session.steps == 6


def test_accelerates_own_accumulation_and_every_are_too_much():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=3, cpu=True)
    model = net()
    model, optimizer = accelerator.prepare(model, sgd(model))
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        with torch_sluice.accumulate(model, optimizer, every=3):
            pass
