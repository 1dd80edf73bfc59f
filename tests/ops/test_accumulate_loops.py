"""torch_sluice.accumulate around the loops that people write: each gives what it gives without Sluice."""

import contextlib
import warnings

import pytest
import torch
from support.devices import DEVICES
from torch import nn

import torch_sluice
from torch_sluice.accumulate.access import read_grad

N = 3


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 20))


def batches(count, seed=1, rows=4, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 20, generator=generator).to(device) for _ in range(count)]


def loss_of(model, batch):
    return model(batch).square().mean()


def values(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(left, right):
    return all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def close(left, right, rtol=1e-4, atol=1e-6):
    torch.testing.assert_close(left, right, rtol=rtol, atol=atol)


def train_by_hand(data, every=N, clip=None, make=torch.optim.AdamW):
    """The ordinary loop, whose result all others must have: mean over micro-batches, step at the end of a window."""
    model = make_model().to(data[0].device)
    optimizer = make(model.parameters(), 1e-2)
    for i, batch in enumerate(data):
        (loss_of(model, batch) / every).backward()
        if (i + 1) % every == 0:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return values(model)


def session(model, optimizer, every=N, **options):
    return torch_sluice.accumulate(model, optimizer, every, **{"policy": "fp32", **options})


def hidden(model):
    """How many parameters have nothing in the .grad that torch itself sees."""
    return sum(read_grad(parameter) is None for parameter in model.parameters())


POLICIES = {"fp32": 1e-5, "fp16": 2e-2, "auto": 2e-2, "seed": 1e-5}  # and how far AdamW may take a value's rounding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("loop", ["step after each micro-batch", "step after each window", "zero_grad first"])
def test_loops_give_what_they_give_without_sluice(policy, loop, device):
    data = batches(4 * N, device=device)
    model = make_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    by_window = loop == "step after each window"
    with session(model, optimizer, None if by_window else N, policy=policy) as accumulation:
        for i, batch in enumerate(data):
            if loop == "zero_grad first":
                optimizer.zero_grad()
            loss = loss_of(model, batch)
            (loss / N if by_window else loss).backward()
            if not by_window or (i + 1) % N == 0:
                optimizer.step()
                if loop != "zero_grad first":
                    optimizer.zero_grad()
    close(values(model), train_by_hand(data), atol=POLICIES[policy] * 1e-2)
    assert (accumulation.steps, accumulation.held_steps) == (4, 0 if by_window else 4 * (N - 1))
    assert all((parameter.grad is None) == (loop != "zero_grad first") for parameter in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_float32_has_the_bits_of_the_ordinary_loop(device):
    data = batches(2 * N, device=device)
    model = make_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with session(model, optimizer, None):
        for i, batch in enumerate(data):
            (loss_of(model, batch) / N).backward()
            if (i + 1) % N == 0:
                optimizer.step()
                optimizer.zero_grad()
    assert same(values(model), train_by_hand(data))


@pytest.mark.parametrize("each", [True, False])
def test_sums_are_hidden_from_torch_and_seen_by_whoever_looks(each):
    data = batches(2 * N)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with session(model, optimizer, N if each else None):
        for i, batch in enumerate(data):
            (loss_of(model, batch) if each else loss_of(model, batch) / N).backward()
            last = (i + 1) % N == 0
            assert hidden(model) == 4
            if each or last:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
                assert all(parameter.grad is not None for parameter in model.parameters())
                optimizer.step()
                optimizer.zero_grad()
    close(values(model), train_by_hand(data, clip=1e-3))


def test_no_second_set_of_gradients_ever_exists():
    model, least = make_model(), 4
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)

    def count(_):
        nonlocal least
        least = min(least, hidden(model))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)  # runs before the session's: at most this one is there
    with session(model, optimizer, None):
        for batch in batches(N):
            loss_of(model, batch).backward()
        assert least == 3


def test_a_sum_takes_over_the_first_gradient_and_hands_it_on_without_a_copy():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    addresses, parameter = [], model[0].weight
    parameter.register_post_accumulate_grad_hook(lambda p: addresses.append(read_grad(p).data_ptr()))
    with session(model, optimizer, None):
        for batch in batches(N):
            loss_of(model, batch).backward()
        assert hidden(model) == 4
        assert parameter.grad.data_ptr() == addresses[0]


def test_several_backward_passes_in_a_micro_batch():
    data = batches(2 * N)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with session(model, optimizer):
        for batch in data:
            for half in batch.chunk(2):  # the mean of the halves' means is the mean
                (loss_of(model, half) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    close(values(model), train_by_hand(data))


@pytest.mark.parametrize("policy", ["fp32", "fp16"])
def test_a_backward_after_somebody_looked_adds_to_what_was_seen(policy):
    data = batches(N + 1)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with session(model, optimizer, None, policy=policy):
        for batch in data:
            loss_of(model, batch).backward()
            assert model[0].weight.grad is not None
        shown = [parameter.grad.clone() for parameter in model.parameters()]
    expected = make_model()
    sum(loss_of(expected, batch) for batch in data).backward()
    tolerance = 1e-5 if policy == "fp32" else 3e-3
    for got, parameter in zip(shown, expected.parameters(), strict=True):
        assert (got - parameter.grad).norm() <= tolerance * parameter.grad.norm()


def test_what_was_done_to_gradients_is_kept_when_another_one_comes():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    weight = model[0].weight
    with session(model, optimizer, None, policy="fp16"):
        for batch in batches(N):
            loss_of(model, batch).backward()
        weight.grad.zero_()
        (batch,) = batches(1, seed=5)
        loss_of(model, batch).backward()
        got = weight.grad.clone()
    expected = make_model()
    loss_of(expected, batch).backward()
    assert (got - expected[0].weight.grad).norm() < 1e-3 * got.norm()


def test_who_holds_a_gradient_sees_later_ones_in_it():
    model = make_model()
    weight, bias = model[0].weight, model[0].bias
    with session(model, torch.optim.SGD(model.parameters(), 1e-2), None, policy="fp16"):
        for number, batch in enumerate(batches(3)):
            loss_of(model, batch).backward()
            if number == 0:
                kept, view, array = weight.grad, bias.grad[:3], model[2].bias.grad.numpy()
        assert kept is weight.grad
        assert torch.equal(view, bias.grad[:3])
        assert torch.equal(torch.from_numpy(array), model[2].bias.grad)
        assert hidden(model) == 0 or read_grad(model[2].weight) is None
        del kept
        loss_of(model, batch).backward()
        assert read_grad(weight) is None
        assert read_grad(bias) is not None


@pytest.mark.parametrize("policy", ["fp32", "fp16"])
def test_windows_that_are_thrown_away(policy):
    data = batches(2 * N)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with session(model, optimizer, None, policy=policy) as accumulation:
        for i, batch in enumerate(batches(N, seed=9) + data):
            (loss_of(model, batch) / N).backward()
            if i + 1 == N:
                optimizer.zero_grad()  # thinks better of it
            elif (i + 1) % N == 0:
                optimizer.step()
                optimizer.zero_grad()
    assert accumulation.steps == 2
    close(values(model), train_by_hand(data), atol=POLICIES[policy] * 1e-2)


def test_a_micro_batch_thrown_away_in_a_window_of_calls_drops_the_window_and_says_so():
    data = batches(2 * N)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with session(model, optimizer) as accumulation:
        loss_of(model, data[3]).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(model, data[4]).backward()
        with pytest.warns(UserWarning, match="zero_grad.. has dropped a window of accumulated gradients"):
            optimizer.zero_grad()
        for batch in data:
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert accumulation.steps == 2
    close(values(model), train_by_hand(data))


def test_gradients_of_others_in_a_window_of_calls_are_refused():
    """A discriminator gets gradients in the generator's turn, and drops them before its own."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    accumulation = session(model, optimizer)
    with pytest.raises(RuntimeError, match=r"with every=3 they can't be told .*expected accumulate\(\) without every"):
        with accumulation:
            optimizer.zero_grad()
            loss_of(model, *batches(1)).backward()
            optimizer.step()
            loss_of(model, *batches(1)).backward()
            optimizer.zero_grad()


def test_zero_grad_by_hand_in_a_window_of_calls():
    data = batches(2 * N)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with session(model, optimizer):
        for batch in data:
            loss_of(model, batch).backward()
            optimizer.step()
            for parameter in model.parameters():
                parameter.grad = None
    close(values(model), train_by_hand(data))


def test_zero_grad_to_zero_instead_of_none():
    data = batches(2 * N)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with session(model, optimizer):
        for batch in data:
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    close(values(model), train_by_hand(data))


def test_closures():
    data = batches(2 * N)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with session(model, optimizer):
        for batch in data:

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                return loss

            assert optimizer.step(closure).item() > 0
    close(values(model), train_by_hand(data))


@pytest.mark.parametrize("inside", [True, False])
def test_learning_rate_schedulers_work_and_do_not_warn(inside):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)

    def make():
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda calls: 1 / (1 + calls))

    scheduler = None if inside else make()
    with warnings.catch_warnings(), session(model, optimizer):
        warnings.simplefilter("error")
        scheduler = scheduler or make()
        for batch in batches(2 * N):
            loss_of(model, batch).backward()
            optimizer.step()
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / (1 + 2 * N))
    before = values(model)
    loss_of(model, *batches(1)).backward()
    optimizer.step()  # the session is over: each call acts
    assert not same(before, values(model))


def test_the_optimizer_is_as_before_after_the_session():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with session(model, optimizer):
        assert "step" in vars(optimizer)
    assert "step" not in vars(optimizer)
    for parameter in model.parameters():
        assert not parameter._post_accumulate_grad_hooks
        assert not parameter._backward_hooks
    loss_of(model, *batches(1)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_parameter_groups_shared_unused_and_frozen_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(20, 20)
            self.second = nn.Linear(20, 20)
            self.second.weight = self.first.weight
            self.unused = nn.Linear(20, 20)
            self.sometimes = nn.Linear(20, 20)
            self.frozen = nn.Linear(20, 20).requires_grad_(False)

        def forward(self, x, sometimes):
            x = self.frozen(self.second(self.first(x).tanh()))
            return self.sometimes(x) if sometimes else x

    def train(model, accumulated):
        optimizer = torch.optim.AdamW(
            [
                {"params": [*model.first.parameters(), model.second.bias], "lr": 1e-2},
                {"params": [*model.unused.parameters(), *model.sometimes.parameters()], "lr": 1e-3},
                {"params": list(model.frozen.parameters())},
            ],
            1.0,
        )
        with session(model, optimizer) if accumulated else contextlib.nullcontext() as accumulation:
            for i, batch in enumerate(batches(3 * N)):
                loss = model(batch, sometimes=i % N == 0).square().mean()
                (loss if accumulated else loss / N).backward()
                if accumulated or (i + 1) % N == 0:
                    optimizer.step()
                    optimizer.zero_grad()
        if accumulated:
            parameters = accumulation.stats().parameters
            assert {"first.weight", "second.bias", "unused.weight", "sometimes.bias"} <= parameters.keys()
            assert not {"second.weight", "frozen.weight"} & parameters.keys()
        return values(model)

    close(train(Odd(), True), train(Odd(), False))


def test_parameters_that_join_later():
    model = make_model()
    optimizer = torch.optim.SGD(model[0].parameters(), 0.1)
    with session(model, optimizer) as accumulation:
        for i, batch in enumerate(batches(3 * N)):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.zero_grad()
            if i == N - 1:
                optimizer.add_param_group({"params": list(model[2].parameters())})
    assert set(accumulation.stats().parameters) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert accumulation.stats().parameters["2.weight"].step_norm > 0


def test_parameters_that_the_kernels_do_not_take_are_summed_by_torch():
    torch.manual_seed(0)
    table, wide = nn.Embedding(50, 8, sparse=True), nn.Linear(8, 8, dtype=torch.float64)
    phase = nn.Parameter(torch.ones(8, dtype=torch.complex64))
    model = nn.ModuleList([table, wide])
    model.phase = phase
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def loss(i):
        vectors = table(torch.tensor([i, i + 1]))
        return wide(vectors.double()).square().sum() + (vectors * phase).abs().sum()

    expected = torch.autograd.grad(sum(loss(i) for i in range(N)) / N, list(model.parameters()))
    with session(model, optimizer) as accumulation:
        for i in range(N):
            loss(i).backward()
            if i < N - 1:
                optimizer.step()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            close(parameter.grad.to_dense(), gradient.to_dense())
            assert parameter.grad.is_sparse == gradient.is_sparse
        optimizer.step()
    assert {one.format for one in accumulation.stats().parameters.values()} == {"torch"}
    assert accumulation.stats().parameters["0.weight"].step_norm == pytest.approx(expected[1].to_dense().norm().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype):
    model = make_model().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    data = [batch.to(dtype) for batch in batches(N)]
    exact = make_model().to(dtype).float()
    sum(loss_of(exact, batch.float()) / N for batch in data).backward()
    with session(model, optimizer, policy="auto"):
        for batch in data:
            loss_of(model, batch).backward()
            if model[0].weight.grad is None:
                optimizer.step()
        for parameter, reference in zip(model.parameters(), exact.parameters(), strict=True):
            assert parameter.grad.dtype == dtype
            assert (parameter.grad.float() - reference.grad).norm() < 0.03 * reference.grad.norm()
        optimizer.step()


def test_every_micro_batch_a_step():
    data = batches(4)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with torch_sluice.accumulate(model, optimizer) as accumulation:
        for batch in data:
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(values(model), train_by_hand(data, every=1))
    assert accumulation.stats().fp16_share == 0


def test_an_incomplete_window_is_left_in_grad_and_said():
    data = batches(N + 2)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with pytest.warns(UserWarning, match=r"accumulation ended after 2 of 3 calls of step\(\): no step was made"):
        with session(model, optimizer):
            for batch in data:
                loss_of(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
    expected = make_model()
    expected.load_state_dict(model.state_dict())
    (sum(loss_of(expected, batch) for batch in data[N:]) / N).backward()
    close([p.grad for p in model.parameters()], [p.grad for p in expected.parameters()])
    loss_of(model, data[0]).backward()  # and autograd adds to it as ever
    loss_of(expected, data[0]).backward()
    close([p.grad for p in model.parameters()], [p.grad for p in expected.parameters()])


@pytest.mark.parametrize("policy", ["fp32", "fp16"])
def test_a_last_window_that_is_shorter_steps_and_is_clipped(policy):
    data = batches(2 * N - 1)
    model, expected = make_model(), make_model()
    for one, accumulated in ((expected, False), (model, True)):
        optimizer = torch.optim.SGD(one.parameters(), 1.0)
        with session(one, optimizer, None, policy=policy) if accumulated else contextlib.nullcontext() as accumulation:
            for i, batch in enumerate(data):
                (loss_of(one, batch) / N).backward()
                if (i + 1) % N and i + 1 < len(data):
                    continue
                norm = nn.utils.clip_grad_norm_(one.parameters(), 1e-3)
                assert norm > 1e-3
                optimizer.step()
                optimizer.zero_grad()
    assert accumulation.steps == 2
    close(values(model), values(expected))


def test_an_exception_leaves_gradients_where_they_would_be_and_the_state_saved():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    accumulation = session(model, optimizer)
    with pytest.raises(KeyboardInterrupt), accumulation:
        loss_of(model, *batches(1)).backward()
        optimizer.step()
        raise KeyboardInterrupt
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert accumulation.state_dict()["parameters"]["0.weight"]["shown"] is not None
    assert accumulation.state_dict()["window"]["held"] == 1
    before = values(model)
    loss_of(model, *batches(1)).backward()
    optimizer.step()
    assert not same(before, values(model))


def test_reset_after_a_backward_that_failed():
    data = batches(2 * N)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise OSError("no")

    with session(model, optimizer) as accumulation:
        with pytest.raises(OSError, match="no"):
            model[2](Fail.apply(model[0](data[0]))).sum().backward()
        accumulation.reset()
        for batch in data:
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    close(values(model), train_by_hand(data))


def test_checkpointed_layers():
    from torch.utils.checkpoint import checkpoint

    data = batches(2 * N)
    for reentrant in (False, True):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        with session(model, optimizer):
            for batch in data:
                hidden = checkpoint(model[:2], batch.requires_grad_(), use_reentrant=reentrant)
                checkpoint(model[2], hidden, use_reentrant=reentrant).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        close(values(model), train_by_hand([batch.detach() for batch in data]))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("policy", ["fp32", "fp16"])
def test_steps_that_are_compiled(policy, before):
    data = batches(4 * N)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    step = torch.compile(optimizer.step, backend="eager") if before else None
    with session(model, optimizer, None, policy=policy) as accumulation:
        step = step or torch.compile(optimizer.step, backend="eager")
        for i, batch in enumerate(data):
            (loss_of(model, batch) / N).backward()
            if (i + 1) % N == 0:
                step()
                optimizer.zero_grad()
    assert accumulation.steps == 4
    close(values(model), train_by_hand(data), atol=POLICIES[policy] * 1e-2 + 1e-6)  # compiled AdamW rounds otherwise


def test_two_sessions_side_by_side():
    first, second = make_model(), make_model(1)
    data = batches(4 * N)
    one, other = torch.optim.AdamW(first.parameters(), 1e-2), torch.optim.AdamW(second.parameters(), 1e-2)
    with session(first, one), torch_sluice.accumulate(second, other, every=2 * N, policy="fp32") as slow:
        for batch in data:
            (loss_of(first, batch) + loss_of(second, batch)).backward()
            for each in (one, other):
                each.step()
                each.zero_grad()
    close(values(first), train_by_hand(data))
    assert slow.steps == 2
