"""Compressing takes no second copy of a model's weights, and runs the model no oftener than it must."""

import pytest
import torch
from support.compress_models import mlp

import torch_sluice
from torch_sluice.compress import Agreement, graph, run
from torch_sluice.compress.first_pass import run_first
from torch_sluice.compress.measure import Measure
from torch_sluice.compress.moments import measure_moments, unpack
from torch_sluice.compress.remember import Calls, remembering
from torch_sluice.compress.samples import cut_pieces

QUIET = {"progress": False}
EXAMPLE = torch.randn(1, 20)


def batches(count=4, rows=32):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(rows, 20, generator=generator), None) for _ in range(count)]


@pytest.mark.parametrize("metric", [None, lambda model, some: sum(float(model(x).sigmoid().mean()) for x, _ in some)])
def test_the_work_is_done_in_the_memory_of_the_model_and_leaves_it_as_it_was(metric, monkeypatch):
    """A copy of the weights would be as large as the model; the result has its own all the same."""
    worked_on = []

    def find_groups(model, *args, **kwargs):
        worked_on.append({parameter.data_ptr() for parameter in model.parameters()})
        return graph.find_groups(model, *args, **kwargs)

    monkeypatch.setattr(run, "find_groups", find_groups)
    model = mlp()
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    small = torch_sluice.compress(model, EXAMPLE, batches(), metric=metric, **QUIET)
    assert worked_on == [{parameter.data_ptr() for parameter in model.parameters()}]
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][0], name
        assert torch.equal(value, before[name][1]), name
    own = {address for address, _ in before.values()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in small.parameters())
    unchanged = torch_sluice.compress(model, EXAMPLE, batches(), keep=1.0, metric=metric, quantize=False, **QUIET)
    assert own.isdisjoint(parameter.data_ptr() for parameter in unchanged.parameters())


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_what_a_model_gave_for_a_batch_answers_for_its_rows(kind):
    class Two(torch.nn.Module):
        def forward(self, x, y):
            return {"sum": x + y, "product": (x * y,)}

    def call(inputs):
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)

    tensors = torch.randn(24, 3), torch.randn(24, 3)
    inputs = dict(zip("xy", tensors, strict=True)) if kind is dict else kind(tensors)
    pieces = cut_pieces([(inputs, torch.arange(24))], [0], True, 4)
    model, rest = Two(), {"x": torch.ones(6, 3), "y": torch.ones(6, 3)}
    assert len(pieces) == 4
    with remembering(model, Calls(pieces)) as calls:
        expected = call(inputs)
        begin = 0
        for piece in pieces:
            found, end = call(piece.inputs), begin + piece.samples
            assert torch.equal(found["sum"], expected["sum"][begin:end])
            assert torch.equal(found["product"][0], expected["product"][0][begin:end])
            found["sum"].zero_()  # a metric may write into what it is given
            begin = end
        assert (calls.run, calls.repeated) == (1, 4)
        assert call(pieces[0].inputs)["sum"].any()
        call(rest)
        assert calls.run == 2
    expected = call(inputs)
    with remembering(model, Calls(pieces)) as calls:
        for piece in pieces[:3]:
            call(piece.inputs)
        call(inputs)  # one of its parts is not known
        assert (calls.run, calls.repeated) == (4, 0)
    with remembering(model, Calls(pieces)) as calls:
        for piece in pieces:
            call(piece.inputs)
        found = call(inputs)
        assert (calls.run, calls.repeated) == (4, 1)
        assert torch.equal(found["sum"], expected["sum"])
        assert torch.equal(found["product"][0], expected["product"][0])
    with remembering(model, Calls(pieces, most_bytes=8)) as calls:
        call(inputs), call(inputs)
        assert calls.run == 2


@pytest.mark.parametrize(
    "metric", [None, Agreement(), lambda model, some: sum(float(model(x).exp().mean()) for x, _ in some)]
)
def test_the_original_runs_once_over_data(metric):
    """For its metric, for moments, and for what candidates' outputs are compared with."""
    model, runs = mlp().eval(), []
    data = [(x, None) for x in torch.randn(96, 20).split(4)]
    model[0].register_forward_hook(lambda module, inputs, output: runs.append(inputs[0].data_ptr()))

    def first(measure, calls):
        runs.clear()  # it was looked whether rows are independent
        found.append(run_first(model, measure.pieces, ["2", "4"], [], calls))

    found = []
    Measure(model, data, metric, first)
    again = 16 if callable(metric) and not isinstance(metric, Agreement) else 0  # with noise on the weights
    assert len(runs) <= len(data) + again
    assert set(runs) == {x.data_ptr() for x, _ in data}
    assert list(found[0].folds) == [0, 1, 2, 3]
    assert sum(moments.count["4"] for moments in found[0].folds.values()) == 96


def test_moments_of_folds_that_are_merged_add_up():
    model, data = mlp().eval(), torch.randn(96, 20)
    pieces = cut_pieces([(data, None)], [0], True, 8)
    first = run_first(model, pieces, ["2"], [], Calls(pieces))
    whole = measure_moments(model, [data], ["2"])
    for count in (1, 2, 4):
        folds = first.by_folds(count)
        assert list(folds) == list(range(count))
        assert sum(fold.count["2"] for fold in folds.values()) == 96
        torch.testing.assert_close(sum(fold.product["2"] for fold in folds.values()), whole.product["2"])


def test_of_many_rows_as_many_as_are_asked_for_tell_the_moments():
    torch.manual_seed(0)
    model, data = torch.nn.Sequential(torch.nn.Conv1d(4, 2, 1)).eval(), [torch.randn(8, 4, 512) for _ in range(4)]
    everything, some = (measure_moments(model, data, ["0"], for_channel=limit) for limit in (1e9, 512.0))
    assert everything.count["0"] == 4 * 8 * 512
    assert 2048 <= some.count["0"] <= 4096
    whole, part = (unpack(m.product["0"], 4) / m.count["0"] for m in (everything, some))
    torch.testing.assert_close(part, whole, atol=0.1, rtol=0.1)


def test_a_layer_that_gets_no_rows_has_no_moments():
    """An expert that no token of a part of the data goes to."""
    model, data = torch.nn.Linear(4, 2), [torch.zeros(0, 4), torch.zeros(2, 0, 4)]
    assert not measure_moments(model, data, [""]).count
    both = measure_moments(model, [*data, torch.randn(5, 4)], [""])
    assert both.count[""] == 5
    assert both.product[""].shape == (10,)
