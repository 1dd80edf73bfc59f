"""Gates with every class of cache: what is generated with one is what the whole text, looked at anew, gives."""

import copy
import importlib.util
import pickle

import pytest
import torch

pytest.importorskip("transformers")

from support.gated_llama import draw, make
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    MistralConfig,
    QuantizedCache,
    StaticCache,
    cache_utils,
)

from torch_sluice import gate_parameters, restore, swap_attention
from torch_sluice.swap import cache_layer, hugging_face
from torch_sluice.swap.cache import GatedCache

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64)
SPECIAL = dict(vocab_size=50, initializer_range=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=0)
GENERATION = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
CLOSING = dict(target_density=0.3, window=1, sinks=2)


def batch(tokens=12, padding=4):
    """Two prompts, the second of which is padded on the left."""
    ids = torch.cat((draw(tokens=tokens), torch.nn.functional.pad(draw(tokens=tokens - padding, seed=1), (padding, 0))))
    return dict(input_ids=ids, attention_mask=(ids > 0).long())


def randomise(model, spread=3.0):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in gate_parameters(model):
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return model


class Lossless(cache_utils.QuantizedLayer):
    """Takes the way of a quantised layer, and gives back what it was given."""

    def __init__(self):
        super().__init__(residual_length=4)

    def _quantize(self, tensor, axis):
        return tensor.clone()

    def _dequantize(self, tensor):
        return tensor


class Roomy(Lossless):
    """Quantises the first forward's tokens alone."""

    def __init__(self):
        super().__init__()
        self.residual_length = 100


def lossless(kind=Lossless):
    return cache_utils.Cache(layer_class_to_replicate=kind)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_a_quantised_cache_has_its_gates_beside_it(beams):
    model = make()
    options = dict(num_beams=beams, **batch(), **GENERATION)
    expected = model.generate(**options, use_cache=False)
    assert torch.equal(model.generate(**options, past_key_values=lossless()), expected)
    assert not torch.equal(restore(model).generate(**options), expected)


BACKENDS = {"fp8": None, "quanto": "optimum.quanto", "hqq": "hqq"}


def is_there(module):
    try:
        return module is None or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_that_rounds_values_does_not_round_gates(backend, monkeypatch):
    """In every step each layer sees the b that its gate gave for each token, bit by bit."""
    if not is_there(BACKENDS[backend]):
        pytest.skip(f"{BACKENDS[backend]} is not installed")
    sizes = {} if backend == "fp8" else dict(q_group_size=8, residual_length=4)
    model = make()
    seen, given = {}, {}
    attend = hugging_face.attend_gated

    def spy(gate, logits, *arguments, **options):
        seen.setdefault(gate, []).append(logits[1].clone())
        return attend(gate, logits, *arguments, **options)

    monkeypatch.setattr(hugging_face, "attend_gated", spy)
    for layer in model.model.layers:
        layer.self_attn.sluice_gate.register_forward_hook(
            lambda gate, _, out: given.setdefault(gate, []).append(out[1].clone())
        )
    model.generate(**batch(), **GENERATION, past_key_values=QuantizedCache(backend, model.config, **sizes))
    for gate, steps in seen.items():
        assert len(steps) == 6
        for number, b in enumerate(steps, 1):
            assert torch.equal(b, torch.cat(given[gate][:number], dim=-1))


@torch.no_grad()
def test_open_gates_leave_quantised_caches_what_they_were():
    model = restore(make())
    options = dict(**batch(), **GENERATION, output_logits=True, return_dict_in_generate=True)
    logits = []
    for swap in (lambda model: model, swap_attention):
        out = swap(model).generate(**options, past_key_values=QuantizedCache("fp8", model.config))
        logits.append(torch.stack(out.logits))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config, max_cache_len=30),
    "quantised": lambda config: lossless(),
}


def made_ready(config):
    cache = StaticCache(config, max_cache_len=30)
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    return cache


@torch.no_grad()
def test_a_cache_that_was_made_ready_is_empty():
    """Its buffers are those of the model without gates, and hold nothing yet."""
    model = make()
    expected = model.generate(**batch(), **GENERATION, use_cache=False)
    cache = made_ready(model.config)
    assert torch.equal(model.generate(**batch(), **GENERATION, past_key_values=cache), expected)
    assert cache.layers[0].values.shape == (2, 2, 30, 9)


@torch.no_grad()
def test_a_compiled_model_finds_a_cache_that_was_made_ready():
    torch.compiler.reset()
    model = make()
    expected = model.generate(**batch(), **GENERATION, use_cache=False)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(**batch(), **GENERATION, past_key_values=made_ready(model.config)), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_that_was_filled_without_gates_is_refused_until_it_is_empty(kind):
    model, inputs = restore(make()), batch()
    cache = CACHES[kind](model.config)
    model(**inputs, past_key_values=cache)
    swap_attention(model, **CLOSING)
    longer = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    token = dict(input_ids=inputs["input_ids"][:, :1], attention_mask=longer)
    with pytest.raises(ValueError, match="the cache of layer 0 holds .* it was filled without gates"):
        model(**token, past_key_values=cache)
    if kind != "quantised":  # that one counts what it refused
        cache.reset()
        found = model(**inputs, past_key_values=cache).logits
        torch.testing.assert_close(found, model(**inputs, use_cache=False).logits)


def sliding():
    torch.manual_seed(0)
    config = MistralConfig(**SMALL, **SPECIAL, sliding_window=8)
    return randomise(swap_attention(AutoModelForCausalLM.from_config(config).eval(), **CLOSING))


CHANGES = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "copy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}
ROWS = {"reorder": [1, 0], "select": [1], "repeat": [0, 0, 1, 1]}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:this attention mask is not the causal")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["quantised", "sliding", "dynamic"])
def test_what_is_done_to_a_cache_is_done_to_its_gates(kind, change):
    """Rows that change places take b along, and the sinks that a sliding window has let go of."""
    model = sliding() if kind == "sliding" else make()
    inputs = batch(padding=2)
    cache = lossless(Roomy) if kind == "quantised" else DynamicCache(config=model.config)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    rows = torch.tensor(ROWS.get(change, [0, 1]))
    expected = model(ids[rows], attention_mask=mask[rows], position_ids=places[rows], use_cache=False).logits[:, 10:]
    for first, last in ((0, 1), (1, 10)):
        part = dict(attention_mask=mask[:, :last], position_ids=places[:, first:last], past_key_values=cache)
        model(ids[:, first:last], **part)
    if kind == "quantised" and change in ("select", "repeat"):
        for layer in cache.layers:  # what is quantised knows of reordering alone
            layer._quantized_keys, layer._quantized_values = layer._quantized_keys[rows], layer._quantized_values[rows]
    cache = CHANGES[change](cache) or cache
    for n in (10, 11):
        step = dict(attention_mask=mask[rows, : n + 1], position_ids=places[rows, n : n + 1], past_key_values=cache)
        found = model(ids[rows, n : n + 1], **step).logits[:, 0]
        torch.testing.assert_close(found, expected[:, n - 10], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", CACHES)
def test_a_cropped_cache_goes_on_from_there(kind):
    model, inputs = make(), batch(padding=0)
    ids = inputs["input_ids"]
    cache = lossless(Roomy) if kind == "quantised" else CACHES[kind](model.config)
    expected = model(ids, use_cache=False).logits[:, -1]
    for first, last in ((0, 4), (4, 11)):
        model(ids[:, first:last], past_key_values=cache)
    model(draw(2, 3), past_key_values=cache)
    cache.crop(-3)
    for layer in cache.layers if kind == "quantised" else ():
        layer.cumulative_length -= 3
    torch.testing.assert_close(model(ids[:, -1:], past_key_values=cache).logits[:, 0], expected, atol=1e-4, rtol=1e-4)


def test_transformers_keeps_its_own_class_of_layers():
    """A class that says which layers of a model it is for is registered, and so would be what comes of it."""

    class Special(cache_utils.DynamicLayer):
        _layer_type = "special"

    try:
        layer = Special()
        cache_layer.append_beside(layer, torch.zeros(1, 2, 3))
        assert type(layer) is not Special
        assert isinstance(layer, Special)
        assert cache_utils.DYNAMIC_LAYER_TYPE_MAPPING["special"] is Special
    finally:
        del cache_utils.DYNAMIC_LAYER_TYPE_MAPPING["special"]


class KeysAlone(cache_utils.DynamicSlidingWindowLayer):
    """As that of a model whose values are its keys."""

    def __init__(self):
        super().__init__(sliding_window=4)

    def update(self, key_states, value_states, *arguments, **options):
        keys, _ = super().update(key_states, key_states)
        return keys, keys


def test_a_layer_that_keeps_keys_alone():
    cache = cache_utils.Cache(layer_class_to_replicate=KeysAlone)
    k, b = torch.randn(2, 1, 9, 8), torch.randn(2, 4, 9)
    for first, last in ((0, 2), (2, 3), (3, 8), (8, 9)):
        gated = GatedCache(cache, b[..., first:last])
        keys, values = gated.update(k[:, :, first:last], k[:, :, first:last], 0)
        assert keys.shape == values.shape
        assert torch.equal(gated.b, b[..., last - keys.shape[-2] : last])
        assert gated.dropped == last - keys.shape[-2]
