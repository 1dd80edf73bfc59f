"""Groups of channels, what cutting them does to a model, and the rules that choose."""

import copy
import random

import pytest
import torch
from support.compress_models import MODELS, Convolutions, Encoder, bert, llama, make, mlp, tokens
from torch import nn

pytest.importorskip("transformers")

from torch_sluice.compress.calling import call_model, float_outputs
from torch_sluice.compress.compensation import compensate, reading_layers
from torch_sluice.compress.graph import find_groups, lowest
from torch_sluice.compress.importance import raw_norms, relative_norms
from torch_sluice.compress.moments import measure_moments
from torch_sluice.compress.pruning import Pruner, kept_by_quantile, prune_ratio
from torch_sluice.compress.slicing import gather, prune


def run(model, inputs):
    with torch.no_grad():
        return float_outputs(call_model(model, inputs))[0]


def groups_of(name):
    model, inputs = make(name)
    groups, notes = find_groups(model, inputs)
    return model, inputs, groups, notes


FOUND = {  # how many units of how many channels
    "mlp": {"0": (64, 1), "2": (65, 1)},
    "convolutions": {"first": (8, 4), "grouped": (16, 4), "narrow": (24, 1), "joined": (40, 1), "hidden": (48, 1)},
    "encoder": {
        "embed": (32, 1),
        **{f"encoder.layers.{i}.self_attn.in_proj_weight heads": (4, 24) for i in (0, 1)},
        **{f"encoder.layers.{i}.linear1": (64, 1) for i in (0, 1)},
    },
    "gated": {"embed": (64, 1), "attention.gate.query_weight heads": (2, 64), "mlp.0": (96, 1)},
    "bert": {
        "bert.embeddings.word_embeddings": (64, 1),
        **{f"bert.encoder.layer.{i}.attention.self.query heads": (4, 16) for i in (0, 1)},
        **{f"bert.encoder.layer.{i}.intermediate.dense": (96, 1) for i in (0, 1)},
        "bert.pooler.dense": (64, 1),
    },
    "llama": {
        "model.embed_tokens": (64, 1),
        **{f"model.layers.{i}.self_attn.q_proj heads": (2, 32) for i in (0, 1)},
        **{f"model.layers.{i}.mlp.gate_proj": (96, 1) for i in (0, 1)},
    },
}
FOUND["gated llama"] = FOUND["llama"]


@pytest.mark.parametrize("name", MODELS)
def test_all_groups_of_a_model_are_found(name):
    *_, groups, notes = groups_of(name)
    found = {group.name: (group.width, group.channels) for group in groups}
    assert found == FOUND[name], notes
    assert any("output" in note for note in notes)


def silence(model, group, units):
    """Zeroes the weights with which other layers read these units: then they may leave without a trace."""
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for member in group.members:
            if member.role == "in":
                places = torch.tensor([place for unit in units for place in member.indices[unit]])
                tensors[member.name].index_fill_(member.dim, places, 0)


def normalises_channels(model, group):
    norms = (nn.LayerNorm, nn.GroupNorm)
    names = {member.path for member in group.members}
    modules = [model.get_submodule(path) for path in names]
    return any(isinstance(m, norms) or "RMSNorm" in type(m).__name__ for m in modules)


@pytest.mark.parametrize("name", MODELS)
def test_channels_that_nobody_reads_leave_without_a_trace(name):
    """The one test that cutting cuts the same channels everywhere: a wrong index anywhere changes the output."""
    model, inputs, groups, _ = groups_of(name)
    checked = 0
    for number, group in enumerate(groups):
        random.seed(number)
        units = sorted(random.sample(range(group.width), group.width - max(1, group.width // 3)))
        cut = prune(model, [(group, units)])
        assert run(cut, inputs).shape == run(model, inputs).shape
        if normalises_channels(model, group):
            continue
        silent = copy.deepcopy(model)
        silence(silent, group, units)
        torch.testing.assert_close(
            run(prune(silent, [(group, units)]), inputs), run(silent, inputs), rtol=1e-4, atol=1e-5
        )
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("name", MODELS)
def test_all_groups_together_give_an_ordinary_smaller_module(name):
    model, inputs, groups, _ = groups_of(name)
    before = copy.deepcopy(model.state_dict())
    kept = {
        g: choices[len(choices) // 2]
        for g, group in enumerate(groups)
        if (choices := group.kept_choices((0.75, 0.5, 0.25), 16))
    }
    cut = Pruner.with_scores(model, groups, "sensitivity").build(kept)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert sum(p.numel() for p in cut.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
    out = run(cut, inputs)
    assert out.shape == run(model, inputs).shape
    assert out.isfinite().all()
    twin = copy.deepcopy(cut)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(cut.state_dict())
    assert torch.equal(run(twin, inputs), out)
    if name != "gated llama":  # gated layers refuse to be trained without a controller's phases only under dropout
        cut.train()
        optimizer = torch.optim.SGD(cut.parameters(), 0.01)
        losses = []
        for _ in range(3):
            loss = float_outputs(call_model(cut, inputs))[0].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["convolutions", "gated"])
def test_a_pruned_model_is_exported_and_compiled(name):
    model, inputs, groups, _ = groups_of(name)
    cut = prune_ratio(model, groups, 0.5)
    expected = run(cut, inputs)
    arguments = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    exported = torch.export.export(cut, *arguments).module()
    torch.testing.assert_close(run(exported, inputs), expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(cut, backend="aot_eager"), inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["convolutions", "encoder", "bert"])
def test_pruning_in_two_rounds_is_pruning_in_one(name):
    """But for compensation."""
    model, inputs, groups, _ = groups_of(name)
    pruner = Pruner.with_scores(model, groups, "sensitivity")
    plans = [{g: c[i] for g, group in enumerate(groups) if (c := group.kept_choices((0.75, 0.5), 4))} for i in (0, -1)]
    once = pruner.build(plans[1])
    twice = pruner.build_further(pruner.build(plans[0]), plans[0], plans[1])
    assert [p.shape for p in once.parameters()] == [p.shape for p in twice.parameters()]
    torch.testing.assert_close(run(twice, inputs), run(once, inputs))


def test_shared_weights_stay_shared():
    torch.manual_seed(0)
    model, inputs = llama(tied=True).eval(), {"input_ids": tokens()}
    groups, _ = find_groups(model, inputs)
    (width,) = [group for group in groups if len(group.members) >= 7]
    cut = prune(model, [(width, list(range(20, 64)))])
    assert cut.lm_head.weight is cut.model.embed_tokens.weight
    assert cut.lm_head.weight.shape[1] < 64
    assert run(cut, inputs).shape == (2, 12, 50)


def test_what_cannot_be_pruned_is_said():
    _, _, _, notes = groups_of("encoder")
    assert any(note.startswith("head: stays, because its channels are the model's output") for note in notes)


def test_multihead_attention_loses_heads_and_width_apart():
    model, inputs, groups, _ = groups_of("encoder")
    (width,) = [group for group in groups if group.name == "embed"]
    heads = next(group for group in groups if group.kind == "heads")
    cut = prune(model, [(width, lowest(relative_norms(model, width), 12)), (heads, [1])])
    attention = cut.encoder.layers[0].self_attn
    assert isinstance(attention, nn.MultiheadAttention)
    assert (attention.embed_dim, attention.num_heads, attention.in_proj_weight.shape) == (20, 3, (72, 20))
    out, weights = attention(*[torch.randn(2, 5, 20)] * 3)
    assert (out.shape, weights.shape) == ((2, 5, 20), (2, 5, 5))
    assert run(cut, inputs).isfinite().all()


def test_ratio_0_keeps_all_and_ratio_1_never_takes_the_last_channel():
    for name in ("mlp", "convolutions", "bert"):
        model, inputs, groups, _ = groups_of(name)
        assert torch.equal(run(prune_ratio(model, groups, 0.0), inputs), run(model, inputs))
        everything = prune_ratio(model, groups, 1.0, round_to=1)
        assert run(everything, inputs).isfinite().all()
        for module in everything.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                assert module.weight.numel() > 0
    for ratio in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"ratio is .*, expected a number in \[0, 1\]"):
            prune_ratio(model, groups, ratio)


def test_ties_go_from_the_last_and_zero_layers_behave():
    model, inputs, groups, _ = groups_of("mlp")
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    scores = raw_norms(model, groups[0] if groups[0].name == "0" else groups[1])
    assert scores.unique().numel() == 1
    assert lowest(scores, 3) == [61, 62, 63]
    with torch.no_grad():
        model[2].weight.zero_()
    for policy in ("quantile", "sensitivity"):
        pruner = Pruner.with_scores(model, groups, policy)
        assert all(score.isfinite().all() for score in pruner.scores)
        kept = kept_by_quantile(groups, pruner.scores, 0.5, 8)
        assert run(pruner.build(kept), inputs).isfinite().all()


def test_the_quantile_is_global():
    """The seed's rule: a layer of small norms loses more than one of large norms."""
    model, _, groups, _ = groups_of("mlp")
    with torch.no_grad():
        model[0].weight.mul_(10)
    pruner = Pruner.with_scores(model, groups, "quantile")
    kept = kept_by_quantile(groups, pruner.scores, 0.4, 1)
    of = {groups[g].name: count for g, count in kept.items()}
    assert "0" not in of
    assert of["2"] == 65 - int(0.4 * (64 + 65))
    norms = model[2].weight.abs().sum(1)
    gone = set(lowest(pruner.scores[[g.name for g in groups].index("2")], 65 - of["2"]))
    assert max(norms[i] for i in gone) <= min(norms[i] for i in range(65) if i not in gone)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 17, 63])
def test_odd_channel_counts(width):
    torch.manual_seed(width)
    model, x = mlp(width).eval(), torch.randn(4, 20)
    groups, _ = find_groups(model, x)
    assert len(groups) == (width > 1) + 1
    for ratio in (0.3, 0.9):
        assert run(prune_ratio(model, groups, ratio), x).shape == (4, 6)
    conv = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 7, 1)).eval()
    groups, _ = find_groups(conv, torch.randn(1, 3, 9, 9))
    assert len(groups) == (width > 1)
    assert run(prune_ratio(conv, groups, 0.6), torch.randn(1, 3, 9, 9)).shape == (1, 7, 7, 7)


def test_kept_numbers_are_multiples_where_the_layer_is_wide_enough():
    *_, groups, _ = groups_of("mlp")
    group = groups[0]
    assert all(kept % 16 == 0 for kept in group.kept_choices((0.9, 0.6, 0.3), 16))
    assert [kept % 8 for kept in group.kept_choices((0.1,), 8)] == [0]
    *_, groups, _ = groups_of("convolutions")
    for group in groups:
        for kept in group.kept_choices((0.8, 0.5, 0.2), 16):
            assert kept * group.channels % 4 == 0


def test_compensation_is_exact_where_channels_repeat_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 5, 1)).eval()
    with torch.no_grad():
        model[0].weight[8:] = 0.9 * model[0].weight[:8]
        model[0].bias[8:] = 0.9 * model[0].bias[:8]
    x = torch.randn(4, 3, 8, 8)
    groups, _ = find_groups(model, x)
    moments = measure_moments(model, [x], reading_layers(model, groups))
    units = list(range(8, 16))
    lost = {}
    gather(groups[0].members, units, lost)
    cut = prune(model, [(groups[0], units)])
    plain = (run(cut, x) - run(model, x)).norm()
    compensate(cut, model, lost, moments)
    assert (run(cut, x) - run(model, x)).norm() < 0.05 * plain


@pytest.mark.parametrize("name", ["convolutions", "bert", "mlp"])
def test_compensation_brings_outputs_closer(name):
    model, inputs, groups, _ = groups_of(name)
    batches = [inputs, *(MODELS[name][1]() for _ in range(80))]
    pruner = Pruner.with_scores(model, groups, "sensitivity")
    kept = {
        g: choices[0]
        for g, group in enumerate(groups)
        if len(group.members) < 7 and (choices := group.kept_choices((0.6,), 8))
    }
    plain = run(pruner.build(kept), inputs)
    pruner.moments = measure_moments(model, batches, reading_layers(model, groups))
    better = run(pruner.build(kept), inputs)
    expected = run(model, inputs)
    assert (better - expected).norm() < 0.8 * (plain - expected).norm()


def test_a_layer_beside_the_way_to_the_output_is_cut_with_the_others():
    torch.manual_seed(0)
    model, inputs = bert(), {"input_ids": tokens()}
    groups, _ = find_groups(model.eval(), inputs)
    (width,) = [group for group in groups if group.name.endswith("word_embeddings")]
    assert ("bert.pooler.dense.weight", 1) in {(member.name, member.dim) for member in width.members}


def test_tracing_leaves_the_model_as_it_was():
    for model, inputs in ((Convolutions().train(), torch.randn(2, 3, 8, 8)), (Encoder(), tokens())):
        before = copy.deepcopy(model.state_dict())
        find_groups(model, inputs)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(module.training for module in model.modules())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_covariance_that_rounding_made_negative_is_solved_with_a_larger_ridge():
    """Sums of squares of channels far from 0, less the square of their mean, may have no square root."""
    from torch_sluice.compress.compensation import _solve

    torch.manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    inner = vectors @ torch.diag(torch.tensor([1.0] * 7 + [-0.02], dtype=torch.float64)) @ vectors.T
    outer, ridge = torch.randn(8, 3, dtype=torch.float64), torch.tensor(1e-3, dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(inner + ridge * torch.eye(8))
    solved = _solve(inner, outer, ridge)
    torch.testing.assert_close(solved, torch.linalg.solve(inner + 0.1 * torch.eye(8), outer))
    assert not _solve(-torch.eye(8, dtype=torch.float64), outer, torch.tensor(1e-30, dtype=torch.float64)).any()
