"""Models of each kind, small and of random weights: open gates change nothing, and gates that close learn to."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from torch_sluice import gate_parameters, load_gates, restore, save_gates, swap_attention
from torch_sluice.attention import DensityController, Gate, parameter_groups

SPECIAL = dict(vocab_size=50, bos_token_id=0, eos_token_id=0, pad_token_id=0)
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **SPECIAL)
GROUPED = dict(**SMALL, num_key_value_heads=2, head_dim=8)
HYBRID = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(num_local_experts=2, num_experts_per_tok=2)
HALVES = dict(
    d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0.0, max_position_embeddings=64, decoder_start_token_id=1,
    forced_eos_token_id=None, **SPECIAL,
)  # fmt: skip
T5 = dict(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0, decoder_start_token_id=1, **SPECIAL)
IDS = torch.arange(3 * 20).view(3, 20) * 7 % 47 + 1
LEFT = torch.ones_like(IDS)
LEFT[0, :6] = 0


class Encoder(nn.Module):
    """torch's own layers, that tell whether a text has a token twice."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.embed, self.body, self.head = nn.Embedding(50, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 50)

    def forward(self, input_ids, attention_mask=None, labels=None):
        padding = None if attention_mask is None else attention_mask == 0
        logits = self.head(self.body(self.embed(input_ids), src_key_padding_mask=padding))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


CAUSAL = {
    "sinks": lambda: transformers.GptOssConfig(**GROUPED, **HYBRID, **EXPERTS),
    "hybrid, Gemma 3": lambda: transformers.Gemma3TextConfig(**GROUPED, **HYBRID),
    "hybrid, Qwen 3": lambda: transformers.Qwen3Config(**GROUPED, **HYBRID, use_sliding_window=True),
    "sliding": lambda: transformers.MistralConfig(**GROUPED, sliding_window=6),
    "capped, Gemma 2": lambda: transformers.Gemma2Config(**GROUPED, **HYBRID, attn_logit_softcapping=0.5),
}
HALF_AND_HALF = {
    "encoder and decoder, Bart": lambda: transformers.BartConfig(**HALVES),
    "encoder and decoder, T5": lambda: transformers.T5Config(**T5),
}


def make(name, spread=None):
    """spread: of the weights of an encoder and decoder, so large that attention decides which token comes next."""
    torch.manual_seed(0)
    if name == "nn.TransformerEncoder":
        return Encoder().eval()
    if name in CAUSAL:
        return AutoModelForCausalLM.from_config(CAUSAL[name]()).eval()
    config = HALF_AND_HALF[name]()
    if spread is not None:
        config.init_std, config.initializer_factor = spread, 10 * spread
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def inputs_of(name, padded):
    given = dict(input_ids=IDS, attention_mask=LEFT if padded else None)
    return given | (dict(decoder_input_ids=IDS[:, :9]) if name in HALF_AND_HALF else {})


def seen(name, out, padded):
    return out if name in HALF_AND_HALF or not padded else out[LEFT.bool()]


NAMES = [*CAUSAL, *HALF_AND_HALF, "nn.TransformerEncoder"]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:this attention mask is not the causal")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_open_gates_are_the_old_outputs(name, padded):
    """Without gates, and with gates of which none gates anything: all pairs are near, or their gate is 1."""
    model, inputs = make(name), inputs_of(name, padded)
    expected = seen(name, model(**inputs).logits, padded)
    found = seen(name, swap_attention(model)(**inputs).logits, padded)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    restore(model)
    swap_attention(model, target_density=0.5, window=0, sinks=0, cross=True)
    for gate in (module for module in model.modules() if isinstance(module, Gate)):
        gate.query_bias.fill_(20.0)
    found = seen(name, model(**inputs).logits, padded)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:this attention mask is not the causal")
@pytest.mark.parametrize("name", NAMES)
def test_gates_that_close_learn(name):
    """Loss and density fall together, and every gate has a part in it."""
    model = swap_attention(make(name).train(), target_density=0.3, window=1, sinks=1, cross=True)
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    before = [copy.deepcopy(gate.state_dict()) for gate in gates]
    controller = DensityController(model, steps=40, gain=1.0, ramp=0.25)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=3e-3, gate_lr=5e-2))
    losses, densities = [], []
    for _ in range(40):
        loss = model(input_ids=IDS, labels=IDS).loss
        controller.loss(loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        losses.append(loss.item())
        densities.append(controller.density)
    controller.close()
    assert losses[-1] < 0.8 * losses[0]
    assert densities[0] > 0.9
    assert densities[-1] < 0.6
    for gate, old in zip(gates, before, strict=True):
        assert not torch.equal(gate.key_weight, old["key_weight"])


def randomise(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in gate_parameters(model):
            parameter.copy_(3 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:this attention mask is not the causal")
@pytest.mark.parametrize("how", [{}, dict(num_beams=3), dict(cache_implementation="static")], ids=str)
@pytest.mark.parametrize("name", HALF_AND_HALF)
def test_cross_attention_with_gates_generates_what_it_would_without_a_cache(name, how):
    model = make(name, spread=0.3)
    options = dict(input_ids=IDS, attention_mask=LEFT, max_new_tokens=6, do_sample=False, eos_token_id=None)
    dense = model.generate(**options, **how)
    closed = dict(target_density=0.5, window=64, sinks=1)
    randomise(swap_attention(model, **closed))
    assert sum(isinstance(module, Gate) for module in model.modules()) == 2
    torch.testing.assert_close(model.generate(**options, **how), dense)  # all pairs of self attention are near
    randomise(swap_attention(restore(model), **closed, cross=True))
    assert sum(isinstance(module, Gate) for module in model.modules()) == 3
    beams = {key: value for key, value in how.items() if key == "num_beams"}
    expected = model.generate(**options, **beams, use_cache=False)
    assert torch.equal(model.generate(**options, **how), expected)
    assert not torch.equal(expected, dense)


@torch.no_grad()
def test_gates_of_cross_attention_come_back_from_a_file(tmp_path):
    pytest.importorskip("safetensors")
    name = "encoder and decoder, Bart"
    model = randomise(swap_attention(make(name), target_density=0.5, window=1, sinks=1, cross=True))
    save_gates(model, tmp_path / "gates")
    again = load_gates(make(name), tmp_path / "gates")
    assert torch.equal(again(**inputs_of(name, False)).logits, model(**inputs_of(name, False)).logits)


def test_cross_attention_that_takes_no_gate():
    name = "encoder and decoder, Bart"
    model = make(name)
    layer = model.model.decoder.layers[0].encoder_attn
    wide = nn.Linear(48, 32)
    layer.k_proj, kept = wide, layer.k_proj
    with pytest.raises(ValueError, match=r"encoder_attn \(BartAttention\) makes its queries and keys of \[32, 48\]"):
        swap_attention(model, target_density=0.5, cross=True)
    layer.k_proj = kept
    swap_attention(model, target_density=0.5, cross=True)
    with pytest.raises(
        ValueError, match=r"encoder_attn \(BartAttention\) was called without key_value_states or encoder"
    ):
        layer(torch.zeros(1, 3, 32))
