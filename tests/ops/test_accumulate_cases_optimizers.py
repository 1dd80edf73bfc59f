"""Parameters that come and go under a session, and optimizers, scalers and states around it."""

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

import torch_sluice


@pytest.mark.parametrize("policy", ["fp32", "fp16"])
@pytest.mark.parametrize("every", [None, 4])
def test_a_layer_frozen_in_the_middle_of_a_window_and_thawed(every, policy):
    results = []
    for one in (policy, None):
        model = net()
        optimizer = sgd(model)
        each = every is not None and one is not None
        with session_or_not(model, optimizer, every, one):
            for i, batch in enumerate(batches(8)):
                if i in (1, 6):
                    model[0].requires_grad_(False)
                if i == 3:
                    model[0].requires_grad_(True)
                (loss_of(model, batch) / (1 if each else 4)).backward()
                if each or i % 4 == 3:
                    optimizer.step()
                    optimizer.zero_grad()
        results.append(values(model))
    assert_close(*results, 2e-6 if policy == "fp32" else 3e-3)


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("how", ["thawed", "added"])
def test_the_first_gradient_of_a_parameter_that_joins_counts(how, every):
    results = []
    for one in ("fp32", None):
        model = net()
        optimizer = sgd(model) if how == "thawed" else torch.optim.SGD(model[2].parameters(), 0.1)
        model[0].requires_grad_(False)
        each = every is not None and one is not None
        with session_or_not(model, optimizer, every, one):
            for i, batch in enumerate(batches(4)):
                if i == 1:
                    model[0].requires_grad_(True)
                    if how == "added":
                        optimizer.add_param_group({"params": list(model[0].parameters())})
                (loss_of(model, batch) / (1 if each else 2)).backward()
                if each or i % 2:
                    optimizer.step()
                    optimizer.zero_grad()
        results.append(values(model))
    assert_close(*results)


@pytest.mark.parametrize("policy", ["fp32", "fp16", "auto"])
def test_a_model_that_becomes_double_in_the_session(policy):
    results = []
    for one in (policy, None):
        model = net()
        optimizer = sgd(model)
        with session_or_not(model, optimizer, None, one):
            first, second, third = batches(3)
            loss_of(model, first).backward()
            model.double()
            loss_of(model, second.double()).backward()
            found = gradients(model)
            model.float()
            loss_of(model, third).backward()
            optimizer.step()
        results.append([*values(model), *found])
    assert [one.dtype for one in results[0]] == [one.dtype for one in results[1]]
    assert_close(*results, 0 if policy == "fp32" else 3e-3)


@pytest.mark.parametrize("every", [None, 2])
def test_a_fused_optimizer_whose_scaler_found_infinities_has_skipped(every):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    with torch_sluice.accumulate(model, optimizer, every) as session:
        for i, batch in enumerate(batches(3 * (every or 1))):
            scaler.scale(loss_of(model, batch * torch.inf if i == 0 else batch)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert (session.steps, session.skipped_steps) == (2, 1)
    assert scaler.get_scale() == 8.0
    assert optimizer.state[model[0].weight]["step"].item() == 2


class Scaled(torch.optim.SGD):
    """Its step takes more than a closure."""

    def step(self, closure=None, *, scale=1.0):
        for group in self.param_groups:
            group["lr"] = 0.1 * scale
        return super().step(closure)


def test_all_arguments_of_step_are_handed_on():
    results = []
    for policy in ("fp32", None):
        model = net()
        optimizer = Scaled(model.parameters(), 0.1)
        with session_or_not(model, optimizer, None, policy):
            for batch in batches(3):

                def closure(batch=batch, model=model, optimizer=optimizer):
                    optimizer.zero_grad()
                    loss = loss_of(model, batch)
                    loss.backward()
                    return loss

                optimizer.step(closure, scale=3.0)
                loss_of(model, batch).backward()
                optimizer.step(scale=0.5)
        results.append(values(model))
    assert_same(*results)


def test_two_sessions_over_the_same_parameters_are_refused():
    model = net()
    first, second = sgd(model), torch.optim.SGD(model[0].parameters(), 0.2)
    with torch_sluice.accumulate(model, first, policy="fp32"):
        with pytest.raises(RuntimeError, match=r"0\.weight"), torch_sluice.accumulate(model, second):
            pass
        loss_of(model, batches(1)[0]).backward()
        assert all(grad is not None for grad in gradients(model))
        before = values(model)
        second.step()  # no session has it: it acts, with what is in .grad
        assert not torch.equal(before[0], model[0].weight)
        assert torch.equal(before[2], model[2].weight)
    with torch_sluice.accumulate(model, second):  # the first is gone
        pass


@pytest.mark.parametrize("every", [None, 2])
def test_sums_that_cancel_are_as_precise_as_the_tolerance_says(every):
    """The second gradient is minus the first and a little noise, so what remains is far smaller than what came."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(4096))
    optimizer = torch.optim.SGD([weight], 1.0)
    model = torch.nn.ParameterList([weight])
    with torch_sluice.accumulate(model, optimizer, every, policy="auto", tolerance=2e-3):
        for _ in range(6):
            with torch.no_grad():
                weight.zero_()
            first = torch.randn(4096)
            second = -first + 1e-4 * torch.randn(4096)
            for grad in (first, second):
                (weight * grad).sum().backward()
                if every or grad is second:
                    optimizer.step()
                    optimizer.zero_grad()
            wanted = (first + second).double() / (every or 1)
            error = (weight.detach().double() + wanted).norm() / wanted.norm()
            assert error < 2e-3
