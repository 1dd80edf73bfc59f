"""The greedy order of moves and how far it is gone: what is measured, and that it is what measuring all would give."""

import math
from types import SimpleNamespace

import pytest
import torch

from torch_sluice.compress.choice import choose_layers
from torch_sluice.compress.estimate import Score
from torch_sluice.compress.measure import _is_enough
from torch_sluice.compress.progress import Progress
from torch_sluice.compress.quantization import Candidate
from torch_sluice.compress.search import find_longest
from torch_sluice.compress.sensitivity import Sensitivity, choose_longest, order_moves


def longest(moves, groups, good, cost=len, stop=lambda plan: False):
    """Of plans of which those up to so many groups keep the floor."""
    return choose_longest(moves, groups, lambda plan: 1 - 0.1 * len(plan), 0.9999 - 0.1 * good, stop, cost, len)


class Model:
    """Groups of 8 units, of which each that leaves saves ``worth`` and costs more the more have left."""

    def __init__(self, prices, sizes=(6, 4, 2)):
        self.prices, self.sizes, self.asked = prices, sizes, []
        self.curves = [Sensitivity(g, [], []) for g in range(len(prices))]

    def further(self, g):
        done = len(self.curves[g].kept)
        if done == len(self.sizes):
            return False
        self.asked.append((g, self.sizes[done]))
        self.curves[g].kept.append(self.sizes[done])
        self.curves[g].losses.append(self.loss({g: self.sizes[done]}))
        return True

    def loss(self, plan):
        return sum(self.prices[g] * (8 - kept) ** 2 for g, kept in plan.items())

    def predict_saving(self, kept, g, count):
        return kept.get(g, 8) - count


def test_the_order_is_the_same_whether_sizes_are_measured_before_or_on_demand():
    prices = [0.01, 0.002, 0.5, 0.03]
    lazy, eager = Model(prices), Model(prices)
    for g in range(4):
        while eager.further(g):
            pass
    plans = list(order_moves(lazy, lazy.curves, lazy.further))
    assert plans == list(order_moves(eager, eager.curves))
    assert len(plans) == 12
    assert plans[0] == {1: 6}
    assert plans[-1] == dict.fromkeys(range(4), 2)


def test_only_what_the_order_comes_to_is_measured():
    model = Model([0.001 * (g + 1) for g in range(40)])
    chosen = longest(order_moves(model, model.curves, model.further), 40, 3)
    assert 1 <= len(chosen) <= 3
    assert len(model.asked) <= 40 + 20  # the first size of each, and one more for each of the first moves


@pytest.mark.parametrize("good", [0, 1, 3, 4, 5, 9, 31, 32])
@pytest.mark.parametrize("cost", [len, lambda plan: 2.0 ** len(plan), lambda plan: 1.0], ids=["right", "wrong", "flat"])
def test_the_longest_accepted_prefix_is_found(good, cost):
    plans = [dict.fromkeys(range(n + 1), 1) for n in range(32)]
    assert len(longest(iter(plans), 8, good, cost)) == good
    stopped = longest(iter(plans), 8, good, cost, lambda plan: len(plan) >= 6)
    assert len(stopped) == min(good, 6)


def test_no_moves_are_no_plan():
    assert longest(iter([]), 0, 5) == {}


def test_a_search_that_is_told_costs_looks_at_few_places():
    looked = []

    def measure(number):
        looked.append(number)
        return 1 - 0.001 * number

    steps = list(range(201))
    assert find_longest(measure, 0.95, steps, steps, (0, 1.0), (200, 0.8)) in range(46, 51)
    assert len(looked) <= 3
    looked.clear()
    assert find_longest(measure, 0.95, [1.1**n for n in steps], steps, (0, 1.0), (200, -math.inf)) in range(46, 51)
    assert len(looked) <= 10
    assert find_longest(measure, 0.95, steps, [0.0, 1.0] + [1.001] * 199, (1, 1.0), (200, 0.8)) == 1  # nothing to win


def layers(losses):
    calls = []

    def loss(some):
        calls.append(len(some))
        return sum(losses[int(c.name)] for c in some), "ValueError: no"

    return [Candidate(str(n), None, [], 2e-3, 1e-3, 100) for n in range(len(losses))], loss, calls


def test_many_layers_are_measured_in_sets_and_those_that_cost_much_are_found():
    losses = [1e-5] * 200
    losses[17] = losses[120] = 0.2
    candidates, loss, calls = layers(losses)

    def score(chosen, finer):
        low = 1 - loss(chosen)[0]
        return Score(low, low)

    calls.clear()
    choice = choose_layers(candidates, score, loss, 0.99, Progress(False))
    assert {c.name for c in candidates} - {c.name for c in choice.chosen} == {"17", "120"}
    assert choice.score.low >= 0.99
    assert len(calls) < 80
    assert {decision.name: decision.reason for decision in choice.stay} == dict.fromkeys(
        ["17", "120"], "quantised alone it moves the outputs by 20.00%"
    )


def test_a_layer_that_fails_among_many_is_found():
    losses = [1e-5] * 100
    losses[63] = math.inf
    candidates, loss, _ = layers(losses)

    def score(chosen, finer):
        return Score(1.0, 1.0) if math.isfinite(loss(chosen)[0]) else Score(-math.inf, -math.inf)

    choice = choose_layers(candidates, score, loss, 0.99, Progress(False))
    assert len(choice.chosen) == 99
    assert [(d.name, d.reason) for d in choice.stay] == [("63", "the model fails with it quantised: ValueError: no")]


def test_samples_of_many_outputs_are_fewer():
    losses, scales = torch.ones(4, dtype=torch.float64), torch.full((4,), 10.0, dtype=torch.float64)
    assert _is_enough(losses, scales, 1 << 20)
    assert not _is_enough(losses, scales, 10)
    assert not _is_enough(losses * torch.tensor([1, 5, 1, 9]), scales, 1 << 20)


def test_what_would_make_up_for_cuts_is_freed_where_nothing_is_cut(monkeypatch):
    import torch_sluice
    from torch_sluice.compress import quantising, run

    seen = []
    choose = quantising.choose_layers
    monkeypatch.setattr(
        run, "find_stages", lambda of, floor: (seen.append(of.pruner) or [run.Stage({})], [], Score(1.0, 1.0, 32))
    )

    def watch(*arguments):
        seen.append(SimpleNamespace(moments=seen[0].moments, folds=seen[0].folds))
        return choose(*arguments)

    monkeypatch.setattr(quantising, "choose_layers", watch)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)).eval()
    batches = [(torch.randn(16, 16), None) for _ in range(8)]
    torch_sluice.compress(model, batches[0][0], batches, keep=0.9, progress=False)
    assert seen[1].moments is None
    assert seen[1].folds == {}
