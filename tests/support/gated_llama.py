"""A small Llama whose gates drop pairs, and tokens for it."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from torch_sluice import gate_parameters, swap_attention


def make(spread=3.0, **options):
    """Gates whose parameters have this spread; options of ``swap_attention``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=64,
        vocab_size=50, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    swap_attention(model, **{"target_density": 0.3, "window": 2, "sinks": 4, **options})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in gate_parameters(model):
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return model


def draw(rows=1, tokens=20, seed=0):
    """int64 [rows, tokens], none of which is 0."""
    return torch.randint(1, 50, (rows, tokens), generator=torch.Generator().manual_seed(seed))
