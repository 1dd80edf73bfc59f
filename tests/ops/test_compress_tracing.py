"""Channels that models move: they are followed to where they are read, and what is cut is proved on values."""

import copy
import random

import pytest
import torch
from support.compress_moves import MOVES, Normed, sequence
from torch import nn

from torch_sluice.compress import graph, verify
from torch_sluice.compress.calling import call_model, float_outputs
from torch_sluice.compress.graph import find_groups
from torch_sluice.compress.norm_scale import measure_norms, norms_of, scale_norms
from torch_sluice.compress.slicing import cut, gather, prune
from torch_sluice.compress.tracer import trace


def make(name):
    torch.manual_seed(0)
    build, inputs, found = MOVES[name]
    return build().eval(), inputs(), found


def run(model, inputs):
    with torch.no_grad():
        return float_outputs(call_model(model, inputs))[0]


@pytest.mark.parametrize("name", MOVES)
def test_units_are_found_or_refused_with_a_note(name):
    model, inputs, expected = make(name)
    groups, notes = find_groups(model, inputs)
    found = {group.name: (group.width, group.channels) for group in groups}
    if expected is None:
        assert "first" not in found
        assert any(note.startswith("first: stays, because ") for note in notes), notes
    else:
        # A layer whose channels leave with those of one before it has no group of its own.
        assert {name: found.get(name) for name in expected} == expected, (found, notes)


@pytest.mark.parametrize("name", [name for name in MOVES if MOVES[name][2]])
def test_units_that_nobody_reads_leave_without_a_trace(name):
    """Not by the tracer: the columns that read them are zeroed, and whatever else they reach would show."""
    model, inputs, _ = make(name)
    for number, group in enumerate(find_groups(model, inputs)[0]):
        if name.startswith(("root mean square", "fused")) and group.name == "embed":
            continue  # a norm counts them, also where nobody reads them
        if (name, group.name) in (("functional", "embed"), ("squeezed", "second")):
            continue  # what reads them makes them, too; a softmax counts them
        units = random.Random(number).sample(range(group.width), group.width // 2)
        silent = copy.deepcopy(model)
        tensors = dict(silent.named_parameters())
        with torch.no_grad():
            for member in group.members:
                if member.role == "in":
                    places = torch.tensor([place for unit in units for place in member.indices[unit]])
                    tensors[member.name].index_fill_(member.dim, places, 0)
        small = prune(silent, [(group, units)])
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in silent.parameters())
        torch.testing.assert_close(run(small, inputs), run(silent, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MOVES)
def test_finding_groups_leaves_the_model_as_it_was(name):
    model, inputs, _ = make(name)
    before, sizes = copy.deepcopy(model.state_dict()), [dict(m.__dict__) for m in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    find_groups(model, inputs)
    assert parameters == [id(p) for p in model.parameters()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for module, own in zip(model.modules(), sizes, strict=True):
        assert {k: v for k, v in module.__dict__.items() if isinstance(v, (int, tuple))} == {
            k: v for k, v in own.items() if isinstance(v, (int, tuple))
        }
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_group_that_is_wrong_is_refused_by_its_values(monkeypatch):
    """Had the graph taken a fused projection for [q; k; v], sizes alone would not tell."""
    model, inputs, _ = make("fused, heads first")
    candidates = graph._candidates

    def mistaken(couplings):
        found, notes = candidates(couplings)
        (ways,) = [ways for ways in found if ways[0].name.startswith("qkv")]
        for number, member in enumerate(ways[0].members):
            if member.name.startswith("qkv"):
                blocks = tuple(tuple(part * 32 + u * 8 + i for part in range(3) for i in range(8)) for u in range(4))
                ways[0].members[number] = graph.Member(member.name, member.dim, member.role, blocks)
        return [[ways[0]]], notes

    monkeypatch.setattr(graph, "_candidates", mistaken)
    groups, notes = find_groups(model, inputs)
    assert not groups
    assert any("qkv heads: stays, because without some of it the outputs differ by" in note for note in notes)


def test_what_reaches_an_operator_that_nothing_is_known_of_stays():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(20, 32), nn.Linear(32, 5)

        def forward(self, x):
            return self.second(torch.fft.fft(self.first(x)).real)

    torch.manual_seed(0)
    groups, notes = find_groups(Spectral().eval(), torch.randn(4, 20))
    assert not groups
    assert any("aten::_fft_r2c" in note and "not followed" in note for note in notes), notes


def test_a_model_that_does_not_run_under_the_tracer_keeps_its_channels():
    class Touchy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(20, 32), nn.Linear(32, 5)

        def forward(self, x):
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise KeyError("no modes here")
            return self.second(self.first(x))

    groups, notes = find_groups(Touchy().eval(), torch.randn(4, 20))
    assert groups == []
    assert notes == ["channels stay, because they could not be followed: KeyError: 'no modes here'"]


@pytest.mark.parametrize("plus_one", [False, True])
def test_channels_that_are_zero_leave_a_root_mean_square_norm_as_it_was(plus_one):
    torch.manual_seed(0)
    model, x = Normed(plus_one).eval(), sequence()
    with torch.no_grad():
        for tensor in (model.embed.weight, model.embed.bias, model.down.weight, model.down.bias):
            tensor[:12] = 0
    (width,) = [group for group in find_groups(model, x)[0] if group.name == "embed"]
    scales = measure_norms(model, [x], norms_of(model, [width]))
    assert {path: scale.shift for path, scale in scales.items()} == dict.fromkeys(("norm", "last"), float(plus_one))
    expected, lost = run(model, x), {}
    gather(width.members, range(12), lost)
    changes = scale_norms(model, lost, scales)
    undo = cut(model, lost)
    assert (run(model, x) - expected).abs().max() > 0.1 * expected.abs().max()
    for path, change in changes:
        model.get_submodule(path).weight.data += change.float()
    torch.testing.assert_close(run(model, x), expected, rtol=1e-5, atol=1e-5)
    undo()
    torch.testing.assert_close(run(model, x), expected)


def test_no_module_but_a_norm_is_scaled():
    torch.manual_seed(0)

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(32))

        def forward(self, x):
            return x * self.weight

    model = nn.Sequential(nn.Linear(10, 32), Scale(), nn.LayerNorm(32), nn.Linear(32, 5)).eval()
    x = torch.randn(8, 10)
    groups, _ = find_groups(model, x)
    scales = measure_norms(model, [x], norms_of(model, groups))
    assert list(scales) == ["2"]
    rows = model[:2](x).double()
    rows = rows - rows.mean(1, keepdim=True)
    share = (rows.square() / rows.square().mean(1, keepdim=True)).mean(0)
    torch.testing.assert_close(scales["2"].share, share)


def test_a_cut_that_fails_halfway_is_undone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.MultiheadAttention(8, 2, add_bias_kv=True)).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="bias_k"):
        cut(model, {("0.weight", 0): {1}, ("1.in_proj_weight", 1): {1}})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model[0].out_features == 8


def test_a_proof_runs_on_all_of_the_inputs_that_it_is_given(monkeypatch):
    """A path that only other data takes is proved, too."""
    model, inputs, _ = make("flip")
    seen = []
    monkeypatch.setattr(verify, "difference_of_cut", lambda m, lost, sizes, x: seen.append(x) or None)
    find_groups(model, inputs, batches=[inputs + 1, inputs + 2, "none of the model's"])
    assert any(x is inputs for x in seen)
    assert sum(bool((x == inputs + n).all()) for x in seen for n in (1, 2)) >= 2


def test_layers_without_whose_units_nothing_runs_are_found_without_following_channels(monkeypatch):
    """Half of the layers cannot be cut; the others are proved together, and not by halves of all."""

    class Written(nn.Module):
        def __init__(self, fixed):
            super().__init__()
            self.fixed, self.up, self.down = fixed, nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x):
            y = self.up(x)
            return x + self.down((y.view(-1, 4, 6).flatten(1) if self.fixed else y).relu())

    torch.manual_seed(0)
    model = nn.Sequential(*(Written(number % 2 == 1) for number in range(16))).eval()
    followed = []
    monkeypatch.setattr(verify, "trace", lambda *args: followed.append(args) or trace(*args))
    groups, notes = find_groups(model, torch.randn(4, 8))
    assert sorted(group.name for group in groups) == sorted(f"{number}.up" for number in range(0, 16, 2))
    for number in range(1, 16, 2):
        assert any(note.startswith(f"{number}.up: stays, because the model does not run without") for note in notes)
    assert len(followed) < 10


def test_following_costs_one_run_and_keeps_outputs():
    for name in ("shuffle", "lstm", "fused, three last"):
        model, inputs, _ = make(name)
        couplings, outputs, unknown = trace(model, inputs)
        torch.testing.assert_close(outputs[0], run(model, inputs), rtol=1e-5, atol=1e-5)
        assert not unknown
        assert len(couplings.sources) > 0


def test_units_leave_by_multiples_where_an_operator_wants_sizes_that_are():
    class Aligned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(20, 64), nn.Linear(64, 5)

        def forward(self, x):
            x = self.first(x)
            if x.shape[-1] % 8:
                raise RuntimeError("strides should be a multiple of 32 bytes")
            return self.second(x.relu())

    torch.manual_seed(0)
    groups, notes = find_groups(Aligned().eval(), torch.randn(4, 20))
    assert [(group.name, group.width, group.step) for group in groups] == [("first", 64, 8)], notes
    assert groups[0].kept_choices((0.9, 0.6, 0.1), 1) == [56, 32, 8]
    assert all(kept % 8 == 0 for kept in groups[0].kept_choices((0.9, 0.7, 0.5, 0.3), 16))
