"""swap_attention asks what a transformers layer computes before it takes its place."""

import copy
import functools
import pickle

import pytest
import torch

from torch_sluice import restore, swap_attention
from torch_sluice.attention import Gate, attend
from torch_sluice.swap import call
from torch_sluice.swap.dense import dense_gated_attention
from torch_sluice.swap.hugging_face import sluice_attention

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama import modeling_llama  # noqa: E402

SPECIAL = dict(initializer_range=0.3, vocab_size=50, bos_token_id=0, eos_token_id=0, pad_token_id=0)
LAYERS = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, max_position_embeddings=64)
GROUPED = dict(num_key_value_heads=2, intermediate_size=64, head_dim=8)
EXPERTS = dict(num_local_experts=2, num_experts_per_tok=2)
CONFIGS = {
    "llama": lambda: LlamaConfig(**LAYERS, **SPECIAL, **GROUPED),
    "gpt2": lambda: GPT2Config(**LAYERS, **SPECIAL),
    "gemma2": lambda: Gemma2Config(**LAYERS, **SPECIAL, **GROUPED),
    "gpt_oss": lambda: GptOssConfig(**LAYERS, **SPECIAL, **GROUPED, **EXPERTS, sliding_window=5),
    "bloom": lambda: BloomConfig(n_layer=2, n_head=4, hidden_size=32, **SPECIAL),
}
IDS = torch.arange(3 * 12).view(3, 12) % 47 + 1
LEFT = torch.ones_like(IDS)
LEFT[0, :4], LEFT[1, :1] = 0, 0


def make(name, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), **options).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("sinks"):
                parameter.normal_()
    return model


@pytest.fixture
def operator_calls(monkeypatch):
    calls, original = [], call.gated_attention
    monkeypatch.setattr(call, "gated_attention", lambda *q, **options: calls.append(options) or original(*q, **options))
    return calls


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("bloom", {}, r"h\.0\.self_attention and 1 more \(BloomAttention\): it computes attention itself\. Where"),
        ("gpt2", dict(attn_implementation="eager"), r"\(GPT2Attention\): its forward does something else .*'eager'"),
        ("llama", dict(attn_implementation="flex_attention"), r"'flex_attention', expected 'sdpa' or 'eager'"),
    ],
)  # fmt: skip
def test_refused_at_the_swap(name, options, reason):
    model = make(name, **options)
    attributes = [set(vars(m)) for m in model.modules()]
    with pytest.raises(ValueError, match=reason):
        swap_attention(model)
    assert [set(vars(m)) for m in model.modules()] == attributes


def test_a_cap_that_the_function_leaves_out_is_refused():
    model = make("llama")
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 50.0
    with pytest.raises(ValueError, match=r"'sdpa' leaves out the cap of its scores .* = 50"):
        swap_attention(model)


def test_a_cap_that_is_off_is_none(operator_calls):
    config = CONFIGS["gemma2"]()
    config.attn_logit_softcapping = None
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = model(IDS).logits
    torch.testing.assert_close(swap_attention(model)(IDS).logits, expected)
    assert len(operator_calls) == 2


@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
def test_scores_that_are_capped(mask, operator_calls):
    """Gemma 2: layers with a sliding window and without, and a cap that its function bends scores by."""
    torch.manual_seed(0)
    config = CONFIGS["gemma2"]()
    config.attn_logit_softcapping, config.sliding_window = 0.05, 4
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask).logits
        swap_attention(model)
        torch.testing.assert_close(model(IDS, attention_mask=mask).logits, expected)
        assert len(operator_calls) == 2
        swap_attention(restore(model), target_density=0.5, window=100, sinks=0)  # all pairs are near, and none gated
        seen = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(model(IDS, attention_mask=mask).logits[seen], expected[seen])
    model.train()
    model(IDS, attention_mask=mask).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("what", ["scales", "ignores the mask", "raises"])
def test_an_attention_function_is_tried_and_not_believed(what, monkeypatch):
    plain = modeling_llama.eager_attention_forward

    def other(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        if what == "raises":
            raise KeyError("rope")
        mask = None if what == "ignores the mask" else attention_mask
        return plain(module, query, key, value, mask, scaling * (1.01 if what == "scales" else 1), dropout, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", other)
    expected = "KeyError: 'rope'" if what == "raises" else "is not plain attention: tried on small random tensors"
    with pytest.raises(ValueError, match=expected):
        swap_attention(make("llama", attn_implementation="eager"))


def test_an_attention_function_without_code(monkeypatch):
    partial = functools.partial(modeling_llama.eager_attention_forward)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", partial)
    with pytest.raises(
        ValueError, match=r"\(LlamaAttention\): its attention function is a partial, expected a function"
    ):
        swap_attention(make("llama", attn_implementation="eager"))


def test_an_argument_that_changes_the_result_goes_the_old_way(monkeypatch, operator_calls):
    """A function that takes an argument of its own is plain without it, and asked whenever it is given."""
    plain = modeling_llama.eager_attention_forward

    def other(module, query, key, value, attention_mask, scaling, dropout=0.0, boost=None, **kwargs):
        return plain(module, query, key, value, attention_mask, scaling * (boost or 1.0), dropout, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", other)
    model = make("llama", attn_implementation="eager")
    with_boost, without = model(IDS, boost=3.0).logits, model(IDS).logits
    swap_attention(model)
    assert torch.equal(model(IDS, boost=3.0).logits, with_boost)
    assert not operator_calls
    torch.testing.assert_close(model(IDS).logits, without)
    assert len(operator_calls) == 2
    restore(model)
    swap_attention(model, target_density=0.5)
    with pytest.raises(ValueError, match="boost is given, expected None: a gated layer does not take it"):
        model(IDS, boost=3.0)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
def test_eager_layers(name, mask, operator_calls):
    """The outputs are the same at the padding too, where an eager function takes the mean of all values."""
    model = make(name, attn_implementation="eager")
    expected = model(IDS, attention_mask=mask).logits
    swap_attention(model)
    assert model.config._attn_implementation == "eager"  # and the masks are eager ones
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, attention_mask=mask).logits, expected)
    assert len(operator_calls) == 2


def test_sinks_learn_on_the_operator(operator_calls):
    model = make("gpt_oss").train()
    expected = torch.autograd.grad(model(IDS).logits.square().mean(), list(model.parameters()))
    ours = torch.autograd.grad(swap_attention(model)(IDS).logits.square().mean(), list(model.parameters()))
    assert len(operator_calls) == 2
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:this attention mask is not the causal")
@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_with_sinks_takes_a_gate(padded):
    """Open it is the layer as it was; shut it has the dense formula's outputs and gradients, the sinks' among them."""
    model = make("gpt_oss")
    mask = LEFT if padded else torch.ones_like(IDS)
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask).logits
        swap_attention(model, target_density=0.5, window=100, sinks=0)  # all pairs are near, and none gated
        found = model(IDS, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)
    swap_attention(restore(model), target_density=0.5, window=0, sinks=0)
    results, gates = [], [module for module in model.modules() if isinstance(module, Gate)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for gate in gates for p in gate.parameters()):
            parameter.copy_(2 * torch.randn(parameter.shape, generator=generator))
    for gate in gates:
        gate.tau = 0.6
    names, parameters = zip(*model.named_parameters(), strict=True)
    for dense in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if dense:
                patch.setattr(call, "attend", attend_densely)
            logits = model(IDS, attention_mask=mask).logits
            results.append((logits, *torch.autograd.grad(logits[mask.bool()].square().mean(), parameters)))
    for name, mine, other in zip(("logits", *names), *results, strict=True):
        if name == "logits":
            mine, other = mine[mask.bool()], other[mask.bool()]
            assert (mine - expected[mask.bool()]).abs().max() > 0.01
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=2e-3, msg=name)
    assert any(gradient.any() for name, gradient in zip(names, results[0][1:], strict=True) if name.endswith(".sinks"))


def attend_densely(gate, x, q, k, v, *, logits, dropout_p=0.0, **options):
    assert dropout_p == 0
    return dense_gated_attention(q, k, v, *logits, tau=gate.tau, **options)[0]


def test_a_layer_with_sinks_teaches_its_gate_about_dropped_pairs():
    """Of a dropped pair admitted alone, the share that it would take is one of a softmax with the sink."""
    torch.manual_seed(0)
    gate = Gate(8, 2, 2)
    gate.phase, gate.rows, gate.tau = "straight_through", 1.0, 0.6
    q, k, v = (torch.randn(1, 2, 6, 4) for _ in range(3))
    sinks = torch.tensor([0.5, -1.0])
    a, b = (torch.randn(1, 2, 6, requires_grad=True) for _ in range(2))
    dout = torch.randn(1, 2, 6, 4)
    out = attend(gate, None, q, k, v, causal=True, logits=(a, b), sink_logits=sinks)
    found = torch.autograd.grad(out, (a, b), dout)
    # A key of its own stands for the sink: always kept, in all rows, with a score that is the sink's and a value of 0.
    more = sinks.view(1, 2, 1, 1).expand(1, 2, 1, 1)
    wide_q = torch.cat((q, torch.ones(1, 2, 6, 1)), -1)
    first_k = torch.cat((torch.zeros(1, 2, 1, 4), 2 * more), -1)
    wide_k = torch.cat((first_k, torch.cat((k, torch.zeros(1, 2, 6, 1)), -1)), 2)
    wide_v = torch.cat((torch.zeros(1, 2, 1, 4), v), 2)
    wide_b = torch.cat((torch.full((1, 2, 1), 20.0), b), 2)
    out = attend(gate, None, wide_q, wide_k, wide_v, causal=True, scale=0.5, sinks=1, logits=(a, wide_b))
    expected = torch.autograd.grad(out, (a, b), dout)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("target_density", [None, 0.5])
def test_attention_weights_are_given_where_they_were(target_density):
    model = make("llama", attn_implementation="eager")
    expected = model(IDS, attention_mask=LEFT, output_attentions=True)
    swap_attention(model, target_density=target_density)  # the window is wider than the text: nothing is gated
    out = model(IDS, attention_mask=LEFT, output_attentions=True)
    assert len(out.attentions) == 2
    seen = LEFT.bool()
    for mine, other in zip(out.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(mine.transpose(1, 2)[seen], other.transpose(1, 2)[seen])
    torch.testing.assert_close(out.logits[seen], expected.logits[seen])


def test_the_config_stays_the_models_own():
    model = swap_attention(make("llama"))
    layer = model.model.layers[0].self_attn
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        theirs = twin.model.layers[0].self_attn.config
        assert theirs._attn_implementation == "sluice"
        twin.config.head_dim = 77
        assert theirs.head_dim == 77
        assert isinstance(theirs, LlamaConfig)
    assert layer.config.head_dim == 8
    assert restore(model).model.layers[0].self_attn.config is model.config


def test_another_implementation_after_the_swap():
    model = swap_attention(make("llama"))
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"is 'eager' and was 'sdpa' when.*call torch_sluice\.restore"):
        model(IDS)


def test_only_the_chosen_layers_are_swapped(operator_calls):
    model = swap_attention(make("llama"), modules=["model.layers.1.self_attn"])
    model(IDS)
    assert len(operator_calls) == 1


def test_position_bias(operator_calls):
    """Layers with a bias go the old way; cross attention, whose bias is zero, runs on the operator."""
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50, dropout_rate=0.0)
    model = T5ForConditionalGeneration(config).eval()
    inputs = dict(input_ids=IDS, attention_mask=LEFT, decoder_input_ids=IDS[:, :5])
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(swap_attention(model)(**inputs).logits, expected)
        assert len(operator_calls) == 2
        swap_attention(restore(model), target_density=0.5, window=64)
        torch.testing.assert_close(model(**inputs).logits, expected)
        assert len(operator_calls) > 2  # with a gate the bias is the operator's, too


def test_weights_that_nobody_asked_for(operator_calls):
    """An eager layer's weights are computed when they are looked at, with their gradient; and not from changed keys."""
    model = make("llama", attn_implementation="eager")
    found = []
    layer = model.model.layers[0].self_attn
    layer.register_forward_hook(lambda module, args, out: found.append(out[1]))
    model(IDS, attention_mask=LEFT)
    swap_attention(model)
    model(IDS, attention_mask=LEFT)
    (expected, weights), parameter = found, layer.q_proj.weight
    assert isinstance(weights, torch.Tensor)
    torch.testing.assert_close(weights * 1, expected)
    ours, theirs = (torch.autograd.grad(w.square().sum(), parameter)[0] for w in (weights, expected))
    torch.testing.assert_close(ours, theirs)
    q = torch.randn(1, 4, 3, 8)
    with torch.no_grad():
        _, weights = sluice_attention(layer, q, q[:, :2], q[:, :2], None, scaling=1.0)
        q.zero_()
    with pytest.raises(RuntimeError, match="looked at after the queries or keys that they come from were changed"):
        weights.sum()
