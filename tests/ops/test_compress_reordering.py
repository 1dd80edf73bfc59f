"""Channels that code moves by their places: what is cut is right for any units, in memory, in files and exported."""

import copy
import random

import pytest
import torch
from support.compress_models import call_all_faster
from support.compress_reordering import CASES, REFUSED, Random, dense, image, rows, shuffled
from torch import nn

import torch_sluice
from torch_sluice.compress import quantization
from torch_sluice.compress.graph import find_groups
from torch_sluice.compress.moments import measure_moments
from torch_sluice.compress.pruning import Pruner
from torch_sluice.compress.slicing import gather, prune
from torch_sluice.compress.tracer import trace

# A norm counts what nobody reads, too; and what is summed over has no readers of its own.
MIXED = {"roll under a layer norm", "roll under a group norm", "buffer of two dimensions"}


def make(name, cases=CASES):
    torch.manual_seed(0)
    maker, move, expected = cases[name]
    build, x = maker(move)
    model = build().eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2), nn.init.uniform_(norm.weight)
    return model, x, expected


def run(model, x):
    with torch.no_grad():
        return model(x)


def silenced(model, removals):
    """A copy in which nobody reads these units: not by the tracer."""
    silent = copy.deepcopy(model)
    tensors = dict(silent.named_parameters())
    with torch.no_grad():
        for group, units in removals:
            for member in group.members:
                if member.role == "in":
                    places = torch.tensor([place for unit in units for place in member.indices[unit]])
                    tensors[member.name].index_fill_(member.dim, places, 0)
    return silent


def some_units(group, draw, fewest=1):
    """Any units of a group, of which a few stay."""
    return draw.sample(range(group.width), draw.randint(1, max(1, group.width - fewest)))


@pytest.mark.parametrize("name", CASES)
def test_any_units_leave_without_a_trace(name):
    model, x, expected = make(name)
    groups, notes = find_groups(model, x)
    assert {group.name: (group.width, group.channels) for group in groups} == expected, notes
    for seed in range(4):
        draw = random.Random(seed)
        removals = [(group, some_units(group, draw)) for group in (groups if seed else groups[:1])]
        small = run(prune(model, removals), x)
        if name in MIXED:
            lost = {}
            for group, units in removals:
                gather(group.members, units, lost)
            silent = trace(model, x, lost)[1][0]
        else:
            silent = run(silenced(model, removals), x)
        torch.testing.assert_close(small, silent, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_order_makes_up_for_stays_and_the_note_names_the_operator(name):
    model, x, operator = make(name, REFUSED)
    groups, notes = find_groups(model, x)
    assert groups == []
    (note,) = [note for note in notes if note.startswith("first: stays, because ")]
    assert operator in note
    assert "register_buffer" in note


@pytest.mark.parametrize("seed", range(8))
def test_random_models_lose_any_units_that_are_offered(seed):
    torch.manual_seed(seed)
    images = seed % 2 == 0
    model, x = Random(seed, images).eval(), image() if images else rows()
    groups, notes = find_groups(model, x)
    assert groups, notes
    assert all("register_buffer" in note or "is the model's output" in note for note in notes[1:])
    draw = random.Random(seed)
    for _ in range(3):
        removals = [(group, some_units(group, draw, 2)) for group in groups]
        torch.testing.assert_close(
            run(prune(model, removals), x), run(silenced(model, removals), x), rtol=1e-4, atol=1e-5
        )


def test_more_than_nine_of_ten_layers_of_random_models_are_offered():
    offered = stay = 0
    for seed in range(8, 14):
        torch.manual_seed(seed)
        groups, notes = find_groups(Random(seed, False).eval(), rows())
        offered += len(groups)
        stay += sum(": stays" in note and "the model's output" not in note for note in notes)
    assert stay < 0.1 * (offered + stay)


def test_what_is_pruned_further_after_training_lies_as_if_it_was_cut_at_once():
    model, x, _ = make("buffer between rolls")
    groups, _ = find_groups(model, x)
    pruner = Pruner.with_scores(model, groups, "sensitivity")
    first = pruner.build({0: 24})
    further = pruner.build_further(first, {0: 24}, {0: 9})
    assert further.last.in_features == 9
    assert further.order.max() < 9
    torch.testing.assert_close(run(further, x), run(pruner.build({0: 9}), x))
    kept = {side: set(range(32)) - indices for side, indices in pruner.lost({0: 9}).items()}
    units = [u for u in range(32) if u not in kept["first.weight", 0]]
    torch.testing.assert_close(run(further, x), run(silenced(model, [(groups[0], units)]), x), rtol=1e-4, atol=1e-5)
    assert pruner.why_wrong({0: 9}, x) is None


def test_what_makes_up_for_channels_is_put_in_order_with_the_weights():
    """Channels that repeat others leave without a trace once they are compensated."""
    model, _, _ = make("roll")
    with torch.no_grad():
        model.first.weight[16:], model.first.bias[16:] = model.first.weight[:16], model.first.bias[:16]
        model.first.weight[16:] *= 0.5
        model.first.bias[16:] *= 0.5
    data = [rows(64) + torch.randn(64, 20) for _ in range(4)]
    groups, _ = find_groups(model, data[0])
    pruner = Pruner.with_scores(model, groups, "quantile")
    pruner.moments = measure_moments(model, data, ["last"])
    small = pruner.build({0: 16})
    assert pruner.lost({0: 16})["first.weight", 0] == set(range(16, 32))
    torch.testing.assert_close(run(small, data[0]), run(model, data[0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["roll between norms", "buffer and its inverse", "buffer that is not saved"])
def test_compressed_saved_loaded_and_exported(name, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.setattr(quantization, "_time_in_place", call_all_faster)
    model, x, _ = make(name)
    with torch.no_grad():  # half of the channels are next to nothing
        model.first.weight[::2] *= 1e-3
        model.first.bias[::2] *= 1e-3
    generator = torch.Generator().manual_seed(2)
    data = [(torch.randn(64, *x.shape[1:], generator=generator), None) for _ in range(6)]
    small = torch_sluice.compress(model, x, data, keep=0.7, round_to=1, quantize=False, progress=False)
    assert "first" in {layer.name for layer in small.compression_report.layers if layer.action == "pruned"}
    assert small.first.weight.shape[0] < model.first.weight.shape[0]
    torch_sluice.compress.save(small, tmp_path / "small")
    again = torch_sluice.compress.load(tmp_path / "small", model)
    torch.testing.assert_close(run(again, x), run(small, x))
    for (key, buffer), (_, other) in zip(small.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(buffer, other), key
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(run(exported, x), run(small, x))


def test_finding_groups_leaves_buffers_and_weights_as_they_were():
    model, x, _ = make("buffer between rolls")
    before = {
        name: (id(tensor), tensor.clone()) for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    groups, _ = find_groups(model, x)
    pruner = Pruner.with_scores(model, groups, "sensitivity")
    with pruner.pruned({0: 5}):
        assert model.order.shape == (5,)
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(id(after[name]) == known and torch.equal(after[name], value) for name, (known, value) in before.items())


def test_a_buffer_of_integers_that_picks_nothing_is_left_alone():
    build, x = dense(order=shuffled(32))(lambda m, h: h * m.order.float().mean())
    torch.manual_seed(0)
    model = build().eval()
    (group,), _ = find_groups(model, x)
    assert {member.name for member in group.members} == {"first.weight", "first.bias", "last.weight"}
