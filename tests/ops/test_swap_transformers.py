"""swap_attention and attn_implementation="sluice" on Hugging Face transformers models."""

import copy
import subprocess
import sys

import pytest
import torch
from support.attention import formula
from support.devices import DEVICES

from torch_sluice import gate_parameters, restore, swap_attention
from torch_sluice.attention import Gate
from torch_sluice.swap import in_flight
from torch_sluice.swap.hugging_face import register_when_imported, sluice_attention
from torch_sluice.swap.masks import read_mask

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
)

TOKENS = 12
IDS = torch.arange(3 * TOKENS).view(3, TOKENS) % 47 + 1
LEFT = torch.ones_like(IDS)
LEFT[0, :4], LEFT[1, :1] = 0, 0
RIGHT, HOLE = LEFT.flip(1), torch.ones_like(IDS)
HOLE[0, 5] = 0
MASKS = {"none": None, "left": LEFT, "right": RIGHT, "hole": HOLE, "ones": torch.ones_like(IDS)}
# Weights large enough that attention decides which token comes next.
SPECIAL = dict(initializer_range=0.3, vocab_size=50, bos_token_id=0, eos_token_id=0, pad_token_id=0)
LAYERS = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, max_position_embeddings=64)
CONFIGS = {
    "gpt2": lambda: GPT2Config(**LAYERS, **SPECIAL, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "llama": lambda: LlamaConfig(**LAYERS, **SPECIAL, num_key_value_heads=2, intermediate_size=64),
}
GENERATION = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)


def make(name, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), **options).eval()


def randomise_gates(model, spread=0.5):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in gate_parameters(model):
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return model


def test_transformers_is_not_imported_by_us():
    """It is imported by this file, after torch_sluice, and yet test_attn_implementation finds the name registered."""
    script = "import sys, torch_sluice; print(any(m.split('.')[0] == 'transformers' for m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_registers_where_transformers_was_there_first():
    mapping = transformers.AttentionInterface._global_mapping
    function = mapping.pop("sluice")
    register_when_imported()
    assert mapping["sluice"] is function


@pytest.mark.parametrize("name", CONFIGS)
def test_attn_implementation(name):
    expected = make(name)(IDS).logits
    config = CONFIGS[name]()
    config._attn_implementation = "sluice"
    torch.manual_seed(0)
    by_config = AutoModelForCausalLM.from_config(config).eval()
    set_later = make(name)
    set_later.set_attn_implementation("sluice")
    for model in (make(name, attn_implementation="sluice"), by_config, set_later):
        assert model.config._attn_implementation == "sluice"
        torch.testing.assert_close(model(IDS).logits, expected)


def test_attn_implementation_of_a_saved_model(tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sluice")
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_open_gates_change_nothing(name, mask, device):
    model, ids = make(name).train().to(device), IDS.to(device)
    mask = None if MASKS[mask] is None else MASKS[mask].to(device)
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    expected = model(ids, attention_mask=mask).logits[seen]
    gradients = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
    swap_attention(model)
    assert not gate_parameters(model)
    out = model(ids, attention_mask=mask).logits[seen]
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad(out.square().mean(), list(model.parameters()))
    for mine, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_operator_is_what_runs(name, monkeypatch):
    from torch_sluice.swap import call

    calls = []

    def counted(*arguments, **options):
        calls.append(options.get("key_range"))
        return original(*arguments, **options)

    original = call.gated_attention
    monkeypatch.setattr(call, "gated_attention", counted)
    model = swap_attention(make(name))
    model(IDS)
    assert calls == [None, None]
    model(IDS, attention_mask=LEFT)
    assert calls[2].tolist() == calls[3].tolist() == [[4, 12], [1, 12], [0, 12]]
    model(IDS, attention_mask=HOLE)  # goes the way of "sdpa"
    assert len(calls) == 4


@pytest.mark.parametrize("name", CONFIGS)
def test_gates_follow_the_formula(name):
    """The layer's output is the formula on its q, k, v and the gate's a and b of the layer's input."""
    model = randomise_gates(swap_attention(make(name), target_density=0.5, window=2, sinks=1))
    layer = model.transformer.h[0].attn if name == "gpt2" else model.model.layers[0].self_attn
    seen = {}
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(x=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    (layer.c_proj if name == "gpt2" else layer.o_proj).register_forward_pre_hook(
        lambda m, args: seen.update(out=args[0])
    )
    from torch_sluice.swap import call

    original = call.attend

    def spy(gate, x, q, k, v, **options):
        if "q" not in seen:
            seen.update(q=q, k=k, v=v)
        return original(gate, x, q, k, v, **options)

    call.attend = spy
    try:
        model(IDS)
    finally:
        call.attend = original
    a, b = layer.sluice_gate(seen["x"])
    out, _ = formula(seen["q"], seen["k"], seen["v"], a, b, causal=True, tau=0.5, window=2, sinks=1)
    torch.testing.assert_close(seen["out"], out.transpose(1, 2).flatten(-2))
    assert b.shape[1] == seen["k"].shape[1]
    assert not torch.allclose(out, formula(seen["q"], seen["k"], seen["v"], a + 40, b, causal=True)[0])


CACHES = {
    "grows": {},
    "beams": dict(num_beams=3),
    "static": dict(cache_implementation="static"),
    "chunks": dict(prefill_chunk_size=5),
}


@pytest.mark.parametrize(
    ("name", "mask", "how"),
    [("llama", mask, how) for mask in (LEFT, torch.ones_like(IDS)) for how in CACHES] + [("gpt2", LEFT, "beams")],
    ids=lambda x: "padded" if x is LEFT else "whole" if isinstance(x, torch.Tensor) else x,
)
def test_generation_keeps_b_with_the_cache(name, mask, how):
    """What is generated with a cache is what is generated by looking at the whole sequence again for each token."""
    model, options = make(name), dict(attention_mask=mask) | GENERATION
    beams = dict(num_beams=3) if how == "beams" else {}
    dense = model.generate(IDS, **options, **beams)
    swap_attention(model)
    assert torch.equal(model.generate(IDS, **options, **CACHES[how]), dense)
    restore(model)
    randomise_gates(swap_attention(model, target_density=0.5, window=2, sinks=1), 3.0)
    right = model.generate(IDS, use_cache=False, **options, **beams)
    assert torch.equal(model.generate(IDS, **options, **CACHES[how]), right)
    assert not torch.equal(right, dense)


def test_cache_in_half_precision_does_not_round_b():
    model = make("llama").bfloat16()
    randomise_gates(swap_attention(model, target_density=0.5, window=2, sinks=1), 3.0)
    with torch.no_grad():
        cache = model(IDS[:, :7], use_cache=True).past_key_values
        stored = cache.layers[0].values
        assert stored.shape[-1] == 8 + 2  # float32 in two bfloat16 channels
        gate, x = model.model.layers[0].self_attn.sluice_gate, model.model.layers[0].input_layernorm
        _, b = gate(x(model.model.embed_tokens(IDS[:, :7])))
        assert torch.equal(stored[..., 8:].contiguous().view(torch.float32).squeeze(-1), b)


def test_cache_that_was_filled_without_gates():
    model = make("llama")
    cache = model(IDS[:, :7], use_cache=True).past_key_values
    swap_attention(model, target_density=0.5)
    with pytest.raises(ValueError, match="holds values of 8 channels, expected 9: it was filled without gates"):
        model(IDS[:, 7:], past_key_values=cache)


@pytest.mark.filterwarnings("ignore:this attention mask is not")
@pytest.mark.parametrize("mask", MASKS)
def test_any_mask_with_gates(mask):
    """A mask of four dimensions has the same meaning as the padding that it is made of."""
    model = randomise_gates(swap_attention(make("llama"), target_density=0.5, window=2, sinks=0))
    keep = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(3, 1, -1, -1)
    if MASKS[mask] is not None:
        keep = keep & MASKS[mask].bool()[:, None, None, :]
    additive = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    seen = torch.ones_like(IDS, dtype=torch.bool) if MASKS[mask] is None else MASKS[mask].bool()
    position_ids = torch.arange(TOKENS).expand(3, -1)
    expected = model(IDS, attention_mask=MASKS[mask], position_ids=position_ids).logits[seen]
    for four_dimensional in (keep, additive):
        out = model(IDS, attention_mask=four_dimensional, position_ids=position_ids).logits[seen]
        torch.testing.assert_close(out, expected)
    per_head = keep.expand(-1, 4, -1, -1).clone()
    per_head[0, 1, 5, 5:] = per_head[0, 1, 5, 5:]  # equal, but materialised
    torch.testing.assert_close(model(IDS, attention_mask=per_head, position_ids=position_ids).logits[seen], expected)


@pytest.mark.filterwarnings("ignore:this attention mask is not")
def test_dense_formula_and_operator_agree_where_the_mask_does():
    model = randomise_gates(swap_attention(make("llama"), target_density=0.5, window=0, sinks=0), 3.0)
    right = model(IDS).logits
    torch.testing.assert_close(model(IDS, attention_mask=HOLE).logits[:, :5], right[:, :5])  # the hole is behind them


def test_sliding_window_model():
    torch.manual_seed(0)
    config = MistralConfig(**LAYERS, **SPECIAL, num_key_value_heads=2, intermediate_size=64, sliding_window=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected, generated = model(IDS).logits, model.generate(IDS, **GENERATION)
    swap_attention(model)
    torch.testing.assert_close(model(IDS).logits, expected)
    assert torch.equal(model.generate(IDS, **GENERATION), generated)
    restore(model)
    randomise_gates(swap_attention(model, target_density=0.5, window=2, sinks=0), 3.0)
    with_gates = model.generate(IDS, **GENERATION)
    assert torch.equal(with_gates, model.generate(IDS, use_cache=False, **GENERATION))


@pytest.mark.filterwarnings("ignore:this attention mask is not")
def test_bidirectional_model():
    torch.manual_seed(0)
    config = BertConfig(**LAYERS, vocab_size=50, intermediate_size=64, attention_probs_dropout_prob=0.0)
    model = BertModel(config).eval()
    expected = {name: model(IDS, attention_mask=mask).last_hidden_state for name, mask in MASKS.items()}
    swap_attention(model)
    for name, mask in MASKS.items():
        torch.testing.assert_close(model(IDS, attention_mask=mask).last_hidden_state, expected[name])
    restore(model)
    randomise_gates(swap_attention(model, target_density=0.5, window=2, sinks=0))
    assert len(gate_parameters(model)) == 8
    alone = model(IDS[1:2, 1:], position_ids=torch.arange(1, TOKENS)[None]).last_hidden_state
    torch.testing.assert_close(model(IDS, attention_mask=LEFT).last_hidden_state[1:2, 1:], alone)


def test_encoder_decoder_model():
    torch.manual_seed(0)
    config = BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, init_std=0.3,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
        vocab_size=50, max_position_embeddings=64, dropout=0.0,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, decoder_start_token_id=0, forced_eos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    options = dict(attention_mask=RIGHT, num_beams=2) | GENERATION
    expected = model.generate(IDS, **options)
    swap_attention(model)
    assert torch.equal(model.generate(IDS, **options), expected)
    restore(model)
    randomise_gates(swap_attention(model, target_density=0.5, window=2, sinks=0), 3.0)
    gates = [name for name, module in model.named_modules() if isinstance(module, Gate)]
    assert len(gates) == 2
    assert not any("encoder_attn" in name for name in gates)  # cross attention stays open
    assert torch.equal(model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options))


@pytest.mark.parametrize("sizes", [(0, 4, 5, 8), (2, 4, 0, 8)], ids=str)
@pytest.mark.parametrize("target_density", [None, 0.5])
def test_no_batch_and_no_tokens(target_density, sizes):
    """The attention itself: what is around it in these models reshapes to -1, and refuses both."""
    layer = swap_attention(make("llama").train(), target_density=target_density).model.layers[0].self_attn
    if target_density:
        in_flight.put(layer, layer.sluice_gate(torch.zeros(sizes[0], sizes[2], 32)))
    q, k, v = (torch.zeros(*sizes, requires_grad=True) for _ in range(3))
    out, _ = sluice_attention(layer, q, k[:, :2], v[:, :2], None, scaling=0.5)
    assert out.shape == (sizes[0], sizes[2], 4, 8)
    assert all(x.shape == sizes for x in torch.autograd.grad(out.sum(), (q, k, v)))
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        make("llama")(IDS[:0])


@pytest.mark.parametrize("target_density", [None, 0.5])
@pytest.mark.parametrize("name", CONFIGS)
def test_restore_leaves_nothing(name, target_density):
    model = make(name)
    state = {key: x.data_ptr() for key, x in model.state_dict().items()}
    attributes = [set(vars(m)) for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    config, expected = model.config.to_dict(), model(IDS).logits
    swap_attention(model, target_density=target_density)
    model(IDS)
    assert set(model.state_dict()) >= set(state)
    restore(model)
    assert {key: x.data_ptr() for key, x in model.state_dict().items()} == state
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(IDS).logits, expected)


def test_checkpoint_and_copy():
    model = randomise_gates(swap_attention(make("llama"), target_density=0.5))
    other = swap_attention(make("llama"), target_density=0.5)
    other.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    for same in (other, twin):
        assert torch.equal(same(IDS).logits, model(IDS).logits)
    restore(twin)
    assert not gate_parameters(twin)
    assert len(gate_parameters(model)) == 8
    assert model.model.layers[0].self_attn.config._attn_implementation == "sluice"


def test_gates_start_nearly_open_and_learn():
    model = make("gpt2")
    expected = model(IDS).logits
    swap_attention(model.train(), target_density=0.5)
    (gate, *_) = [m for m in model.modules() if isinstance(m, Gate)]
    a, b = gate(torch.randn(1, 3, 32))
    torch.testing.assert_close((a[..., None] + b[..., None, :]).sigmoid(), torch.full((1, 4, 3, 3), 0.95))
    torch.testing.assert_close(model(IDS).logits, expected)  # 12 tokens: all within the window, which is not gated
    restore(model)
    swap_attention(model, target_density=0.5, window=1, sinks=0)
    gates = gate_parameters(model)
    others = [p for p in model.parameters() if all(p is not g for g in gates)]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": gates, "lr": 1e-2, "weight_decay": 0.0}], lr=1e-3)
    before = [g.clone() for g in gates]
    first = model(IDS, labels=IDS).loss
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
    assert loss < first
    assert all(not torch.equal(g, old) for g, old in zip(gates, before, strict=True))


def test_gradient_checkpointing():
    model = randomise_gates(swap_attention(make("llama").train(), target_density=0.5, window=2, sinks=0))
    expected = torch.autograd.grad(model(IDS).logits.square().mean(), list(model.parameters()))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ours = torch.autograd.grad(model(IDS, use_cache=False).logits.square().mean(), list(model.parameters()))
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(("name", "target_density"), [("gpt2", 0.5), ("llama", None), ("llama", 0.5)])
def test_compile(name, target_density):
    torch._dynamo.reset()
    model = randomise_gates(swap_attention(make(name).train(), target_density=target_density, window=2, sinks=0))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for mask in (LEFT, None) if target_density and name == "llama" else (None,):
        out, expected = compiled(IDS, attention_mask=mask).logits, model(IDS, attention_mask=mask).logits
        torch.testing.assert_close(out, expected)
        ours = torch.autograd.grad(out.square().mean(), list(model.parameters()))
        theirs = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)
    if target_density and name == "llama":
        with pytest.raises(RuntimeError, match="expected the causal or full mask or the layer.s sliding"):
            compiled(IDS, attention_mask=HOLE)


def test_autocast():
    model = make("llama")
    truth = model(IDS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        old_error = (model(IDS).logits - truth).abs()
        swap_attention(model)
        error = (model(IDS).logits - truth).abs()
        assert error.max() <= 2 * old_error.max()
        assert error.mean() <= 1.2 * old_error.mean()
        restore(model)
        randomise_gates(swap_attention(model, target_density=0.5, window=2, sinks=0))
        assert model(IDS).logits.isfinite().all()


def test_dropout():
    config = CONFIGS["gpt2"]()
    config.attn_pdrop = 0.5
    model = AutoModelForCausalLM.from_config(config).train()
    torch.manual_seed(1)
    expected = model(IDS).logits
    swap_attention(model)
    torch.manual_seed(1)
    assert torch.equal(model(IDS).logits, expected)  # open gates: the way of "sdpa", dropout and all
    restore(model)
    randomise_gates(swap_attention(model, target_density=0.5, window=2, sinks=0))
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(IDS).logits)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    outs[0].square().mean().backward()
    assert all(p.grad.isfinite().all() for p in gate_parameters(model))
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    later[0, 5] = True  # which the operator does not take under causality: computed densely
    with pytest.raises(ValueError, match=r"the attention dropout is 0\.5, expected 0 with a mask that"):
        model(IDS, attention_mask=later[None, None])


def test_modules_choose():
    model = swap_attention(make("llama"), target_density=0.5, modules=lambda name, module: "layers.1" in name)
    assert len(gate_parameters(model)) == 4
    torch.testing.assert_close(model(IDS).logits, make("llama")(IDS).logits)  # 12 tokens are all near


def test_what_a_layer_hands_over_by_name():
    """A cap of scores and sink logits reach the operator; with what only the old way has, they are refused."""
    q, sinks = torch.randn(1, 2, 3, 4), torch.randn(2)
    layer, causal = torch.nn.Module(), torch.ones(3, 3, dtype=torch.bool).tril()
    scores = 1.5 * torch.tanh(q @ q.mT / 3)
    scores = torch.cat((scores.masked_fill(~causal, -torch.inf), sinks.view(1, 2, 1, 1).expand(-1, -1, 3, -1)), -1)
    found, _ = sluice_attention(layer, q, q, q, None, softcap=1.5, s_aux=sinks, scaling=0.5)
    torch.testing.assert_close(found.transpose(1, 2), scores.softmax(-1)[..., :3] @ q)
    hole = causal.clone()
    hole[2, 1] = False
    for options in (dict(softcap=1.5), dict(s_aux=sinks)):
        with pytest.raises(ValueError, match=f"does not support {next(iter(options))} together with"):
            sluice_attention(layer, q, q, q, hole[None, None], **options)


def test_mask_reading():
    """A mask is read once, and again when it has changed; nothing but padding passes for padding."""
    keys = torch.arange(6)
    causal = (keys <= keys[:, None]).expand(2, 1, 6, 6)
    padding = (keys >= torch.tensor([2, 0])[:, None])[:, None, None]
    assert read_mask(causal, 2, 6, 6, True)[:3] == (True, None, None)
    assert read_mask(causal & padding, 2, 6, 6, True).key_range.tolist() == [[2, 6], [0, 6]]
    assert read_mask(padding, 2, 6, 6, False).key_range.tolist() == [[2, 6], [0, 6]]
    assert not read_mask(padding, 2, 6, 6, True).causal  # the mask says so, whatever the layer is
    assert read_mask(causal[:, :, -1:], 2, 1, 6, True)[:3] == (True, None, None)
    for rows, first in ((slice(0, 3), 0), (slice(2, 3), 2), (slice(1, 5), 1)):  # a cache longer than the text
        pattern = read_mask((causal & padding)[:, :, rows], 2, rows.stop - rows.start, 6, True)
        assert pattern.q_offset.tolist() == [first, first]
        assert pattern.key_range[1].tolist() == [0, rows.stop]
    assert read_mask(causal[:, :, :3], 2, 3, 6, True).q_offset.tolist() == [0, 0]
    assert read_mask(causal.tril(-1), 2, 6, 6, True) is None
    mask = causal & padding
    assert read_mask(mask, 2, 6, 6, True) is not None
    mask[0, 0, 4, 3] = False
    assert read_mask(mask, 2, 6, 6, True) is None
    assert read_mask(torch.zeros(2, 1, 6, 6, dtype=torch.bool), 2, 6, 6, True).key_range.tolist() == [[0, 0], [0, 0]]
