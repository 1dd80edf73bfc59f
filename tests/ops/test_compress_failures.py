"""What fails while a model is compressed: what is the user's is said at once, what is a candidate's is left out."""

import copy

import pytest
import torch
from support.compress_models import call_all_faster, mlp
from torch import nn

import torch_sluice
from torch_sluice.compress import QuantizedWeight, quantising, quantization, run, widths
from torch_sluice.compress.folding import find_pairs, fold_batch_norms, fold_pairs
from torch_sluice.compress.moments import measure_moments

QUIET = {"progress": False}
EXAMPLE = torch.randn(1, 20)


def batches(count=4, rows=32):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(rows, 20, generator=generator), None) for _ in range(count)]


class Asserting(nn.Module):
    """Takes what the original of these sizes gives, and nothing else, beyond the example."""

    def __init__(self, error):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.error = mlp(), error

    def forward(self, x):
        if len(x) > 1 and self.net[0].weight.shape[0] != 64:
            raise self.error
        return self.net(x)


def test_a_group_with_which_the_model_fails_on_data_is_refused():
    report = torch_sluice.compress(
        Asserting(KeyError("x")), EXAMPLE, batches(), keep=0.5, quantize=False, **QUIET
    ).compression_report
    reason = "net.0: stays, because the model does not run without some of it (KeyError: 'x')"
    assert reason in report.notes
    assert report.improved


@pytest.mark.parametrize("error", [AssertionError("64 wanted"), KeyError("x"), ZeroDivisionError(), StopIteration()])
@pytest.mark.parametrize("policy", ["sensitivity", "quantile"])
def test_whatever_a_candidate_raises_it_is_left_out(error, policy, monkeypatch):
    monkeypatch.setattr(run, "_PROVED", 0)  # else it is met when groups are proved
    small = torch_sluice.compress(
        Asserting(error), EXAMPLE, batches(), keep=0.5, policy=policy, quantize=False, **QUIET
    )
    report = small.compression_report
    assert small.net[0].out_features == 64
    if policy == "sensitivity":
        reasons = [layer.reason for layer in report.layers if layer.name == "net.0"]
        assert reasons == [f"the model fails with its smallest cut: {run.describe_error(error)}"]
        assert small.net[2].out_features < 65
    else:
        assert sum("which failed: " + type(error).__name__ in note for note in report.notes) == 1


def test_a_metric_that_fails_for_one_candidate():
    known = {}

    def metric(model, data):
        sizes = tuple(p.numel() for p in model.parameters())
        if not known:
            known[sizes] = 0.9
        return known[sizes]

    same = torch_sluice.compress(mlp().eval(), EXAMPLE, batches(), keep=0.5, metric=metric, quantize=False, **QUIET)
    assert [p.numel() for p in same.parameters()] == [p.numel() for p in mlp().parameters()]
    notes = [note for note in same.compression_report.notes if "which failed: KeyError" in note]
    assert notes


def test_code_that_looks_into_a_quantised_layer(monkeypatch):
    """Layers of which the model does not take the quantised kind stay, one by one; the others are quantised."""

    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.third = nn.Linear(20, 64), nn.Linear(64, 64), nn.Linear(64, 4)

        def forward(self, x):
            if isinstance(self.second.weight, QuantizedWeight):
                raise AttributeError("no such thing")
            return self.third(self.second(self.first(x).relu()).relu())

    monkeypatch.setattr(quantization, "_time_in_place", call_all_faster)
    small = torch_sluice.compress(Looking().eval(), EXAMPLE, batches(), keep=0.5, prune=False, **QUIET)
    decisions = {layer.name: layer for layer in small.compression_report.layers}
    assert decisions["second"].action == "float"
    assert "no such thing" in decisions["second"].reason
    assert {decisions[name].action for name in ("first", "third")} == {"quantized"}
    with torch.no_grad():
        assert small(EXAMPLE).shape == (1, 4)


@pytest.mark.parametrize("where", ["find_candidates", "find_pairs", "compare_latency", "relax"])
def test_no_stage_of_the_work_lets_an_error_out(where, monkeypatch):
    def fail(*_):
        raise AttributeError("inside")

    monkeypatch.setattr(quantization, "_time_in_place", call_all_faster)
    rooms = {"find_candidates": quantization, "find_pairs": quantising, "compare_latency": run, "relax": widths}
    monkeypatch.setattr(rooms[where], where, fail)
    small = torch_sluice.compress(mlp().eval(), EXAMPLE, batches(), keep=0.5, **QUIET)
    assert any("AttributeError: inside" in note for note in small.compression_report.notes)
    with torch.no_grad():
        assert small(EXAMPLE).isfinite().all()


def test_an_interruption_gets_through():
    def metric(model, data):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        torch_sluice.compress(mlp(), EXAMPLE, batches(), metric=metric, **QUIET)


class OnlyShort(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(20, 4)

    def forward(self, x):
        if x.sum() > 1e6:
            raise KeyError("large")
        return self.layer(x)


@pytest.mark.parametrize("with_metric", [False, True])
def test_a_batch_that_the_original_fails_on_is_named(with_metric):
    data = [(torch.empty(0, 20), None), *batches(2), (torch.full((2, 20), 1e6), None)]

    def metric(model, data):
        return float(sum(model(x).abs().mean() for x, _ in data))

    with pytest.raises(ValueError, match=r"the original model fails on batch 3 of data: KeyError: 'large'"):
        torch_sluice.compress(OnlyShort(), EXAMPLE, data, metric=metric if with_metric else None, **QUIET)


@pytest.mark.parametrize(("error", "kind"), [(KeyError("label"), ValueError), (TypeError("no"), TypeError)])
def test_a_metric_that_fails_on_the_original_is_the_users(error, kind):
    def metric(model, data):
        raise error

    with pytest.raises(kind, match="metric fails for the original model: (KeyError: 'label'|TypeError: no)"):
        torch_sluice.compress(mlp(), EXAMPLE, batches(), metric=metric, **QUIET)


def scripted():
    return torch.jit.trace(mlp().eval(), EXAMPLE)


def exported():
    return torch.export.export(mlp().eval(), (EXAMPLE,)).module()


def quantised():
    return torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})


@pytest.mark.parametrize("make", [scripted, exported, quantised])
@pytest.mark.filterwarnings("ignore")
def test_models_that_are_no_longer_eager_are_named(make):
    with pytest.raises(TypeError, match=r"model is (a ScriptModule|a graph that|quantised by).*, expected the eager"):
        torch_sluice.compress(make(), EXAMPLE, batches(), **QUIET)
    with pytest.raises(
        TypeError, match=r"(of which 0 is (a ScriptModule|a graph)|by torch.ao \(0).*, expected the eager"
    ):
        torch_sluice.compress(nn.Sequential(make()), EXAMPLE, batches(), **QUIET)


def test_a_model_that_writes_into_its_inputs_gets_copies():
    """Else each candidate would be measured on what the one before it left."""

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = mlp()

        def forward(self, x):
            return self.layers(x.sub_(1).mul_(1.1))

    model, data, example = Centred(), batches(), EXAMPLE.clone()
    before = [inputs.clone() for inputs, _ in data]
    small = torch_sluice.compress(model, example, data, **QUIET)
    assert torch.equal(example, EXAMPLE)
    assert all(torch.equal(inputs, old) for (inputs, _), old in zip(data, before, strict=True))
    assert not any("differ from run to run" in note for note in small.compression_report.notes)
    assert not small._forward_pre_hooks
    assert not model._forward_pre_hooks


def test_a_metric_that_empties_its_list_takes_no_data_away():
    def metric(model, some):
        value = sum(float((model(inputs).argmax(1) >= 0).float().mean()) for inputs, _ in some) / len(some)
        some.clear()
        return value

    assert torch_sluice.compress(mlp(), EXAMPLE, batches(), metric=metric, **QUIET).compression_report.samples > 1


def test_a_metric_that_returns_text_is_refused():
    with pytest.raises(ValueError, match="metric returned a str, expected one number: '0.5'"):
        torch_sluice.compress(mlp(), EXAMPLE, batches(), metric=lambda model, some: "0.5", **QUIET)


def test_a_compiled_model_is_what_it_wraps():
    small = torch_sluice.compress(torch.compile(mlp().eval(), backend="eager"), EXAMPLE, batches(), keep=0.5, **QUIET)
    assert type(small) is nn.Sequential
    traced = torch.fx.symbolic_trace(mlp().eval())  # of modules, which are seen
    small = torch_sluice.compress(traced, EXAMPLE, batches(), keep=0.5, quantize=False, **QUIET)
    assert any(layer.action == "pruned" for layer in small.compression_report.layers)


@pytest.mark.parametrize("features", [64, 20])
def test_a_norm_over_tokens_is_not_folded(features):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, features), nn.BatchNorm1d(20)).eval()
    nn.init.uniform_(model[1].weight, 0.5, 2), model[1].running_mean.normal_()
    x = torch.randn(4, 20, 32)
    assert fold_batch_norms(model, x) == []
    assert isinstance(model[1], nn.BatchNorm1d)
    small = torch_sluice.compress(model, x, [(x, None)], keep=0.5, prune=False, **QUIET)
    with torch.no_grad():
        assert small(x).shape == (4, 20, features)


def test_folding_is_undone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()
    model[1].running_mean.normal_()
    before, x = copy.deepcopy(model.state_dict()), torch.randn(6, 8)
    pairs = find_pairs(model, x)
    assert pairs == [("0", "1")]
    expected = model(x)
    undo = fold_pairs(model, pairs)
    assert isinstance(model[1], nn.Identity)
    torch.testing.assert_close(model(x), expected)
    undo()
    assert torch.equal(model(x), expected)
    assert list(before) == list(model.state_dict())


UNBATCHED = {
    "linear": (lambda: nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4)), (64,), 1),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 32, 3), nn.ReLU(), nn.Conv1d(32, 4, 1)), (3, 32), 30),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 1)), (3, 10, 10), 64),
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_inputs_without_a_batch_dimension(name):
    """The channels are where they are, and each input is a sample."""
    make, shape, positions = UNBATCHED[name]
    torch.manual_seed(0)
    model = make().eval()
    inputs = [torch.randn(shape) for _ in range(80)]
    small = torch_sluice.compress(model, inputs[0], [(x, None) for x in inputs], keep=0.6, quantize=False, **QUIET)
    report = small.compression_report
    assert report.samples == 80
    assert any(layer.action == "pruned" for layer in report.layers), str(report)
    with torch.no_grad():
        fresh = torch.randn(200, *shape)
        expected, got = (torch.stack([m(x) for x in fresh]) for m in (model, small))
    assert 1 - (got - expected).square().sum() / (expected - expected.mean(0)).square().sum() >= 0.6
    alone, together = (measure_moments(model, batch, ["2"]) for batch in (inputs, [torch.stack(inputs)]))
    assert alone.count["2"] == together.count["2"] == 80 * positions
    torch.testing.assert_close(alone.product["2"], together.product["2"], rtol=1e-4, atol=1e-3)


def test_a_result_that_cannot_be_built_leaves_the_original(monkeypatch):
    """Candidates were fitted to parts of the data, the result is to all of it: what fails only then is no user's."""
    build = run.Workshop.build

    def failing(self, stage):
        if stage.kept:
            raise ArithmeticError("no such matrix")
        return build(self, stage)

    monkeypatch.setattr(run.Workshop, "build", failing)
    torch.manual_seed(0)
    model = mlp()
    report = torch_sluice.compress(model, EXAMPLE, batches(), keep=0.5, quantize=False, **QUIET).compression_report
    assert (report.kept, report.improved) == (1.0, False)
    assert any("ArithmeticError: no such matrix" in note for note in report.notes)
