"""A session that is saved in the middle of a window goes on exactly as if nothing had happened."""

import copy
import io

import pytest
import torch
from torch import nn

import torch_sluice

N = 4


class Training:
    """A loop that can be stopped after any operation: each micro-batch is a backward pass and a call of step()."""

    def __init__(self, policy, each=True):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 40))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.session = torch_sluice.accumulate(self.model, self.optimizer, N if each else None, policy=policy)
        self.each = each
        self.session.__enter__()

    def run(self, first, last):
        """Operations number first to last - 1; even ones are backward passes, odd ones steps."""
        for number in range(first, last):
            micro_batch, is_step = divmod(number, 2)
            if not is_step:
                generator = torch.Generator().manual_seed(micro_batch)
                self.model(torch.randn(3, 40, generator=generator)).square().mean().backward()
            elif self.each or (micro_batch + 1) % N == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()

    def save(self):
        file = io.BytesIO()
        states = [one.state_dict() for one in (self.model, self.optimizer, self.session)]
        torch.save(states, file)
        return file.getvalue()

    def load(self, data):
        states = torch.load(io.BytesIO(data), weights_only=True)
        for one, state in zip((self.model, self.optimizer, self.session), states, strict=True):
            one.load_state_dict(state)

    def close(self):
        self.session.reset()
        self.session.__exit__(None, None, None)
        return [parameter.detach().clone() for parameter in self.model.parameters()]


@pytest.mark.parametrize("policy", ["fp32", "fp16", "auto", "seed"])
@pytest.mark.parametrize("each", [True, False])
def test_resuming_after_any_operation_of_a_window_gives_the_same_bits(policy, each):
    end = 6 * N
    whole = Training(policy, each)
    whole.run(0, end)
    stats, expected = whole.session.stats(), whole.close()
    for stop in range(2 * N, 4 * N):
        before = Training(policy, each)
        before.run(0, stop)
        data = before.save()
        before.close()
        after = Training(policy, each)
        after.run(0, 3)  # in another place: all of it is replaced
        after.load(data)
        after.run(stop, end)
        assert after.session.stats() == stats, stop
        assert all(torch.equal(x, y) for x, y in zip(after.close(), expected, strict=True)), stop


def test_a_gradient_that_was_clipped_is_saved_clipped():
    training = Training("fp16", each=False)
    training.run(0, 2 * N - 1)
    weight = training.model[0].weight
    weight.grad.mul_(1e-3)
    data, clipped = training.save(), weight.grad.clone()
    training.close()
    other = Training("fp16", each=False)
    other.load(data)
    assert torch.equal(other.model[0].weight.grad, clipped)
    other.model(torch.zeros(3, 40)).sum().backward()  # one more: the clipped gradient goes back into the sum
    assert (other.model[0].weight.grad - clipped).abs().max() <= 1e-6
    other.close()


def test_a_session_that_is_entered_again_begins_a_window():
    training = Training("fp32")
    for _ in range(2):
        training.run(0, 2)
        assert training.session.state_dict()["window"]["held"] == 1
        with pytest.warns(UserWarning, match=r"accumulation ended after 1 of 4 calls of step\(\)"):
            training.session.__exit__(None, None, None)
        training.optimizer.zero_grad()
        training.session.__enter__()
    training.run(0, 2 * N)
    assert training.session.steps == 1
    training.close()


@pytest.mark.parametrize("compiled", [True, False])
def test_names_are_those_inside_of_wrappers(compiled):
    plain = Training("fp16")
    plain.run(0, 3)
    state = plain.session.state_dict()
    model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 40))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    wrapped = torch.compile(model) if compiled else nn.DataParallel(model)
    session = torch_sluice.accumulate(wrapped, optimizer, N, policy="fp16")
    session.load_state_dict(state)
    assert session.state_dict()["parameters"].keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    plain.close()


def test_states_that_do_not_fit_are_refused():
    training = Training("fp16")
    training.run(0, 3)
    state = training.session.state_dict()
    refused = {
        "the version of the state is 7, expected 2": {**state, "version": 7},
        "every is 4, expected 9, with which the state was saved": {**state, "window": {**state["window"], "every": 9}},
        "the saved window has 4 calls, expected fewer": {**state, "window": {**state["window"], "held": 4}},
        "the state of the window lacks 'held'": {**state, "window": {"every": N}},
        r"differ in these parameters: 0.weight": {
            **state,
            "parameters": {name: one for name, one in state["parameters"].items() if name != "0.weight"},
        },
        "differ in these parameters: extra": {**state, "parameters": {**state["parameters"], "extra": {}}},
        r"parameter 0.bias: its sum has shape \[40, 64\], expected \[64\]": {
            **state,
            "parameters": {**state["parameters"], "0.bias": state["parameters"]["2.weight"]},
        },
        r"parameter 0.bias: format is 'int8', expected one of fp16, fp32, torch": {
            **state,
            "parameters": {**state["parameters"], "0.bias": {**state["parameters"]["0.bias"], "format": "int8"}},
        },
        "the state of parameter 2.bias lacks 'record'": {
            **state,
            "parameters": {
                **state["parameters"],
                "2.bias": {name: one for name, one in state["parameters"]["2.bias"].items() if name != "record"},
            },
        },
        "the state lacks 'counters'": {name: value for name, value in state.items() if name != "counters"},
    }
    before = copy.deepcopy(state)
    for message, bad in refused.items():
        with pytest.raises(ValueError, match=message):
            training.session.load_state_dict(bad)
        after = training.session.state_dict()  # nothing of it was taken over
        assert [after[part] for part in ("window", "counters")] == [before[part] for part in ("window", "counters")]
        for name, one in before["parameters"].items():
            assert torch.equal(after["parameters"][name]["buffer"], one["buffer"])
    training.session.load_state_dict(state)
    training.close()
