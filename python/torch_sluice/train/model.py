"""The model of the main job: a stock transformers Llama over bytes, small, randomly initialised."""

import torch

from torch_sluice.train.errors import TrainError
from torch_sluice.train.settings import Settings

VOCABULARY = 256


def build_model(settings: Settings) -> torch.nn.Module:
    """The dense model, with PyTorch's scaled_dot_product_attention. The seed alone decides its weights."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise TrainError("'torch-sluice train' needs transformers: pip install 'torch-sluice[train]'") from error
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.width,
        intermediate_size=settings.feedforward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        # The usual .02 suits widths of thousands; at this one it leaves attention flat for the first hundred steps.
        initializer_range=settings.width**-0.5,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    random_state = torch.get_rng_state()
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(config)
    torch.set_rng_state(random_state)
    return model


def predict(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, N, 256] of the next byte after each of tokens [B, N]."""
    return model(input_ids=tokens).logits
