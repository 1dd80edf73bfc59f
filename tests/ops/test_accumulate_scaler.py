"""Gradients that are not finite, GradScaler, and micro-batches that weigh differently."""

import warnings

import pytest
import torch
from torch import nn

import torch_sluice
from torch_sluice.accumulate.access import read_grad

N = 3


def make(optimizer=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 20))
    return model, optimizer(model.parameters(), 1e-2, **options)


def batches(count, seed=1, rows=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 20, generator=generator) for _ in range(count)]


def loss_of(model, batch):
    return model(batch).square().mean()


def values(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def make_scaler(**options):
    return torch.amp.GradScaler("cpu", **{"init_scale": 2.0**10, "growth_interval": 2, **options})


def train(data, accumulated, each, policy="fp32", unscale=False, optimizer=torch.optim.AdamW, **options):
    """The loop of the GradScaler documentation, with or without Sluice; step after each micro-batch, or after N."""
    model, optimizer = make(optimizer, **options)
    scaler, scales = make_scaler(), []

    def loop():
        for i, batch in enumerate(data):
            loss = loss_of(model, batch)
            scaler.scale(loss if accumulated and each else loss / N).backward()
            if (accumulated and each) or (i + 1) % N == 0:
                if unscale:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            scales.append(scaler.get_scale())

    if not accumulated:
        loop()
        return values(model), scales, None
    with torch_sluice.accumulate(model, optimizer, N if each else None, policy=policy) as accumulation:
        loop()
    return values(model), scales, accumulation


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_grad_scaler(each, unscale, fused):
    data = batches(5 * N)
    got, scales, accumulation = train(data, True, each, unscale=unscale, fused=fused)
    expected, expected_scales, _ = train(data, False, each, unscale=unscale, fused=fused)
    close(got, expected)
    assert scales == expected_scales
    assert scales[-1] > scales[0]
    assert (accumulation.steps, accumulation.skipped_steps) == (5, 0)


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_grad_scaler_backs_off_and_nothing_else_is_lost(each, fused):
    data = batches(5 * N)
    data[N + 1][0, 0] = torch.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a GradScaler's own skipping is no news
        got, scales, accumulation = train(data, True, each, fused=fused)
    expected, expected_scales, _ = train(data, False, each, fused=fused)
    close(got, expected)
    assert scales == expected_scales
    assert scales[2 * N - 1] < scales[0]
    assert (accumulation.steps, accumulation.skipped_steps) == (4, 1)


def test_grad_scaler_that_is_disabled_and_one_of_another_optimizer():
    data = batches(2 * N)
    model, optimizer = make()
    other_model, other = make()
    off, on = torch.amp.GradScaler("cpu", enabled=False), make_scaler()
    with torch_sluice.accumulate(model, optimizer, every=N, policy="fp32") as accumulation:
        for batch in data:
            off.scale(loss_of(model, batch)).backward()
            off.step(optimizer)
            off.update()
            optimizer.zero_grad()
            on.scale(loss_of(other_model, batch)).backward()
            on.step(other)
            on.update()
            other.zero_grad()
    assert accumulation.steps == 2
    assert on.get_scale() == 2.0 ** (10 + N)
    assert torch.amp.GradScaler.step.__module__ == "torch.amp.grad_scaler"


@pytest.mark.parametrize("policy", ["fp32", "fp16", "auto", "seed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_gradients_that_are_not_finite_is_skipped(policy, value):
    data = batches(4 * N)
    model, optimizer = make()
    data[N][1, 1] = value
    with torch_sluice.accumulate(model, optimizer, every=N, policy=policy) as accumulation:
        for i, batch in enumerate(data):
            loss_of(model, batch).backward()
            if i == 2 * N - 1:
                before, state = values(model), optimizer.state_dict()["state"][0]["step"].clone()
                with pytest.warns(UserWarning, match=r"step skipped: [14] of 4 gradients are not finite \(0.weight"):
                    optimizer.step()
                assert all(torch.equal(x, y) for x, y in zip(before, values(model), strict=True))
                assert torch.equal(state, optimizer.state_dict()["state"][0]["step"])
            else:
                optimizer.step()
            optimizer.zero_grad()
    assert (accumulation.steps, accumulation.skipped_steps, accumulation.held_steps) == (3, 1, 4 * (N - 1))
    got = values(model)
    model, optimizer = make()
    for i, batch in enumerate(data[:N] + data[2 * N :]):
        (loss_of(model, batch) / N).backward()
        if (i + 1) % N == 0:
            optimizer.step()
            optimizer.zero_grad()
    tolerance = 1e-6 if policy in ("fp32", "seed") else 2e-4
    torch.testing.assert_close(got, values(model), rtol=0, atol=tolerance)


def test_gradients_that_were_mended_before_the_step_are_used():
    model, optimizer = make(torch.optim.SGD)
    (batch,) = batches(1)
    with torch_sluice.accumulate(model, optimizer, every=1) as accumulation:
        (loss_of(model, batch) * torch.tensor(torch.inf)).backward()
        for parameter in model.parameters():
            parameter.grad.nan_to_num_(0.0, 1.0, -1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
    assert (accumulation.steps, accumulation.skipped_steps) == (1, 0)


def test_a_sum_that_overflows_is_skipped_too():
    model, optimizer = make(torch.optim.SGD)
    with torch_sluice.accumulate(model, optimizer, every=N, policy="fp32") as accumulation:
        for i, batch in enumerate(batches(N)):
            (model(batch) * 3e38).sum().backward()
            if i < N - 1:
                optimizer.step()
        with pytest.warns(UserWarning, match="step skipped"):
            optimizer.step()
    assert accumulation.skipped_steps == 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("policy", ["fp32", "fp16"])
def test_micro_batches_weigh_by_their_tokens(reduction, policy):
    """Over batches of different sizes the result is that of one large batch."""
    sizes = [[1, 5, 2], [7, 1, 1]]
    model, optimizer = make(torch.optim.SGD)
    expected, plain = make(torch.optim.SGD)
    with torch_sluice.accumulate(model, optimizer, every=N, policy=policy, reduction=reduction) as accumulation:
        for window, rows in enumerate(sizes):
            data = [batches(1, seed=10 * window + i, rows=count)[0] for i, count in enumerate(rows)]
            loss_of(expected, torch.cat(data)).backward()
            plain.step()
            plain.zero_grad()
            for batch in data:
                accumulation.count(torch.tensor(len(batch)))
                loss = loss_of(model, batch)
                (loss if reduction == "mean" else loss * len(batch)).backward()
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(values(model), values(expected), rtol=1e-4, atol=1e-6 if policy == "fp32" else 1e-4)


def test_counting_some_micro_batches_only_is_an_error():
    model, optimizer = make()
    data = batches(2)
    accumulation = torch_sluice.accumulate(model, optimizer, every=N)
    with pytest.raises(RuntimeError, match="count\\(\\) was called for earlier micro-batches of this window but not"):
        with accumulation:
            accumulation.count(4)
            loss_of(model, data[0]).backward()
            optimizer.step()
            loss_of(model, data[1]).backward()
    with pytest.raises(RuntimeError, match="count\\(\\) was not called for earlier micro-batches"):
        with torch_sluice.accumulate(model, optimizer, every=N) as accumulation:
            loss_of(model, data[0]).backward()
            accumulation.count(4)
    for tokens in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"tokens is {float(tokens)}, expected a finite number of at least 0"):
            torch_sluice.accumulate(model, optimizer, every=N).count(tokens)


def test_low_memory_steps_one_parameter_at_a_time():
    data = batches(2 * N)
    model, optimizer = make()
    seen = []
    step = optimizer.step

    def watched(*args):
        seen.append(sum(parameter.grad is not None for parameter in model.parameters()))
        return step(*args)

    optimizer.step = watched
    options = dict(policy="fp32", low_memory=True, max_norm=1e-2)
    with torch_sluice.accumulate(model, optimizer, every=N, **options) as accumulation:
        for batch in data:
            loss_of(model, batch).backward()
            assert all(read_grad(parameter) is None for parameter in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    assert seen == [1] * 8
    assert accumulation.steps == 2
    expected, plain = make()
    for i, batch in enumerate(data):
        (loss_of(expected, batch) / N).backward()
        if (i + 1) % N == 0:
            nn.utils.clip_grad_norm_(expected.parameters(), 1e-2)
            plain.step()
            plain.zero_grad()
    close(values(model), values(expected))


def test_low_memory_skips_what_is_not_finite_and_refuses_what_must_see_gradients():
    model, optimizer = make()
    scaler = make_scaler()
    with torch_sluice.accumulate(model, optimizer, every=1, low_memory=True) as accumulation:
        loss_of(model, batches(1)[0] * torch.nan).backward()
        before = values(model)
        with pytest.warns(UserWarning, match="step skipped"):
            optimizer.step()
        assert all(torch.equal(x, y) for x, y in zip(before, values(model), strict=True))
        scaler.scale(loss_of(model, batches(1)[0])).backward()
        with pytest.raises(RuntimeError, match="low_memory=True hides gradients from GradScaler"):
            scaler.step(optimizer)
        accumulation.reset()
