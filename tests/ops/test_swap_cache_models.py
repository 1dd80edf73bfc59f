"""Models whose layers have a way of their own with caches: gates travel with them all the same."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from support.gated_llama import draw
from transformers import AutoModelForCausalLM

from torch_sluice import gate_parameters, swap_attention

SPECIAL = dict(vocab_size=50, initializer_range=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=0)
GENERATION = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)

NAMES = {
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **SPECIAL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    ),
    "gpt_bigcode": lambda: transformers.GPTBigCodeConfig(
        **SPECIAL, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    ),
    "falcon": lambda: transformers.FalconConfig(
        **SPECIAL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, attention_dropout=0.0
    ),
    "falcon, alibi": lambda: transformers.FalconConfig(
        **SPECIAL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, attention_dropout=0.0, alibi=True
    ),
    "jetmoe": lambda: transformers.JetMoeConfig(
        **SPECIAL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, kv_channels=8,
        intermediate_size=64, num_local_experts=2, num_experts_per_tok=2,
    ),
    "gemma3n": lambda: transformers.Gemma3nTextConfig(
        **SPECIAL, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, sliding_window=6, num_kv_shared_layers=2, vocab_size_per_layer_input=50,
        hidden_size_per_layer_input=8, laurel_rank=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
}  # fmt: skip
HOW = {"grows": {}, "beams": dict(num_beams=2), "static": dict(cache_implementation="static")}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:this attention mask is not the causal")
@pytest.mark.parametrize(
    ("name", "how"), [(n, how) for n in NAMES for how in HOW if (n, how) != ("falcon, alibi", "static")]
)
def test_models_whose_layers_have_their_own_way_with_caches(name, how):
    """Other names for it, fewer heads in it than are looked at, layers that look at the keys of another."""
    torch.manual_seed(0)
    how = HOW[how]
    model = AutoModelForCausalLM.from_config(NAMES[name]()).eval()
    ids = torch.cat((draw(tokens=12), torch.nn.functional.pad(draw(tokens=8, seed=1), (4, 0))))
    options = dict(input_ids=ids, attention_mask=(ids > 0).long(), **GENERATION)
    dense = model.generate(**options, **how)
    swap_attention(model, target_density=0.3, window=1, sinks=2)
    generator = torch.Generator().manual_seed(7)
    for parameter in gate_parameters(model):
        parameter.copy_(3 * torch.randn(parameter.shape, generator=generator))
    beams = {name: value for name, value in how.items() if name == "num_beams"}
    expected = model.generate(**options, **beams, use_cache=False)
    assert torch.equal(model.generate(**options, **how), expected)
    assert not torch.equal(dense, expected)
