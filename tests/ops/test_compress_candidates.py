"""Candidates are made in place where they can be, and leave nothing behind."""

import copy

import pytest
import torch
from torch import nn

from torch_sluice.compress import QuantizedWeight, quantization
from torch_sluice.compress.candidates import Layers, Stage, Workshop
from torch_sluice.compress.compensation import reading_layers
from torch_sluice.compress.folding import find_pairs
from torch_sluice.compress.graph import find_groups
from torch_sluice.compress.moments import join, measure_moments, unpack
from torch_sluice.compress.progress import Progress
from torch_sluice.compress.pruning import Pruner

OPTIONS = {"policy": "sqnr", "target_sqnr": 30.0, "weight_bits": 8, "group_size": 0}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Linear(64, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(32, 4)

    def forward(self, x):
        x = self.second(self.norm(self.first(x)).relu())
        return self.head(self.encoder(x[:, None])[:, 0])


@pytest.fixture
def workshop():
    torch.manual_seed(0)
    model = Model().eval()
    model.norm.running_mean.normal_(), model.norm.running_var.uniform_(0.5, 2)
    data = torch.randn(400, 16).split(50)
    groups, _ = find_groups(model, data[0])
    pruner = Pruner.with_scores(model, groups, "sensitivity")
    paths = reading_layers(model, groups)
    folds = [measure_moments(model, data[half::2], paths) for half in (0, 1)]
    pruner.moments, pruner.folds = join(folds), dict(enumerate(folds))
    return Workshop(model, pruner), data


def snapshot(model):
    modules = {name: (module, module.training) for name, module in model.named_modules()}
    flags = {
        name: {key: value for key, value in vars(module).items() if not key.startswith("_")}
        for name, (module, _) in modules.items()
    }
    return modules, flags, dict(model.named_parameters()), copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("left_out", [None, 1])
def test_all_is_as_before_whatever_happens(workshop, pruned, left_out):
    shop, data = workshop
    model, g = shop.original, [group.name for group in shop.pruner.groups].index("first")
    stage = Stage({g: 32} if pruned else {})
    assert shop.is_fitted(stage) == pruned
    built = shop.build(stage)
    pairs = find_pairs(built, data[0])
    candidates, _ = quantization.find_candidates(built, data[0], OPTIONS, Progress(False))
    everything = [*candidates]
    for name in ("second", "encoder.layers.0.linear1"):
        if name not in {c.name for c in everything}:
            weight = QuantizedWeight.from_float(built.get_submodule(name).weight, **OPTIONS)
            everything.append(quantization.Candidate(name, weight, [f"{name}.weight"]))
    layers = Layers(pairs, everything, OPTIONS, 24.0)
    before, expected = snapshot(model), model(data[0])
    with pytest.raises(KeyError), shop.made(stage, left_out, layers) as candidate:
        assert isinstance(candidate.norm, nn.Identity)
        assert candidate.second.weight.options.target_sqnr == 24
        assert candidate.first.out_features == (32 if pruned else 64)
        with torch.no_grad():
            out = candidate(data[0])
        assert 0 < (out - expected).norm() < 0.5 * expected.norm()
        raise KeyError
    after = snapshot(model)
    assert before[:2] == after[:2]
    assert all(before[2][name] is p for name, p in after[2].items())
    assert all(torch.equal(value, after[3][name]) for name, value in before[3].items())
    assert torch.equal(model(data[0]), expected)


def test_each_fold_has_weights_of_its_own_and_the_result_those_of_all(workshop):
    shop, _ = workshop
    stage = Stage({[group.name for group in shop.pruner.groups].index("first"): 32})
    weights = {}
    for left_out in (None, 0, 1):
        with shop.made(stage, left_out) as candidate:
            weights[left_out] = candidate.second.weight.detach().clone()
    assert torch.equal(weights[None], shop.build(stage).second.weight)
    for one, other in ((None, 0), (None, 1), (0, 1)):
        assert 1e-3 < (weights[one] - weights[other]).norm() / weights[None].norm() < 0.3
    # What leaves out fold 0 is fitted to fold 1 alone.
    alone = Pruner(shop.original, shop.pruner.groups, shop.pruner.scores, shop.pruner.folds[1])
    alone.moments.rows = {path: rows / 2 for path, rows in shop.pruner.moments.rows.items()}
    torch.testing.assert_close(weights[0], alone.build(stage.kept).second.weight, rtol=1e-3, atol=1e-4)


def test_weights_that_others_use_are_not_compensated():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.hidden, self.head = nn.Embedding(30, 32), nn.Linear(32, 32), nn.Linear(32, 30, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x) + self.hidden(self.embed(x)).relu())

    model, x = Tied().eval(), torch.randint(0, 30, (4, 6))
    groups, _ = find_groups(model, x)
    assert groups
    assert "head" not in reading_layers(model, groups)


class Three(nn.Module):
    """Two layers that read the same, one that reads it changed in place, and one that is used twice."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        x = x.relu()
        y = self.layers[0](x) + self.layers[1](x)
        y = y + self.layers[3](x) + self.layers[3](y)
        return self.layers[2](x.mul_(2)) + y


def test_layers_that_read_the_same_share_their_moments():
    torch.manual_seed(0)
    model, x = Three().eval(), torch.randn(50, 8)
    paths = [f"layers.{i}" for i in range(4)]
    moments = measure_moments(model, x.split(10), paths)
    product = x.relu().T @ x.relu()
    torch.testing.assert_close(unpack(moments.product["layers.0"], 8).float(), product)
    assert moments.product["layers.1"] is moments.product["layers.0"]
    torch.testing.assert_close(unpack(moments.product["layers.2"], 8).float(), 4 * product)
    assert "layers.3" not in moments.count or moments.count["layers.3"] == 100
    joint = join([measure_moments(model, part.split(10), paths) for part in x.split(30)])
    assert joint.total["layers.1"] is joint.total["layers.0"]
    assert not len(joint.product)  # summed when asked for
    assert joint.rows["layers.1"] == joint.rows["layers.0"]
    torch.testing.assert_close(unpack(joint.product["layers.0"], 8).float(), product)
