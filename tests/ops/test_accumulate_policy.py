"""Which format sums get, what that costs, and what the session tells about it."""

import json

import pytest
import torch
from torch import nn

import torch_sluice
from torch_sluice.accumulate.accumulator import Accumulator
from torch_sluice.accumulate.operators import BLOCK
from torch_sluice.accumulate.policy import ROUNDING, AutoPolicy, Record, make_policy


class Given(nn.Module):
    """A model whose gradients are what one says."""

    def __init__(self, **sizes):
        super().__init__()
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size)))

    def backward(self, **gradients):
        sum((getattr(self, name) * gradient).sum() for name, gradient in gradients.items()).backward()


def accumulate(model, every, **options):
    return torch_sluice.accumulate(model, torch.optim.SGD(model.parameters(), 1.0), every=every, **options)


def run_window(session, model, gradients, name="w"):
    """One window; returns the averaged gradient that the optimizer saw."""
    before = getattr(model, name).detach().clone()
    for gradient in gradients:
        model.backward(**{name: gradient})
        session.optimizer.step()
        session.optimizer.zero_grad()
    return before - getattr(model, name).detach()


def normal(seed, size=5000, scale=1.0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def test_the_rule_of_the_seed():
    """Norm above 1e-3: float32. The sum is in float32 from the first such gradient on, and was in float16 before."""
    model = Given(w=5000)
    small, large = normal(0) / normal(0).norm() * 0.9e-3, normal(1) / normal(1).norm() * 1.1e-3
    with accumulate(model, 3, policy="seed") as session:
        formats = []
        for gradients in ([small, small, small], [large, small, small], [small, large, small]):
            for gradient in gradients:
                model.backward(w=gradient)
                formats.append(session.stats().parameters["w"].format)
                session.optimizer.step()
                session.optimizer.zero_grad()
    assert formats == ["fp16", "fp16", "fp16", "fp32", "fp32", "fp32", "fp16", "fp32", "fp32"]
    assert session.stats().promotions == 1


def test_the_seed_policy_keeps_large_gradients_exactly():
    model = Given(w=5000)
    gradients = [normal(i) for i in range(4)]
    with accumulate(model, 4, policy="seed") as session:
        got = run_window(session, model, gradients)
    expected = sum(gradients[1:], gradients[0].clone()) * 0.25
    assert torch.equal(got, expected)


def exact(gradients):
    return torch.stack(gradients).double().mean(0)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_auto_goes_to_float16_after_a_window_whatever_the_norm(scale):
    model = Given(w=5000)
    gradients = [normal(i, scale=scale) for i in range(16)]
    with accumulate(model, 16) as session:
        first = run_window(session, model, gradients)
        assert session.stats().parameters["w"].format == "fp32"
        model.w.data.zero_()
        got = run_window(session, model, gradients)
        stats = session.stats().parameters["w"]
    assert (first - exact(gradients)).norm() < 1e-6 * first.norm()
    error = (got - exact(gradients)).norm() / exact(gradients).norm()
    assert stats.format == "fp16"
    assert 1e-5 < error < 2e-3
    assert error == pytest.approx(stats.error, rel=0.1)
    assert stats.step_norm == pytest.approx(exact(gradients).norm().item(), rel=1e-3)


@pytest.mark.parametrize("every", [2, 3, None])
@pytest.mark.parametrize("noise", [1e-2, 1e-4])
def test_auto_stays_in_float32_where_sums_cancel(noise, every):
    """Nothing that comes later mends what rounding the first gradient has cost, so none is rounded."""
    model = Given(w=5000)
    gradients = [normal(0), normal(1, scale=noise), -normal(0)][:: 2 if every == 2 else 1]
    gradients[-1] = gradients[-1] + normal(2, scale=noise)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    with torch_sluice.accumulate(model, optimizer, every, tolerance=2e-3) as session:
        for _ in range(4):
            before = model.w.detach().clone()
            for number, gradient in enumerate(gradients):
                model.backward(w=gradient)
                if every is not None or number + 1 == len(gradients):
                    optimizer.step()
                    optimizer.zero_grad()
            got = before - model.w.detach()
            wanted = exact(gradients) * (1 if every else len(gradients))
            assert (got - wanted).norm() <= 2e-3 * wanted.norm()
        assert session.stats().parameters["w"].format == "fp32"


def test_auto_says_once_when_a_calm_parameter_cancels_and_goes_to_float32():
    model = Given(w=5000)
    large, small = normal(0), normal(1, scale=1e-3)
    cancelling = [large, -large + small, small, small]
    with accumulate(model, 4) as session:
        for _ in range(2):
            run_window(session, model, [normal(i) for i in range(4)])
        with pytest.warns(UserWarning, match=r"made the gradient of parameter w .* tolerance is 0\.002"):
            first = run_window(session, model, cancelling)
        assert session.stats().parameters["w"].promotions == 1
        assert session.stats().parameters["w"].error > 2e-3
        second = run_window(session, model, cancelling)
        assert session.stats().parameters["w"].format == "fp32"
    assert (second - exact(cancelling)).norm() < 1e-3 * (first - exact(cancelling)).norm()


def test_auto_stays_in_float32_in_long_windows():
    model = Given(w=2000)
    with accumulate(model, 300) as session:
        for _ in range(2):
            run_window(session, model, [normal(i, 2000) for i in range(300)])
        assert session.stats().parameters["w"].format == "fp32"


def test_auto_stays_in_float32_where_blocks_span_more_than_float16_can():
    model = Given(w=4096)
    gradient = normal(0, 4096)
    gradient[::BLOCK] = 1e12
    with accumulate(model, 4) as session:
        for _ in range(2):
            run_window(session, model, [gradient] * 4)
        stats = session.stats().parameters["w"]
    assert stats.format == "fp32"
    assert stats.promotions == 1


def test_auto_goes_to_float16_when_it_would_have_done_for_long_enough_and_waits_longer_each_time():
    policy = AutoPolicy(2e-3, every=4)
    record = Record(elements=5000)

    def window(cancels):
        record.start_window()
        format = policy.choose(record)
        for step in range(4):
            if format == "fp16" and policy.wants_fp32(record, None):
                format = "fp32"
            sum_sumsq = 1e-6 if cancels and step == 3 else 1.0 + step
            error = ROUNDING * sum_sumsq if format == "fp16" else 0.0
            record.note([1.0, 1.0, 0.0, sum_sumsq, error, 0.0])
            record.folds += 1
        policy.end_window(record)
        return format

    assert [window(False) for _ in range(4)] == ["fp32"] + ["fp16"] * 3
    for patience in (2, 4, 8, 16, 32, 64, 64):
        assert window(True) == "fp16"
        formats = [window(False) for _ in range(patience + 1)]
        assert formats == ["fp32"] * patience + ["fp16"]


def test_windows_of_one_gradient_are_that_gradient():
    model = Given(w=5000)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    with torch_sluice.accumulate(model, optimizer) as session:
        for number in range(4):
            before = model.w.detach().clone()
            model.backward(w=normal(number))
            optimizer.step()
            optimizer.zero_grad()
            assert torch.equal(model.w.detach(), before - normal(number))
        assert session.stats().fp16_share == 0


def test_small_parameters_are_summed_in_float32():
    model = Given(w=BLOCK, b=BLOCK - 1)
    with accumulate(model, 2) as session:
        for _ in range(3):
            model.backward(w=normal(0, BLOCK), b=normal(0, BLOCK - 1))
            session.optimizer.step()
            session.optimizer.zero_grad()
        stats = session.stats()
        session.optimizer.step()
        session.reset()
    assert (stats.parameters["w"].format, stats.parameters["b"].format) == ("fp16", "fp32")
    assert stats.elements == 2 * BLOCK - 1
    assert stats.fp16_share == pytest.approx(BLOCK / (2 * BLOCK - 1))
    assert stats.bytes == 2 * BLOCK + 1 + 4 * (BLOCK - 1)
    assert stats.bytes_fp32 == 4 * (2 * BLOCK - 1)


@pytest.mark.parametrize("kind", ["normal", "uniform", "log-normal"])
def test_the_error_that_auto_predicts_is_the_error_that_rounding_makes(kind):
    values = normal(0, 200_000)
    values = {"normal": values, "uniform": (values / 2**0.5).erf(), "log-normal": (2 * values).exp()}[kind]
    stats = Accumulator(nn.Parameter(torch.zeros(200_000)), "fp16").add(values, 1.0, seed=1)
    ratio = (stats[4] / stats[3]).item() / ROUNDING
    assert 0.5 <= ratio <= 2
    assert kind == "log-normal" or 0.85 < ratio < 1.15


def test_stochastic_rounding_keeps_what_nearest_loses():
    model = Given(w=4096)
    gradients = [torch.ones(4096)] + [torch.full((4096,), 2.0**-13)] * 255
    exact = torch.stack(gradients).double().mean().item()
    means = {}
    for rounding in ("stochastic", "nearest"):
        with accumulate(model, 256, policy="fp16", rounding=rounding) as session:
            means[rounding] = run_window(session, model, gradients).double().mean().item()
    assert means["stochastic"] == pytest.approx(exact, rel=1e-4)
    assert means["nearest"] == (1 + 2.0**-13) / 256  # what comes last needs no rounding


def test_runs_repeat_bit_for_bit_and_differ_with_the_seed():
    results = []
    for seed in (0, 0, 1):
        model = Given(w=5000)
        with accumulate(model, 4, policy="fp16", seed=seed) as session:
            results.append(run_window(session, model, [normal(i) for i in range(4)]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_two_parameters_and_two_windows_round_independently():
    model = Given(w=5000, v=5000)
    gradient = normal(0)
    with accumulate(model, 2, policy="fp16") as session:
        for _ in range(2):
            for _ in range(2):
                model.backward(w=gradient, v=gradient)
                session.optimizer.step()
                session.optimizer.zero_grad()
        first, second = model.w.detach().clone(), model.v.detach().clone()
    assert not torch.equal(first, second)
    assert not torch.equal(first, -2 * gradient)


def test_stats_tell_norms_and_can_be_written_as_json():
    model = Given(w=[20, 100])
    gradients = [normal(i, [20, 100]) for i in range(2)]
    with accumulate(model, 2) as session:
        run_window(session, model, gradients)
        stats = session.stats()
    one = stats.parameters["w"]
    assert one.grad_norm == pytest.approx(gradients[-1].norm().item(), rel=1e-6)
    assert one.grad_amax == gradients[-1].abs().max().item()
    assert stats.step_norm == pytest.approx(((gradients[0] + gradients[1]) / 2).norm().item(), rel=1e-3)
    assert (stats.steps, stats.skipped_steps, stats.held_steps) == (1, 0, 1)
    assert json.loads(json.dumps(stats.to_dict()))["parameters"]["w"]["elements"] == 2000


def test_empty_and_scalar_parameters():
    model = Given(empty=0, scalar=[])
    for policy in ("auto", "fp16", "fp32", "seed"):
        with accumulate(model, 2, policy=policy) as session:
            for value in (1.0, 3.0):
                model.backward(empty=torch.zeros(0), scalar=torch.tensor(value))
                session.optimizer.step()
                session.optimizer.zero_grad()
        assert model.scalar.item() == -2.0
        model.scalar.data.zero_()


BAD = {
    "every is 0, expected an integer of at least 1": dict(every=0),
    "every is 2.0, expected an integer": dict(every=2.0),
    "policy is 'half', expected 'auto', 'fp16', 'fp32' or 'seed'": dict(policy="half"),
    "tolerance is 0, expected a number above 0": dict(tolerance=0),
    "rounding is 'up', expected one of 'stochastic', 'nearest'": dict(rounding="up"),
    "reduction is 'none', expected one of 'mean', 'sum'": dict(reduction="none"),
    "max_norm is given without low_memory=True": dict(max_norm=1.0),
    "max_norm is -1.0, expected a number above 0": dict(max_norm=-1.0, low_memory=True),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    model = Given(w=3)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    with pytest.raises(ValueError, match=message):
        torch_sluice.accumulate(model, optimizer, **{"every": 2, **BAD[message]})


def test_bad_models_and_optimizers_are_named():
    model = Given(w=3)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    with pytest.raises(TypeError, match=r"model is a list, expected a torch.nn.Module"):
        torch_sluice.accumulate([model], optimizer, 2)
    with pytest.raises(TypeError, match=r"optimizer is a NoneType, expected a torch.optim.Optimizer"):
        torch_sluice.accumulate(model, None, 2)
    with pytest.raises(
        ValueError, match="optimizer is LBFGS, which evaluates its closure several times, and every is 2"
    ):
        torch_sluice.accumulate(model, torch.optim.LBFGS(model.parameters()), 2)
    frozen = torch.optim.SGD([nn.Parameter(torch.zeros(3), requires_grad=False)], 1.0)
    with pytest.raises(ValueError, match="the optimizer has no parameter that requires a gradient"):
        torch_sluice.accumulate(model, frozen, 2)
    with torch_sluice.accumulate(model, optimizer, 2):
        with pytest.raises(RuntimeError, match="accumulating in another torch_sluice.accumulate already"):
            torch_sluice.accumulate(model, optimizer, 2).__enter__()
    with pytest.raises(ValueError, match="policy is 'x'"):
        make_policy("x", 1.0, 2)
