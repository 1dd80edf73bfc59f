"""Compressing takes no second copy of a model's weights."""

import pytest
import torch
from support.compress_models import mlp

import torch_sluice
from torch_sluice.compress import graph, run

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
