"""Runs as if channels had left go by what a run before them noted, and give what those give that follow them anew."""

import copy
import itertools
import random

import pytest
import torch
from support.compress_models import mlp
from support.compress_moves import MOVES
from torch import nn

from torch_sluice.compress import recording
from torch_sluice.compress.recording import Recording, keeping_recordings, recording_for
from torch_sluice.compress.slicing import VALUES
from torch_sluice.compress.tracer import trace


class Routed(nn.Module):
    """Tokens with learned places: some are picked by what they hold, and each goes to the expert that it likes best."""

    def __init__(self):
        super().__init__()
        self.embed, self.score = nn.Linear(10, 32), nn.Linear(32, 3)
        self.places = nn.Parameter(torch.randn(12, 32))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 32)) for _ in range(3))
        self.order = nn.Parameter(torch.randn(12, 1))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.embed(x) + self.places
        scores = self.score(x)
        first = scores[..., 0].topk(6, 1).indices
        x = (x * self.order).gather(1, first[..., None].expand(-1, -1, 32))
        best, out = scores.gather(1, first[..., None].expand(-1, -1, 3)).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = best == number
            out[rows] = expert(x[rows])
        return self.head(x + out)


def make(name):
    torch.manual_seed(0)
    if name == "routed":
        return Routed().eval(), torch.randn(4, 12, 10)
    build, inputs, _ = MOVES[name]
    return build().eval(), inputs()


def draws(model, inputs, count=4):
    """Indices of any sides, whether these can leave together or not."""
    choose, sources = random.Random(0), trace(model, inputs)[0].sources
    for _ in range(count):
        some = choose.sample(sources, max(1, len(sources) // 3))
        yield {(s.name, s.dim): set(choose.sample(range(s.size), s.size // 2)) for s in some if s.dim != VALUES}


def check_equal(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [*MOVES, "routed"])
def test_runs_that_go_by_what_was_noted_give_what_runs_give_that_follow_anew(name):
    model, inputs = make(name)
    gone = list(draws(model, inputs))
    expected = [trace(model, inputs, some)[1] for some in gone]
    assert any(not torch.equal(one[0], other[0]) for one, other in itertools.pairwise(expected))
    with keeping_recordings():
        trace(model, inputs)
        for some, wanted in zip(gone, expected, strict=True):
            check_equal(trace(model, inputs, some)[1], wanted)


@pytest.mark.parametrize("name", ["shuffle", "lstm", "fused, heads first"])
def test_an_operator_is_followed_once(name):
    model, inputs = make(name)
    gone = list(draws(model, inputs))
    with keeping_recordings():
        trace(model, inputs)
        before = recording_for(model, inputs).followed
        for some in gone:  # a copy without some channels may have other strides, and be reshaped otherwise
            trace(model, inputs, some)
        after = recording_for(model, inputs).followed
        assert 0 < before <= after < 1.2 * before
        for some in gone:
            trace(model, inputs, some)
        assert recording_for(model, inputs).followed == after


def test_where_channels_go_by_values_an_operator_is_followed_again():
    """Places carry numbers, and tokens are picked by what they hold: other ones without some channels."""
    model, inputs = make("routed")
    with keeping_recordings():
        trace(model, inputs)
        before = recording_for(model, inputs).followed
        for some in draws(model, inputs):
            trace(model, inputs, some)
        kept = recording_for(model, inputs)
    assert before < kept.followed < 3 * before


@pytest.mark.parametrize(("limit", "most"), [("_MOST_BYTES", 0), ("_MOST_OPERATORS", 3), ("_MOST_NUMBERS", -1)])
def test_what_is_kept_has_bounds(limit, most, monkeypatch):
    model, inputs = make("fused, heads first")
    expected = [trace(model, inputs, some)[1] for some in draws(model, inputs)]
    monkeypatch.setattr(recording, limit, most)
    with keeping_recordings():
        for some, wanted in zip(draws(model, inputs), expected, strict=True):
            check_equal(trace(model, inputs, some)[1], wanted)


def test_inputs_share_the_room_for_what_is_kept(monkeypatch):
    """What one of them leaves another can take, and what is no longer kept is given back."""
    model, inputs = make("fused, heads first")
    with keeping_recordings():
        trace(model, inputs)
        needed = recording_for(model, inputs).bytes - Recording(model).bytes
    monkeypatch.setattr(recording, "_MOST_BYTES", 2 * needed)
    with keeping_recordings():
        for _ in range(3):
            trace(model, inputs)
        assert recording_for(model, inputs).bytes == needed + Recording(model).bytes
        another, third = inputs.clone(), inputs.clone()
        trace(model, another)
        assert recording_for(model, another).bytes == recording_for(model, inputs).bytes
        trace(model, third)
        assert recording_for(model, third).bytes == Recording(model).bytes


def test_what_is_kept_is_a_small_share_of_the_weights():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512), nn.GELU()) for _ in range(12))).eval()
    inputs = torch.randn(8, 512)
    with keeping_recordings():
        for some in draws(model, inputs):
            trace(model, inputs, some)
        assert 0 < recording_for(model, inputs).bytes < 0.04 * sum(p.nbytes for p in model.parameters())


def test_another_model_or_input_has_notes_of_its_own():
    model, x = mlp().eval(), torch.randn(3, 20)
    wide = copy.deepcopy(model)
    with keeping_recordings():
        kept = recording_for(model, x)
        assert recording_for(model, x) is kept
        assert recording_for(model, x.clone()) is not kept
        assert recording_for(wide, x) is not kept
        kept = recording_for(model, x)
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
        assert recording_for(model, x) is not kept
        with keeping_recordings():
            kept = recording_for(model, x)
        assert recording_for(model, x) is kept
    assert recording_for(model, x) is not recording_for(model, x)
