"""What compression goes by when it chooses: how far outputs move, and the time of layers within a call of the model."""

import copy
import math

import pytest
import torch
from torch import nn

import torch_sluice
from torch_sluice.compress import quantization
from torch_sluice.compress.latency import Latency
from torch_sluice.compress.layers import quantized_weights
from torch_sluice.compress.measure import Measure
from torch_sluice.compress.progress import Progress
from torch_sluice.compress.quantization import Candidate
from torch_sluice.compress.quantized import QuantizedWeight

OPTIONS = {"policy": "sqnr", "target_sqnr": 30.0, "weight_bits": 8, "group_size": 0}


def model_and_batches(count=10):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    inputs = [torch.randn(8, 16) for _ in range(count)]
    with torch.no_grad():
        return model, [(x, model(x).argmax(1)) for x in inputs]


def accuracy(model, batches):
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / sum(len(y) for _, y in batches)


def moved(model, by):
    """A copy whose last layer is off by so much."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[2].weight += by * torch.randn(other[2].weight.shape, generator=torch.Generator().manual_seed(1))
    return other


def test_loss_tells_apart_what_the_metric_cannot():
    model, batches = model_and_batches()
    measure = Measure(model, batches, accuracy)
    near, far = moved(model, 1e-5), moved(model, 1e-4)
    assert measure.share(near) == measure.share(far) == 1
    assert 0 == measure.loss(model) < measure.loss(near) < measure.loss(far) < 1e-4


def test_loss_is_the_relative_squared_error_on_the_first_batches():
    model, batches = model_and_batches()
    other = moved(model, 0.01)
    with torch.no_grad():
        pairs = [(model(x).double(), other(x).double()) for x, _ in batches[:8]]
    formula = sum((y - z).square().sum() for y, z in pairs) / sum((y - y.mean(0)).square().sum() for y, _ in pairs)
    for metric in (accuracy, lambda model, batches: 1.0):
        assert Measure(model, batches, metric).loss(other) == pytest.approx(float(formula), rel=1e-6)
    few = Measure(model, batches[:3], None)
    assert few.loss(other) == pytest.approx(1 - few.share(other))


def test_loss_falls_back_on_the_metric_where_inputs_are_not_the_models():
    model, batches = model_and_batches()
    wrapped = [({"pixels": x}, y) for x, y in batches]

    def metric(model, batches):
        return accuracy(model, [(inputs["pixels"], y) for inputs, y in batches])

    measure = Measure(model, wrapped, metric)
    other = moved(model, 2.0)
    assert measure.loss(other) == 1 - measure.share(other) > 0


@pytest.mark.parametrize("fault", ["NaN", "shape"])
def test_loss_of_a_candidate_that_fails_is_infinite(fault):
    model, batches = model_and_batches()
    measure, broken = Measure(model, batches, accuracy), copy.deepcopy(model)
    if fault == "NaN":
        nn.init.constant_(broken[2].bias, math.nan)
    else:
        broken[2] = nn.Linear(31, 4)
    assert measure.loss(broken) == math.inf


def test_a_large_layer_need_not_become_much_faster_and_none_may_become_slower(monkeypatch):
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 128), nn.Linear(128, 512), nn.Linear(512, 8)).eval()
    factors = {"0": 1.05, "1": 1.05, "2": 0.99, "3": 1.2}

    def time_in_place(model, candidates, *_):
        for candidate in candidates:
            candidate.before, candidate.after = 1e-3 * factors[candidate.name], 1e-3

    monkeypatch.setattr(quantization, "_time_in_place", time_in_place)
    chosen, stay = quantization.find_candidates(model, torch.randn(2, 256), OPTIONS, Progress(False))
    assert {candidate.name for candidate in chosen} == {"0", "3"}
    assert all(candidate.bytes > 0 for candidate in chosen)
    assert {decision.name: decision.reason for decision in stay} == {
        "1": "it is not 1.1 times faster quantised: 1050 -> 1000 µs",
        "2": "it is not faster quantised: 990 -> 1000 µs",
    }


def test_layers_are_timed_within_calls_of_the_model_which_stays_as_it_is():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = nn.Linear(8, 8), nn.Linear(512, 512)

        def forward(self, x):
            return self.large(self.large(x)) + self.small(x[:, :8]).sum()

    model, x = Twice().eval(), torch.randn(64, 512)
    before = copy.deepcopy(model.state_dict())
    layers = [
        Candidate(name, QuantizedWeight.from_float(getattr(model, name).weight, **OPTIONS), [f"{name}.weight"])
        for name in ("small", "large")
    ]
    quantization._time_in_place(model, layers, x, Progress(False))
    small, large = layers
    assert 0 < small.before < large.before
    assert 0 < small.after < large.after
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_of_layers_that_cost_too_much_the_worst_stay():
    model, batches = model_and_batches()
    model.insert(1, nn.Linear(32, 32))
    with torch.no_grad():
        batches = [(x, model(x).argmax(1)) for x, _ in batches]
    good, bad = (QuantizedWeight.from_float(model[i].weight, **OPTIONS) for i in (0, 1))
    bad.scale.neg_()
    candidates = [
        Candidate("1", bad, ["1.weight"], 3e-3, 1e-3, 100),
        Candidate("0", good, ["0.weight"], 2e-3, 1e-3, 100),
    ]
    chosen, stay = quantization.choose(model, candidates, Measure(model, batches, accuracy), 0.9, Progress(False))
    assert [candidate.name for candidate in chosen] == ["0"]
    (decision,) = stay
    assert (decision.name, decision.action) == ("1", "float")
    assert decision.output_error > 0.1
    assert "alone it moves the outputs by" in decision.reason


def compress_with_relaxed_gain(monkeypatch, gain, **options):
    """The targets of the layers of a compressed model, if fewer bits are measured to be ``gain`` times as fast."""
    model, batches = model_and_batches()
    with torch.no_grad():
        model[0].weight *= 30  # or no layer of so few numbers would be faster quantised
    monkeypatch.setattr(quantization, "_GAIN", 0.0)
    monkeypatch.setattr(quantization, "compare_latency", lambda *_: (Latency(gain, gain), Latency(1.0, 1.0)))
    small = torch_sluice.compress(model, batches[0][0], batches, prune=False, progress=False, **options)
    weights = [weight for _, weight in quantized_weights(small)]
    assert weights
    return {weight.options.target_sqnr for weight in weights}, small.compression_report


def test_activations_take_fewer_bits_where_that_is_faster(monkeypatch):
    targets, report = compress_with_relaxed_gain(monkeypatch, 1.2)
    assert targets == {24.0}
    assert any("1.20 times as fast" in note for note in report.notes)


@pytest.mark.parametrize(
    "options",
    [{"target_sqnr": 30.0}, {"target_sqnr": 40.0}, {"quantize_policy": "amax"}],
    ids=["given", "given higher", "another policy"],
)
def test_a_target_that_was_given_stays(monkeypatch, options):
    targets, _ = compress_with_relaxed_gain(monkeypatch, 1.2, **options)
    assert targets == {options.get("target_sqnr", 30.0)}


def test_bits_stay_where_fewer_are_no_faster(monkeypatch):
    assert compress_with_relaxed_gain(monkeypatch, 1.0)[0] == {30.0}


def test_bits_stay_where_fewer_cost_too_much(monkeypatch):
    def metric(model, batches):
        relaxed = any(weight.options.target_sqnr < 30 for _, weight in quantized_weights(model))
        return 0.5 if relaxed else 1.0

    assert compress_with_relaxed_gain(monkeypatch, 1.2, metric=metric)[0] == {30.0}
