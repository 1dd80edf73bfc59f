"""What compression goes by when it chooses: how far outputs move, and the time of layers within a call of the model."""

import copy
import itertools
import math

import pytest
import torch
from support.compress_models import call_all_faster
from torch import nn

import torch_sluice
from torch_sluice.compress import measure as measure_module
from torch_sluice.compress import quantization, widths
from torch_sluice.compress.choice import Choice, choose_layers
from torch_sluice.compress.estimate import Score
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
    assert measure.score(near).kept == measure.score(far).kept == 1
    losses = [measure.loss(other)[0] for other in (model, near, far)]
    assert 0 == losses[0] < losses[1] < losses[2] < 1e-4


def test_loss_is_the_relative_squared_error_on_pieces_of_the_last_fold(monkeypatch):
    model, batches = model_and_batches()
    other = moved(model, 0.01)
    monkeypatch.setattr(measure_module, "_ACCURACY", 0.0)
    for metric in (accuracy, lambda model, batches: 1.0, None):
        measure = Measure(model, batches, metric)
        last = [piece for piece in measure.pieces if piece.fold == measure.folds[-1]][:8]
        assert last
        with torch.no_grad():
            everything = torch.cat([model(x) for x, _ in batches]).double()
            y, z = (torch.cat([m(piece.inputs) for piece in last]).double() for m in (model, other))
        mean = (y if metric is not None else everything).mean(0)
        formula = (y - z).square().sum() / (y - mean).square().sum()
        assert measure.loss(other)[0] == pytest.approx(float(formula), rel=1e-5)


def test_loss_looks_at_no_more_than_it_needs():
    """All samples lose alike: the first pieces tell it."""
    model, batches = model_and_batches(100)
    measure, runs = Measure(model, batches, None), []
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[2].weight *= 0.9
        other[2].bias *= 0.9
    other.register_forward_hook(lambda *_: runs.append(1))
    loss, _ = measure.loss(other)
    assert len(runs) == 2
    assert loss == pytest.approx(1 - measure.score(other).kept, rel=0.5)


def test_loss_falls_back_on_the_metric_where_inputs_are_not_the_models():
    model, batches = model_and_batches()
    wrapped = [({"pixels": x}, y) for x, y in batches]

    def metric(model, batches):
        return accuracy(model, [(inputs["pixels"], y) for inputs, y in batches])

    measure = Measure(model, wrapped, metric)
    other = moved(model, 2.0)
    assert measure.loss(other)[0] == 1 - measure.score(other).kept > 0
    report = torch_sluice.compress(
        model, batches[0][0], wrapped, keep=0.5, metric=metric, quantize=False, progress=False
    ).compression_report
    assert any("not compensated: the model does not run on data" in note for note in report.notes)


@pytest.mark.parametrize("fault", ["NaN", "shape"])
def test_loss_of_a_candidate_that_fails_is_infinite(fault):
    model, batches = model_and_batches()
    measure, broken = Measure(model, batches, accuracy), copy.deepcopy(model)
    if fault == "NaN":
        nn.init.constant_(broken[2].bias, math.nan)
    else:
        broken[2] = nn.Linear(31, 4)
    loss, reason = measure.loss(broken)
    assert loss == math.inf
    assert reason.startswith("its outputs are not finite" if fault == "NaN" else "RuntimeError: mat1 and mat2")


def test_layers_that_are_not_faster_are_quantised_for_their_bytes_while_a_call_stays_as_fast(monkeypatch):
    widths_of = [256, 256, 128, 512, 512, 4]
    model = nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(widths_of))).eval()
    factors = {"0": 1.05, "1": 0.99, "2": 0.985, "3": 1.2, "4": 1.0}

    def time_in_place(model, candidates, *_):
        for candidate in candidates:
            candidate.before, candidate.after = 1e-3 * factors[candidate.name], 1e-3
        return 1.2e-3

    monkeypatch.setattr(quantization, "_time_in_place", time_in_place)
    chosen, stay = quantization.find_candidates(model, torch.randn(2, 256), OPTIONS, Progress(False))
    assert {candidate.name for candidate in chosen} == {"0", "2", "3"}
    assert [candidate.name for candidate in chosen if candidate.is_faster] == ["3"]
    assert all(candidate.bytes > 0 for candidate in chosen)
    assert {decision.name: decision.reason for decision in stay} == {
        "1": "it is not 1.1 times faster quantised: 990 -> 1000 µs",  # fewer bytes for its time than the next
        "4": "it is not 1.1 times faster quantised: 1000 -> 1000 µs",  # nor many bytes
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
    """And those with which the model fails; the score is that of the choice."""
    losses = {"good": 0.001, "fair": 0.01, "bad": 0.2, "broken": math.inf}
    candidates = [Candidate(name, nn.Identity(), [], 2e-3, 1e-3, 100) for name in reversed(losses)]

    def score(chosen, finer):
        low = 1 - sum(losses[c.name] for c in chosen)
        return Score(low + 0.005, low)

    def loss(chosen):
        return sum(losses[c.name] for c in chosen), "ValueError: no"

    choice = choose_layers(candidates, score, loss, 0.95, Progress(False))
    assert [candidate.name for candidate in choice.chosen] == ["good", "fair"]
    assert choice.score.low == pytest.approx(0.989)
    assert {decision.name: decision.reason for decision in choice.stay} == {
        "bad": "quantised alone it moves the outputs by 20.00%",
        "broken": "the model fails with it quantised: ValueError: no",
    }
    assert choose_layers(candidates[1:], score, loss, 0.5, Progress(False)).chosen == candidates[1:]
    assert choose_layers([], score, loss, 0.5, Progress(False)) == Choice()


@pytest.mark.parametrize(
    ("finer_loss", "able", "chosen", "finer"),
    [
        (0.1, "abcd", "abcd", "cd"),  # what costs most for what it wins takes finer activations, and no more than that
        (0.1, "abc", "abc", "c"),  # slower than in floating point with them
        (0.4, "abcd", "abc", "c"),  # all of them finer would be too much, and one is not
        (1.0, "abcd", "ab", ""),
    ],
)
def test_layers_that_cost_too_much_take_finer_activations(finer_loss, able, chosen, finer):
    losses = {"a": 0.01, "b": 0.02, "c": 0.05, "d": 0.06}
    candidates = [Candidate(name, nn.Identity(), [], 2e-3, 1e-3, 100) for name in losses]

    def score(some, fine):
        names = {c.name for c in fine}
        assert names <= {c.name for c in some}
        low = 1 - sum(losses[c.name] * (finer_loss if c.name in names else 1.0) for c in some)
        return Score(low, low)

    def loss(some):
        return sum(losses[c.name] for c in some), None

    choice = choose_layers(
        candidates, score, loss, 0.945, Progress(False), lambda some: [c for c in some if c.name in able]
    )
    assert "".join(sorted(c.name for c in choice.chosen)) == chosen
    assert "".join(sorted(c.name for c in choice.finer)) == finer
    assert choice.score.low >= 0.945
    assert {decision.name for decision in choice.stay} == set("abcd") - set(chosen)


def compress_with_relaxed_gain(monkeypatch, gain, **options):
    """The targets of the layers of a compressed model, if fewer bits are measured to be ``gain`` times as fast."""
    model, batches = model_and_batches()
    with torch.no_grad():
        model[0].weight *= 30  # or no layer of so few numbers would be faster quantised
    monkeypatch.setattr(quantization, "_GAIN", 0.0)
    monkeypatch.setattr(widths, "compare_latency", lambda *_: (Latency(gain, gain), Latency(1.0, 1.0)))
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

    assert compress_with_relaxed_gain(monkeypatch, 1.2, metric=metric, keep=0.9)[0] == {30.0}


def finer_by_metric(monkeypatch, seconds, **options):
    """A compressed model of which layer 2 is right with fine activations alone, where these take so many seconds."""

    def metric(model, batches):
        weight = dict(quantized_weights(model)).get("2.weight")
        return 0.5 if weight is not None and weight.options.target_sqnr < 40 else 1.0

    def time_turn(model, some, watched, example, of):
        of.update((c.places[0], seconds) for c in watched)

    model, batches = model_and_batches()
    monkeypatch.setattr(quantization, "_time_in_place", call_all_faster)
    monkeypatch.setattr(widths, "time_turn", time_turn)
    small = torch_sluice.compress(
        model, batches[0][0], batches, metric=metric, keep=0.9, prune=False, progress=False, **options
    )
    reasons = {layer.name: layer.reason for layer in small.compression_report.layers if layer.action == "quantized"}
    return small, {name: weight.options.target_sqnr for name, weight in quantized_weights(small)}, reasons


def test_a_layer_that_would_stay_takes_finer_activations(monkeypatch, tmp_path):
    small, targets, reasons = finer_by_metric(monkeypatch, 0.0)
    assert targets.pop("2.weight") == widths.FINER_SQNR
    assert set(targets.values()) <= {24.0, 30.0}
    assert "finer activations" in reasons["2"]
    assert not any("finer" in reason for name, reason in reasons.items() if name != "2")
    torch_sluice.compress.save(small, tmp_path / "small.pt")
    loaded = torch_sluice.compress.load(tmp_path / "small.pt", model_and_batches()[0])
    assert dict(quantized_weights(loaded))["2.weight"].options.target_sqnr == widths.FINER_SQNR


@pytest.mark.parametrize(
    ("seconds", "options"), [(1e9, {}), (0.0, {"target_sqnr": 30.0})], ids=["slower", "the target was given"]
)
def test_finer_activations_are_not_taken(monkeypatch, seconds, options):
    _, targets, _ = finer_by_metric(monkeypatch, seconds, **options)
    assert "2.weight" not in targets
    assert set(targets.values()) <= {24.0, 30.0}  # 24 where this machine is faster with it
