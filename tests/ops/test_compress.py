"""torch_sluice.compress: the promise on the metric, the rules, the user's model, bad input."""

import copy
import math

import pytest
import torch
from support.compress_models import Branches, Convolutions, call_all_faster, gated_llama, mlp, tokens
from torch import nn

import torch_sluice
from torch_sluice.compress import QuantizedWeight, pruning, quantization, run
from torch_sluice.compress.latency import Latency

QUIET = {"progress": False}


def wide():
    """A classifier in which most hidden channels repeat others, so that much can go."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 4)).eval()
    with torch.no_grad():
        model[0].weight[32:] = model[0].weight[:32].repeat(7, 1) * 0.2
        model[0].bias[32:] = model[0].bias[:32].repeat(7) * 0.2
    return model


def batches(count=3, size=64):
    torch.manual_seed(1)
    model = wide()
    inputs = [torch.randn(size, 20) for _ in range(count)]
    with torch.no_grad():
        return [(x, model(x).argmax(1)) for x in inputs]


def accuracy(model, data):
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data)
    return right / sum(len(y) for _, y in data)


@pytest.fixture
def same_speed(monkeypatch):
    """No test depends on how fast this machine happens to be: every quantised layer counts as faster."""
    monkeypatch.setattr(quantization, "_time_in_place", call_all_faster)
    monkeypatch.setattr(run, "compare_latency", lambda *_: (Latency(2e-3, 2e-3), Latency(1e-3, 1e-3)))


@pytest.mark.usefixtures("same_speed")
@pytest.mark.parametrize("policy", ["sensitivity", "quantile"])
def test_the_promise_holds_by_a_metric_of_the_users(policy):
    model, data = wide(), batches()
    small = torch_sluice.compress(model, data[0][0][:1], data, keep=0.95, metric=accuracy, policy=policy, **QUIET)
    report = small.compression_report
    fresh = batches(20)[3:]
    with torch.no_grad():
        assert accuracy(small, fresh) >= 0.95
    assert report.metric_before == 1.0
    assert report.metric_after == report.kept
    assert 0.95 <= report.kept_low < report.kept <= 1
    assert report.samples == 192
    assert report.bytes_after < 0.5 * report.bytes_before
    actions = {decision.action for decision in report.layers}
    assert {"pruned", "quantized"} <= actions
    assert isinstance(small[2].weight, QuantizedWeight)
    assert not any(parameter.requires_grad for parameter in small.parameters())
    assert f"{report.kept:.1%} kept, at least" in str(report)
    assert "(95 %, 192 samples)" in str(report)
    plain = report.as_dict()
    assert (plain["kept"], plain["kept_low"], plain["samples"]) == (report.kept, report.kept_low, 192)


@pytest.mark.parametrize(("prune", "quantize"), [(True, False), (False, True)])
@pytest.mark.usefixtures("same_speed")
def test_fidelity_is_kept_where_there_is_no_metric(prune, quantize):
    model, data = wide(), batches()
    small = torch_sluice.compress(
        model, data[0][0][:1], ((x, None) for x, _ in data), keep=0.9, prune=prune, quantize=quantize, **QUIET
    )
    with torch.no_grad():
        expected, got = (torch.cat([m(x) for x, _ in data]).double() for m in (model, small))
    formula = 1 - float((got - expected).square().sum() / (expected - expected.mean(0)).square().sum())
    if quantize:  # nothing is fitted to data, so the result itself was measured on all of it
        assert small.compression_report.kept == pytest.approx(formula, abs=1e-6)
    assert formula >= 0.9
    assert small.compression_report.bytes_after < small.compression_report.bytes_before
    if not quantize:
        small.train()(data[0][0]).square().mean().backward()
        assert all(parameter.grad is not None for parameter in small.parameters())


@pytest.mark.usefixtures("same_speed")
def test_the_users_model_is_never_changed():
    model, data = Convolutions().train(), [(torch.randn(4, 3, 8, 8), None)]
    before = copy.deepcopy(model.state_dict())
    small = torch_sluice.compress(model, data[0][0], data, keep=0.5, **QUIET)
    calls = []

    def interrupted(candidate, batches):
        calls.append(candidate)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        torch_sluice.compress(model, data[0][0], data, metric=interrupted, **QUIET)
    assert all(candidate is not model for candidate in calls)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not small.training
    assert not hasattr(model, "compression_report")


def test_a_promise_that_nothing_can_keep_gives_a_copy_and_says_so():
    model, data = mlp().eval(), [(torch.randn(16, 20), None)]

    def picky(candidate, batches):
        x = batches[0][0]
        return 1.0 if torch.equal(candidate(x), model(x)) else 0.1

    same = torch_sluice.compress(model, data[0][0], data, keep=1.0, metric=picky, **QUIET)
    assert same is not model
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), model.state_dict().values(), strict=True))
    report = same.compression_report
    assert report.kept == 1.0
    assert any("copy of the original" in note for note in report.notes)


def test_finetune_is_called_on_new_parameters_and_may_win_more():
    torch.manual_seed(0)
    model = mlp(64).eval()
    data = [(x, model(x).argmax(1)) for x in (torch.randn(128, 20) for _ in range(3))]
    seen, optimizers = [], {}

    def finetune(candidate, step):
        if step == 0:
            optimizers[id(candidate)] = torch.optim.Adam(candidate.parameters(), 1e-3)
        optimizer, (x, y) = optimizers[id(candidate)], data[step % len(data)]
        nn.functional.cross_entropy(candidate(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append((id(candidate), step, candidate.training))

    small = torch_sluice.compress(
        model,
        data[0][0][:1],
        data,
        keep=0.97,
        metric=accuracy,
        quantize=False,
        finetune=finetune,
        finetune_steps=5,
        **QUIET,
    )
    assert seen
    assert {step for _, step, _ in seen} == set(range(5))
    assert all(training for *_, training in seen)
    assert small.compression_report.kept >= 0.97


def test_a_budget_that_is_met_prunes_nothing():
    model, data = wide(), batches()
    small = torch_sluice.compress(model, data[0][0], data, keep=0.5, budget=1e3, quantize=False, **QUIET)
    assert small[0].out_features == 256
    assert any("meets the budget" in note for note in small.compression_report.notes)


@pytest.mark.usefixtures("same_speed")
def test_pruning_stops_where_the_budget_is_met(monkeypatch):
    monkeypatch.setattr(run, "measure_latency", lambda *_: Latency(4e-3, 4e-3))  # 1 ms beside the layers
    monkeypatch.setattr(pruning.Pruner, "time_layers", lambda self, _: self.seconds.update({"0": 1e-3, "2": 2e-3}))
    model, data = wide(), batches()

    def predicted(budget):
        small = torch_sluice.compress(
            model, data[0][0][:1], data, keep=0.9, metric=accuracy, quantize=False, budget=budget, **QUIET
        )
        shares = small[0].out_features / 256, small[2].out_features / 128
        return 1e-3 * (1 + shares[0] + 2 * shares[0] * shares[1])

    least = predicted(None)
    assert least < 2.4e-3
    assert least < predicted(3e-3) <= 3e-3


@pytest.mark.usefixtures("same_speed")
def test_control_flow_that_depends_on_data():
    """What the example reaches is pruned; what would break on other data is not, and all data still runs."""
    torch.manual_seed(0)
    model = Branches().eval()
    data = [(torch.randn(1, 16), None) for _ in range(8)]
    model(data[0][0])
    small = torch_sluice.compress(model, data[0][0], data, keep=0.5, **QUIET)
    notes = " ".join(small.compression_report.notes)
    assert "not reached by example_inputs" in notes
    with torch.no_grad():
        for x, _ in data:
            assert small(x).shape == (1, 4)


@pytest.mark.usefixtures("same_speed")
def test_gate_pruning_and_quantisation_together():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = gated_llama().eval()
    data = [({"input_ids": tokens(4)}, None) for _ in range(2)]
    small = torch_sluice.compress(model, {"input_ids": tokens(1)}, data, keep=0.8, **QUIET)
    report = small.compression_report
    assert {"pruned", "quantized"} <= {decision.action for decision in report.layers}, str(report)
    with torch.no_grad():
        assert small(**data[0][0]).logits.shape == (4, 12, 50)
    assert report.kept >= 0.8
    assert small.model.layers[0].self_attn.sluice_gate.dim == small.model.layers[0].self_attn.q_proj.in_features


@pytest.mark.usefixtures("same_speed")
def test_batch_norms_are_folded_and_outputs_stay():
    torch.manual_seed(0)
    model, data = Convolutions().eval(), [(torch.randn(4, 3, 8, 8), None)]
    small = torch_sluice.compress(model, data[0][0], data, keep=0.999, prune=False, **QUIET)
    assert isinstance(small.norm1, nn.Identity)
    assert isinstance(small.norm2, nn.Identity)
    assert small.compression_report.kept >= 0.999


DATA = [(torch.randn(4, 20), None)]
EXAMPLE = torch.randn(1, 20)


def nan_weights():
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    return model


BAD = {
    "keep 0": (dict(keep=0), ValueError, r"keep is 0, expected a share in \(0, 1\]"),
    "keep above 1": (dict(keep=1.1), ValueError, r"keep is 1.1, expected a share in \(0, 1\]"),
    "keep NaN": (dict(keep=math.nan), ValueError, r"keep is nan, expected a share"),
    "keep in per cent": (dict(keep="97%"), ValueError, r"keep is '97%', expected a share"),
    "no module": (dict(model="resnet"), TypeError, "model is a str, expected a torch.nn.Module"),
    "another policy": (dict(policy="magic"), ValueError, "policy is 'magic', expected one of 'sensitivity'"),
    "budget": (dict(budget=-1), ValueError, "budget is -1, expected seconds above 0"),
    "threads": (dict(threads=0), ValueError, "threads is 0, expected an integer of at least 1"),
    "neither": (dict(prune=False, quantize=False), ValueError, "prune and quantize are both False"),
    "finetune": (dict(finetune=3), TypeError, r"finetune is a int, expected a function \(model, step\)"),
    "weight_bits": (dict(weight_bits=3), ValueError, "weight_bits is 3, expected 8 or 4"),
    "quantize_policy": (dict(quantize_policy="x"), ValueError, "quantize_policy is 'x', expected 'sqnr' or 'amax'"),
    "group_size": (dict(group_size=5), ValueError, "group_size is 5, expected a multiple of 32"),
    "example of another size": (
        dict(example_inputs=torch.randn(1, 7)), ValueError, "example_inputs does not match the model, .* RuntimeError",
    ),
    "example of another kind": (dict(example_inputs={"y": 1}), ValueError, "example_inputs does not match the model"),
    "no data": (dict(data=[]), ValueError, r"data yields no batch, expected at least one \(inputs, target\)"),
    "used up": (dict(data=iter(())), ValueError, "an iterator that was used up"),
    "data is no iterable": (dict(data=3), TypeError, "data is a int, expected an iterable"),
    "no target": (dict(data=[torch.randn(4, 20)]), ValueError, "batch 0 of data is a Tensor, expected a pair"),
    "metric NaN": (dict(metric=lambda m, d: math.nan), ValueError, "metric returned nan for the original model"),
    "metric 0": (dict(metric=lambda m, d: 0.0), ValueError, "metric returned 0.0 .*, expected a number above 0"),
    "metric text": (dict(metric=lambda m, d: "good"), ValueError, "metric returned a str, expected one number"),
    "NaN in weights": (dict(model=nan_weights()), ValueError, "outputs for example_inputs are not finite"),
    "inf in data": (dict(data=[(torch.full((2, 20), math.inf), None)]), ValueError, "outputs on data are not finite"),
    "no sample": (dict(data=[(torch.empty(0, 20), None)] * 2), ValueError, "none of the 2 batches of data holds"),
    "budget in words": (dict(budget="1ms"), TypeError, r"budget is '1ms', expected seconds as a number \(0.001 is a"),
    "another metric": (dict(metric="accuracy"), ValueError, "metric is 'accuracy', expected a function .*'agreement'"),
    "metric is no function": (dict(metric=3), TypeError, "metric is a int, expected a function"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_to_do(name):
    changes, kind, message = BAD[name]
    arguments = {"model": mlp(), "example_inputs": EXAMPLE, "data": DATA, **QUIET, **changes}
    with pytest.raises(kind, match=message):
        torch_sluice.compress(**arguments)


def test_a_candidate_whose_metric_is_nan_is_refused():
    model = mlp().eval()

    def metric(candidate, batches):
        return 1.0 if candidate[0].out_features == 64 and candidate[2].out_features == 65 else math.nan

    same = torch_sluice.compress(model, EXAMPLE, DATA, metric=metric, quantize=False, **QUIET)
    assert same[0].out_features == 64
    assert same.compression_report.kept == 1.0


def test_threads_are_put_back():
    before = torch.get_num_threads()
    seen = []

    def metric(candidate, batches):
        seen.append(torch.get_num_threads())
        return 1.0

    torch_sluice.compress(mlp(), EXAMPLE, DATA, metric=metric, quantize=False, threads=1, **QUIET)
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("same_speed")
@pytest.mark.parametrize("rows", [0, 1])
def test_empty_and_one_element_tensors(rows):
    """A compressed model takes what the original took; an empty batch shows nothing, and is left out."""
    model = mlp().eval()
    small = torch_sluice.compress(model, EXAMPLE, [(torch.randn(8, 20), None)], keep=0.5, **QUIET)
    with torch.no_grad():
        assert small(torch.randn(rows, 20)).shape == (rows, 6)
    one = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).eval()
    same = torch_sluice.compress(one, torch.ones(1, 1), [(torch.ones(1, 1), None)], quantize=False, **QUIET)
    assert any("copy of the original" in note for note in same.compression_report.notes)
    data = [(torch.randn(rows, 20), None), (torch.randn(8, 20), None)]
    report = torch_sluice.compress(model, EXAMPLE, data, keep=0.9, **QUIET).compression_report
    assert report.kept >= 0.9
    assert report.samples == 8 + rows
    assert ("1 of 2 batches hold no sample: left out" in report.notes) == (rows == 0)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(nn.Linear(20, 5)), nn.Bilinear(20, 20, 5)], ids=str)
@pytest.mark.parametrize("quantize", [True, False])
def test_where_there_is_nothing_to_gain_the_result_is_a_copy(model, quantize, monkeypatch):
    """On whatever machine: no layer counts as faster."""
    monkeypatch.setattr(quantization, "_time_in_place", lambda *_: 0.0)
    inputs = (EXAMPLE, EXAMPLE) if isinstance(model, nn.Bilinear) else EXAMPLE
    same = torch_sluice.compress(model, inputs, [(inputs, None)], quantize=quantize, **QUIET)
    assert same is not model
    assert type(same) is type(model)
    assert (same.compression_report.kept, same.compression_report.kept_low) == (1.0, 1.0)
    assert any(note.endswith("this is a copy of the original model") for note in same.compression_report.notes)


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    model, data = wide(), batches(1)
    small = torch_sluice.compress(
        model, data[0][0][:1], data, keep=numpy.float32(0.9), budget=numpy.float64(1e3), round_to=numpy.int64(16),
        threads=numpy.int32(1), quantize=False, weight_bits=numpy.int64(4), group_size=numpy.int64(32),
        target_sqnr=numpy.float32(24), **QUIET,
    )  # fmt: skip
    assert small.compression_report.keep == pytest.approx(0.9)
