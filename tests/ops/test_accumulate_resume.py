"""A session that is saved in the middle of a window goes on exactly as if nothing had happened."""

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
        self.session = torch_sluice.accumulate(self.model, self.optimizer, every=N, policy=policy)
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


def test_states_that_do_not_fit_are_refused():
    training = Training("fp16")
    training.run(0, 3)
    state = training.session.state_dict()
    refused = {
        "the version of the state is 7, expected 1": {**state, "version": 7},
        "every is 4, expected 9, with which the state was saved": {**state, "window": {**state["window"], "every": 9}},
        "the saved kind of loop is 'odd'": {**state, "window": {**state["window"], "kind": "odd"}},
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
        "the state of parameter 0.bias lacks 'record'": {
            **state,
            "parameters": {**state["parameters"], "0.bias": {"format": "fp16", "buffer": None, "exponents": None}},
        },
        "the state lacks 'counters'": {name: value for name, value in state.items() if name != "counters"},
    }
    for message, bad in refused.items():
        with pytest.raises(ValueError, match=message):
            training.session.load_state_dict(bad)
    training.session.load_state_dict(state)
    training.close()
