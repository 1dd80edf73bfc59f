"""Sinks are the first tokens of a text, wherever it lies in a batch: padded on the left, or packed behind another."""

import pytest
import torch
from support.attention import formula

pytest.importorskip("transformers")

from support.gated_llama import draw, make
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig, StaticCache

from torch_sluice import gate_parameters, gated_attention, restore, swap_attention
from torch_sluice.attention import kept_pairs
from torch_sluice.selection import select_logit_tau


def test_a_padded_sequence_is_the_sequence():
    torch.manual_seed(0)
    n, pad = 20, 7
    alone = [torch.randn(1, *shape) for shape in ((4, n, 8), (2, n, 8), (2, n, 8), (4, n), (2, n))]
    padded = [torch.cat((torch.randn_like(x[:, :, :pad]), x), dim=2) for x in alone]
    key_range = torch.tensor([[pad, pad + n]])
    for options in (dict(causal=True, window=2, sinks=4), dict(sinks=3), dict(causal=True, sinks=100)):
        expected = gated_attention(*alone, tau=0.6, **options)
        found = gated_attention(*padded, tau=0.6, key_range=key_range, **options)[:, :, pad:]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(expected, formula(*(x.double() for x in alone), tau=0.6, **options)[0].float())
        kept, _ = kept_pairs(*alone[3:], tau=0.6, **options)
        assert torch.equal(
            kept_pairs(padded[3][:, :, pad:], padded[4], tau=0.6, key_range=key_range, **options)[0], kept
        )
        density = dict(density=0.4, **options)
        wanted = select_logit_tau(*alone[3:], **density)
        torch.testing.assert_close(
            select_logit_tau(padded[3][:, :, pad:], padded[4], key_range=key_range, **density), wanted
        )


@torch.no_grad()
def test_a_batch_padded_on_the_left_answers_as_each_prompt_does():
    model, texts = make(), [draw(tokens=20), draw(tokens=13, seed=1)]
    alone = [model(text).logits[0] for text in texts]
    ids = torch.cat([torch.nn.functional.pad(text, (20 - text.shape[1], 0)) for text in texts])
    mask = (ids > 0).long()
    found = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    for logits, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(logits[-len(expected) :], expected, atol=1e-4, rtol=1e-4)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    together = model.generate(ids, attention_mask=mask, **options)
    for row, text in zip(together, texts, strict=True):
        assert torch.equal(row[20:], model.generate(text, **options)[0, text.shape[1] :])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:this attention mask is not the causal")
@pytest.mark.parametrize("lengths", [(20, 13), (1, 5, 30), (3, 3, 3)], ids=str)
def test_packed_documents_answer_as_each_does(lengths):
    model, texts = make(), [draw(tokens=n, seed=n + i) for i, n in enumerate(lengths)]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    found = model(torch.cat(texts, dim=1), position_ids=positions, use_cache=False).logits[0].split(list(lengths))
    for logits, text in zip(found, texts, strict=True):
        torch.testing.assert_close(logits, model(text).logits[0], atol=1e-4, rtol=1e-4)


def plain_config():
    return LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32)


def sliding(window=8):
    torch.manual_seed(0)
    config = MistralConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=64,
        vocab_size=50, initializer_range=0.3, sliding_window=window,
    )  # fmt: skip
    model = swap_attention(AutoModelForCausalLM.from_config(config).eval(), target_density=0.3, window=2, sinks=4)
    generator = torch.Generator().manual_seed(7)
    for parameter in gate_parameters(model):
        parameter.copy_(3 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:this attention mask is not the causal")
@pytest.mark.parametrize("tokens", [3, 6, 12, 20])
@pytest.mark.parametrize("padding", [0, 2, 7])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_a_cache_that_slides_takes_its_sinks_along(tokens, padding, options):
    """With and without a cache; rows of which one begins later lose their sinks later."""
    model = sliding()
    texts = [draw(tokens=tokens + padding), draw(tokens=tokens, seed=1)]
    ids = torch.cat([torch.nn.functional.pad(text, (padding + tokens - text.shape[1], 0)) for text in texts])
    shared = dict(
        attention_mask=(ids > 0).long(), max_new_tokens=14, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    found = model.generate(ids, **shared, **options)
    options = {name: value for name, value in options.items() if name != "cache_implementation"}
    assert torch.equal(found, model.generate(ids, **shared, **options, use_cache=False))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:this attention mask is not the causal")
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("cache", [DynamicCache, lambda: StaticCache(plain_config(), 64)], ids=["dynamic", "static"])
def test_a_window_over_a_cache_that_keeps_everything(cache, padding):
    """The mask hides the text's first tokens from later ones, and they are no less its first; in chunks of any size."""
    model, ids = sliding(), batch(padding, tokens=29)
    mask = ids["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(**ids, position_ids=places, use_cache=False).logits
    past, found = cache(), []
    for first, last in ((0, 9), (9, 10), (10, 15), (15, 16), (16, 29)):
        part = dict(input_ids=ids["input_ids"][:, first:last], position_ids=places[:, first:last])
        found.append(model(**part, attention_mask=mask[:, :last], past_key_values=past).logits)
    torch.testing.assert_close(torch.cat(found, dim=1)[mask > 0], expected[mask > 0], atol=1e-4, rtol=1e-4)


def compiled(model):
    """The model, of which every forward is compiled, those of the prompt too; and the list of its graphs."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    model.forward = torch.compile(model.forward, backend=count)
    return model, graphs


def batch(padding, tokens=9):
    texts = [draw(tokens=tokens), draw(tokens=tokens - padding, seed=1)]
    ids = torch.cat([torch.nn.functional.pad(text, (tokens - text.shape[1], 0)) for text in texts])
    return dict(input_ids=ids, attention_mask=(ids > 0).long())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:this attention mask is not the causal")
@pytest.mark.parametrize(
    ("make", "tokens", "padding", "beams"), [(make, 9, 4, 1), (make, 9, 4, 2), (sliding, 6, 4, 1), (sliding, 9, 2, 2)]
)
def test_a_compiled_model_with_a_static_cache_answers_as_it_does_without(make, tokens, padding, beams):
    """A cache longer than the text, and one that slides on, or is full from the first."""
    torch.compiler.reset()
    shared = dict(max_new_tokens=6, num_beams=beams, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = make().generate(**batch(padding, tokens), **shared, use_cache=False)
    model, graphs = compiled(make())
    assert torch.equal(model.generate(**batch(padding, tokens), **shared, cache_implementation="static"), expected)
    assert graphs


@torch.no_grad()
def test_decoding_compiles_once():
    torch.compiler.reset()
    model, graphs = compiled(make())
    options = dict(do_sample=False, pad_token_id=0, eos_token_id=None, cache_implementation="static")
    model.generate(**batch(4), max_new_tokens=3, **options)
    before = len(graphs)
    model.generate(**batch(4), max_new_tokens=3, **options)
    model.generate(**batch(2), max_new_tokens=3, **options)
    assert len(graphs) == before


@torch.no_grad()
def test_a_compiled_window_is_that_of_the_layer():
    """Without gates; and what is no window of the layer's is refused."""
    torch.compiler.reset()
    model, ids = restore(sliding()), batch(4, tokens=20)
    expected = model(**ids).logits
    swapped, graphs = compiled(swap_attention(model))
    torch.testing.assert_close(swapped(**ids).logits[ids["attention_mask"] > 0], expected[ids["attention_mask"] > 0])
    assert graphs
    hole = ids["attention_mask"].clone()
    hole[:, 12] = 0
    with pytest.raises(RuntimeError, match="attention mask: expected the causal or full mask or the layer's sliding"):
        swapped(ids["input_ids"], attention_mask=hole)
