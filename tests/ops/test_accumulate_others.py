"""What real loops bring beside torch's own optimizers: those of other libraries, hooks, compilers, autograd.grad."""

import collections
import copy

import numpy
import pytest
import torch
from support.accumulate_training import ERRORS, assert_close, batches, loss_of, net, session_or_not, values
from torch import nn

import torch_sluice


class ZeroesInPlace(torch.optim.Optimizer):
    """As optimizers of before ``set_to_none`` do."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def zero_grad(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.detach_()
                    parameter.grad.zero_()

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-0.3)


class ZeroesTwice(ZeroesInPlace):
    """Calls the one that it has from its base, and then does it again."""

    def zero_grad(self):
        super().zero_grad()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.zero_()


class Lookahead(torch.optim.Optimizer):
    """Around another optimizer, as most are written: without ``super().__init__``."""

    def __init__(self, parameters):
        self.optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
        self.param_groups, self.defaults = self.optimizer.param_groups, self.optimizer.defaults
        self.state = collections.defaultdict(dict)
        self.slow = [one.detach().clone() for one in self.param_groups[0]["params"]]
        self.calls = 0

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        self.calls += 1
        if self.calls % 2 == 0:
            for slow, fast in zip(self.slow, self.param_groups[0]["params"], strict=True):
                fast.copy_(slow.lerp_(fast, 0.5))


@pytest.mark.parametrize("kind", [ZeroesInPlace, ZeroesTwice, Lookahead])
@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("policy", ["fp32", "fp16"])
def test_optimizers_written_by_hand(kind, every, policy):
    def train(every, policy):
        model = net()
        optimizer = kind(model.parameters())
        with session_or_not(model, optimizer, every, policy):
            for i, batch in enumerate(batches(8)):
                loss = loss_of(model, batch)
                (loss if every else loss / 2).backward()
                if every or i % 2:
                    optimizer.step()
                    optimizer.zero_grad()
        return values(model)

    assert_close(train(every, policy), train(None, None), ERRORS[policy])


def test_a_zero_grad_of_ones_own_drops_a_window_with_a_warning():
    model = net()
    optimizer = ZeroesInPlace(model.parameters())
    first, second = batches(2)
    with torch_sluice.accumulate(model, optimizer, every=2) as session:
        loss_of(model, first).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(model, second).backward()
        with pytest.warns(UserWarning, match="has dropped a window"):
            optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not session.window.is_open
    assert "zero_grad" in vars(ZeroesInPlace)
    assert not hasattr(ZeroesInPlace.zero_grad, "__wrapped__")


@pytest.mark.parametrize("policy", ["fp32", "fp16"])
def test_autograd_grad_gives_the_same_whatever_is_in_sight(policy):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = list(model.parameters())
    first, second = batches(2)
    wanted = torch.autograd.grad(loss_of(model, first), parameters)
    with torch_sluice.accumulate(model, optimizer, every=2, policy=policy):
        loss_of(model, second).backward()
        seen = [parameter.grad.clone() for parameter in parameters]
        found = torch.autograd.grad(loss_of(model, first), parameters)
        assert_close(found, wanted, 0)
        assert_close([parameter.grad for parameter in parameters], seen, 0)
        held = [parameter.grad for parameter in parameters]  # which autograd adds to
        found = torch.autograd.grad(loss_of(model, first), parameters)
        assert_close(found, wanted, 0)
        del held


@pytest.mark.parametrize("policy", ["fp32", "fp16"])
def test_a_hook_on_gradients_gets_them_unweighed_whatever_is_in_sight(policy):
    def train(look):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        seen = []
        with torch_sluice.accumulate(model, optimizer, every=2, policy=policy):
            for parameter in model.parameters():
                parameter.register_hook(lambda grad: seen.append(grad.norm()) or grad.clamp(-2e-3, 2e-3))
            for batch in batches(6):
                loss_of(model, batch).backward()
                if look:
                    for parameter in model.parameters():
                        parameter.grad.norm()
                optimizer.step()
                optimizer.zero_grad()
        return values(model) + seen

    assert_close(train(look=True), train(look=False), ERRORS[policy])


def test_a_backward_pass_that_ends_midway_keeps_what_was_in_sight():
    def train(accumulating):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        seen = []

        def fail(grad):
            raise KeyboardInterrupt

        with session_or_not(model, optimizer, 2 if accumulating else None, "fp32" if accumulating else None):
            for i, batch in enumerate(batches(4)):
                (loss_of(model, batch) / (1 if accumulating else 2)).backward()
                seen += [parameter.grad.clone() for parameter in model.parameters()]
                if i == 0:
                    handle = model[2].weight.register_hook(fail)
                    with pytest.raises(KeyboardInterrupt):
                        loss_of(model, batch).backward(inputs=[model[2].weight])
                    handle.remove()
                    seen += [parameter.grad.clone() for parameter in model.parameters()]
                if accumulating or i % 2:
                    optimizer.step()
                    optimizer.zero_grad()
        return values(model) + seen

    assert_close(train(True), train(False))


@pytest.mark.parametrize("inside", [True, False])
def test_a_step_that_is_called_in_a_compiled_function(inside):
    def train(policy):
        torch._dynamo.reset()
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if not inside:
            optimizer.step = torch.compile(optimizer.step, backend="eager")
        with session_or_not(model, optimizer, policy=policy):
            step = torch.compile(lambda: optimizer.step(), backend="eager") if inside else optimizer.step
            for i, batch in enumerate(batches(6)):
                loss_of(model, batch).backward()
                if i % 2:
                    step()
                    optimizer.zero_grad()
        return values(model)

    assert_close(train("fp32"), train(None), 1e-5)  # compiled, AdamW itself rounds a little differently


def test_hooks_of_a_step_are_called_once_under_low_memory():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append(values(model)))
    with torch_sluice.accumulate(model, optimizer, low_memory=True):
        loss_of(model, *batches(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert len(calls) == 2
        assert calls[0] == "before"
        assert_close(calls[1], values(model), 0)
        optimizer.step()  # of no gradients
        assert calls[2:3] == ["before"]
        assert len(calls) == 4


def test_every_is_any_integer():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch_sluice.accumulate(model, optimizer, every=numpy.int64(2)) as session:
        assert type(session.window.every) is int
        for batch in batches(2):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert (session.steps, session.held_steps) == (1, 1)
    for wrong in (numpy.float64(2), numpy.int64(0), numpy.bool_(True)):
        with pytest.raises(ValueError, match="every is"):
            torch_sluice.accumulate(model, optimizer, every=wrong)


def test_lazy_modules_are_refused_by_name_until_they_have_run():
    model = nn.Sequential(nn.LazyLinear(20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"parameter 0\.weight has no shape yet"):
        torch_sluice.accumulate(model, optimizer)
    (batch,) = batches(1)
    model(batch)
    with torch_sluice.accumulate(model, optimizer):
        loss_of(model, batch).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("partly_double", [False, True])
def test_clipping_gives_a_norm_of_the_dtype_that_torch_gives(dtype, partly_double):
    def clip(policy):
        model = net().to(dtype)
        other = nn.Linear(2, 2, dtype=torch.float64 if partly_double else dtype)
        model.append(other)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with session_or_not(model, optimizer, policy=policy):
            loss_of(model[:3], batches(1)[0].to(dtype)).backward()
            other.weight.sum().backward()
            return nn.utils.clip_grad_norm_(model.parameters(), 1e-2)

    found, wanted = clip("fp16"), clip(None)
    assert (found.dtype, found.shape, found.device) == (wanted.dtype, wanted.shape, wanted.device)
    assert torch.allclose(found, wanted, rtol=1e-2)


def test_leaving_a_session_that_is_not_open_does_nothing():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = torch_sluice.accumulate(model, optimizer)
    session.__exit__(None, None, None)
    with torch_sluice.accumulate(model, optimizer):
        session.__exit__(None, None, None)
        loss_of(model, batches(1)[0]).backward()
        assert model[0].weight.grad is not None
    with session:
        pass
    session.__exit__(None, None, None)
    assert "step" not in vars(optimizer)


@pytest.mark.parametrize(
    ("name", "value"),
    [("tolerance", "x"), ("tolerance", None), ("max_norm", "1"), ("max_norm", torch.ones(2)), ("seed", "x"),
     ("seed", None), ("seed", 1.5)],
)  # fmt: skip
def test_arguments_that_are_no_numbers_are_named(name, value):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"^{name} is "):
        torch_sluice.accumulate(model, optimizer, low_memory=True, **{name: value})


@pytest.mark.parametrize("tokens", ["x", None, torch.ones(2), 10**400])
def test_tokens_that_are_no_number_are_named(tokens):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch_sluice.accumulate(model, optimizer) as session, pytest.raises(ValueError, match="^tokens is "):
        session.count(tokens)


def _change(path, value):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value(state[path[-1]]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["counters"], 5), (["counters"], None), (["window"], None), (["weights"], [1]), (["parameters"], None),
        (["parameters"], [1]), (["weights", "total"], -4.0), (["parameters", "0.weight", "scale"], float("nan")),
        (["parameters", "0.weight", "factor"], 0.0), (["parameters", "0.weight", "exponents"], lambda one: one.float()),
    ],
)  # fmt: skip
def test_states_with_a_part_that_is_none_are_refused_whole(path, value):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch_sluice.accumulate(model, optimizer, policy="fp16") as session:
        for batch in batches(2):
            loss_of(model, batch).backward()
        state = copy.deepcopy(session.state_dict())
        _change(path, value)(state)
        session.steps = 7
        with pytest.raises(ValueError, match=path[-1]):
            session.load_state_dict(state)
        assert session.steps == 7
        optimizer.step()
        assert session.steps == 8
