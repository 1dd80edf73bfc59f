"""Gates whose window spans all tokens gate nothing: whatever a layer is, its model answers as before."""

import pytest
import torch

from torch_sluice import gate_parameters, restore, swap_attention

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
)

IDS = torch.arange(2 * 9).view(2, 9) % 47 + 1
LEFT = torch.ones_like(IDS)
LEFT[0, :4] = 0
NEAR = dict(target_density=0.5, window=1000)
SPECIAL = dict(vocab_size=50, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def generate(model, **options):
    return model.generate(IDS, attention_mask=LEFT, max_new_tokens=4, do_sample=False, eos_token_id=None, **options)


@pytest.mark.parametrize("how", [{}, dict(num_beams=3), dict(cache_implementation="static", disable_compile=True)])
def test_latents_in_the_cache(how):
    """A cache of one head of latents keeps b of all heads."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        **SPECIAL, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=2, n_routed_experts=4, n_group=1, topk_group=1, max_position_embeddings=64,
        initializer_range=0.3,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).eval()
    expected = generate(model, **how)
    swap_attention(model, **NEAR)
    assert torch.equal(generate(model, **how), expected)
    restore(model)
    swap_attention(model, target_density=0.5, window=1, sinks=0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in gate_parameters(model):
            parameter.copy_(3 * torch.randn(parameter.shape, generator=generator))
    with_gates = generate(model, **how)
    assert not torch.equal(with_gates, expected)
    if not how:
        assert torch.equal(with_gates, generate(model, use_cache=False))


def test_a_bias_in_a_step_of_decoding():
    """One query at the end of its keys sees them all, though its layer is causal."""
    torch.manual_seed(0)
    sizes = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, initializer_factor=9.0)
    model = MT5ForConditionalGeneration(MT5Config(**SPECIAL, **sizes, decoder_start_token_id=0)).eval()

    @torch.no_grad()
    def steps():
        out = model(input_ids=IDS, decoder_input_ids=IDS[:, :3], use_cache=True)
        return model(
            input_ids=IDS, decoder_input_ids=IDS[:, 3:4], past_key_values=out.past_key_values, use_cache=True
        ).logits

    expected = steps()
    swap_attention(model, **NEAR)
    torch.testing.assert_close(steps(), expected, rtol=2e-4, atol=1e-3)  # scores of some hundreds


def test_layers_that_take_no_gate():
    """The sentence names the layer at the swap where it can be known, and at the call where not."""
    config = LlamaConfig(**SPECIAL, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config.head_dim = 264
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn \(LlamaAttention\) has 2 heads of 264 channels"):
        swap_attention(LlamaForCausalLM(config), **NEAR)
    config.head_dim = 16
    model = swap_attention(LlamaForCausalLM(config), **NEAR)
    layer = model.model.layers[0].self_attn
    forward = type(layer).forward

    class Twice(type(layer)):
        def forward(self, *args, **kwargs):
            forward(self, *args, **kwargs)
            return forward(self, *args, **kwargs)

    layer.__class__ = Twice
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.self_attn \(Twice\) asks for attention more than once in a forward"
    ):
        model(IDS)
    restore(model)
    expected = model(IDS).logits
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn \(Twice\) asks for attention more than once"):
        swap_attention(model, **NEAR, example=(IDS,))
    assert not gate_parameters(model)
    assert torch.equal(model(IDS).logits, expected)


def test_a_layer_that_cuts_its_input_up_takes_no_gate():
    """As towers for images of several sizes do; example= says so at the swap."""
    config = LlamaConfig(**SPECIAL, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval()
    layer = model.model.layers[1].self_attn
    forward = type(layer).forward

    class InPieces(type(layer)):
        def forward(self, hidden_states, **kwargs):
            pieces = hidden_states.unflatten(1, (3, 3)).flatten(0, 1)
            angles = tuple(x[:, :3] for x in kwargs["position_embeddings"])
            out = forward(self, pieces, position_embeddings=angles, attention_mask=None)
            return out[0].unflatten(0, (-1, 3)).flatten(1, 2), None

    layer.__class__ = InPieces
    message = r"model\.layers\.1\.self_attn \(InPieces\) attends from 3 to 3 tokens, and its gate saw 9 and "
    with pytest.raises(ValueError, match=message):
        swap_attention(model, **NEAR, example=(IDS,))
    swap_attention(model, **NEAR)
    with pytest.raises(ValueError, match=message):
        model(IDS)
    restore(model)
    swap_attention(model, **NEAR, example=(IDS,), modules=["model.layers.0.self_attn"])
