"""What compress does not do twice, or to the end, since it is known before: scores in a hurry, costs of cuts."""

import contextlib
import copy
import itertools

import pytest
import torch
from torch import nn

import torch_sluice
from torch_sluice.compress import residuals
from torch_sluice.compress.compensation import reading_layers
from torch_sluice.compress.graph import find_groups
from torch_sluice.compress.measure import Measure
from torch_sluice.compress.moments import join, measure_moments
from torch_sluice.compress.progress import Progress
from torch_sluice.compress.pruning import Pruner
from torch_sluice.compress.sensitivity import Curves


def classifier(samples=400, size=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    with torch.no_grad():
        return model, [(x, model(x).argmax(1)) for x in torch.randn(samples, 16).split(size)]


def accuracy(model, batches):
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / sum(len(y) for _, y in batches)


def off(model, by):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[2].weight += by * torch.randn(other[2].weight.shape, generator=torch.Generator().manual_seed(1))
    return other


@pytest.mark.parametrize("metric", [accuracy, None, "agreement"])
def test_in_a_hurry_part_of_the_data_is_enough_where_it_is_clear(metric):
    model, batches = classifier()
    metric = torch_sluice.compress.Agreement() if metric == "agreement" else metric
    measure, runs = Measure(model, batches, metric), []
    near, floor = off(model, 1e-3), 0.9
    near.register_forward_hook(lambda *_: runs.append(1))
    whole = measure.score(near, floor)
    assert len(runs) == len(batches) == 100
    runs.clear()
    quick = measure.score(near, floor, hurry=True)
    assert len(runs) < 50
    assert quick.samples == 4 * len(runs) < whole.samples == measure.samples == 400
    assert quick.low >= floor
    assert quick.low == pytest.approx(whole.low, abs=0.02)  # what all data would show
    folds = measure.score_folds(lambda fold: contextlib.nullcontext(near), floor, hurry=True)
    assert folds.samples < 200
    assert folds.low >= floor


@pytest.mark.parametrize("metric", [accuracy, None])
def test_what_is_found_in_a_hurry_is_what_all_data_shows(metric):
    model, batches = classifier()
    measure, same, samples = Measure(model, batches, metric), [], 0
    for other in (off(model, by) for by in (0.01, 0.03, 0.05, 0.1)):
        score = measure.score(other)
        for floor in [score.low + by * (score.kept - score.low) for by in (-4, -2, -1, 0.5, 1, 2, 4)]:
            quick = measure.score(other, floor, hurry=True)
            same.append((quick.low >= floor) == (score.low >= floor))
            samples += quick.samples
    assert sum(same) >= 0.85 * len(same)
    assert samples < 0.6 * 400 * len(same)


def test_a_glance_looks_at_one_fold():
    model, batches = classifier()
    measure, runs, other = Measure(model, batches, accuracy), [], off(model, 0.05)
    other.register_forward_hook(lambda *_: runs.append(1))
    glance = measure.glance(other)
    assert len(runs) == 25
    assert glance.samples == 100
    assert glance.kept == pytest.approx(measure.score(other).kept, abs=0.1)
    broken = copy.deepcopy(model)
    broken[2] = nn.Linear(31, 4)
    assert measure.glance(broken).reason is not None


def test_a_stage_that_was_found_in_a_hurry_is_confirmed_on_all_data():
    """Pruned alone, what is reported is of all samples."""
    model, batches = classifier(1200)
    report = torch_sluice.compress(
        model, batches[0][0], batches, keep=0.8, metric=accuracy, quantize=False, progress=False
    ).compression_report
    assert any(layer.action == "pruned" for layer in report.layers)
    assert report.samples == 1200
    assert report.kept_low >= 0.8
    assert report.metric_after == pytest.approx(report.kept * report.metric_before)


@pytest.mark.parametrize("bias", [True, False])
def test_residuals_are_what_the_reader_loses(bias):
    """Against least squares on the rows themselves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 5, bias=bias)).eval()
    x = torch.randn(4000, 12) + 0.3
    groups, _ = find_groups(model, x[:4])
    pruner = Pruner.with_scores(model, groups, "sensitivity")
    moments = join([measure_moments(model, [part], reading_layers(model, groups)) for part in x.split(2000)])
    counts = [36, 32, 24, 8]
    lost = [pruner._lost_alone(0, count) for count in counts]
    found = residuals.find_residuals(model, groups[0], lost, moments)
    with torch.no_grad():
        hidden = torch.tanh(model[0](x)).double()
    weight = model[2].weight.detach().double()
    if bias:
        hidden = hidden - hidden.mean(0)
    for cut, share in zip(lost, found, strict=True):
        gone = sorted(cut["2.weight", 1])
        kept = [i for i in range(40) if i not in gone]
        solution = torch.linalg.lstsq(hidden[:, kept], hidden[:, gone]).solution
        error = (hidden[:, gone] - hidden[:, kept] @ solution) @ weight[:, gone].T
        expected = error.square().sum() / (hidden @ weight.T).square().sum()
        assert share == pytest.approx(float(expected), rel=0.15)
    assert all(a < b for a, b in itertools.pairwise(found))


def test_cost_of_further_cuts_is_told_by_what_readers_lose():
    """Half of the runs are not needed, and what is predicted is near to what they would show."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 5)).eval()
    data = [(x, None) for x in torch.randn(1600, 12).split(40)]
    groups, _ = find_groups(model, data[0][0])
    curves = {}
    for known in (True, False):
        measure = Measure(model, data, None)
        pruner = Pruner.with_scores(model, groups, "sensitivity")
        paths = reading_layers(model, groups)
        folds = {
            fold: measure_moments(model, [p.inputs for p in measure.pieces if p.fold == fold], paths)
            for fold in measure.folds
        }
        pruner.moments, pruner.folds = join(list(folds.values())), folds
        if not known:
            pruner.residuals = lambda *_: None
        curves[known] = Curves(pruner, measure, 1.0, 4, Progress(False))
        curves[known].measure_all()
    told, measured = curves[True], curves[False]
    assert told.evaluations <= 0.7 * measured.evaluations
    for one, other in zip(told.curves, measured.curves, strict=True):
        assert one.kept == other.kept
        for predicted, loss in zip(one.losses, other.losses, strict=True):
            assert predicted == pytest.approx(loss, rel=0.7)


def test_where_moments_do_not_tell_all_is_measured():
    model, batches = classifier()
    groups, _ = find_groups(model, batches[0][0])
    pruner = Pruner.with_scores(model, groups, "sensitivity")
    assert pruner.residuals(0, [16, 8], None) is None
    curves = Curves(pruner, Measure(model, batches, None), 1.0, 4, Progress(False))
    curves.measure_all()
    assert curves.evaluations == len(curves.curves[0].kept) > 3
