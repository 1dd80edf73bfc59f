"""The sizes of an attention layer, from its attributes."""

from torch import nn

_HEADS = ("num_heads", "n_heads", "n_head", "nhead", "num_attention_heads", "heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
_WIDTHS = ("embed_dim", "n_embd", "hidden_size", "d_model", "dim")


def guess_sizes(name: str, module: nn.Module) -> tuple[int, int, int]:
    """(width of x, query heads, key heads) from the module's attributes, its config's, or its first linear layer."""
    sources = (module, getattr(module, "config", None))

    def find(names):
        for source in sources:
            for attribute in names:
                value = getattr(source, attribute, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None

    heads = find(_HEADS)
    width = next((m.in_features for m in module.modules() if isinstance(m, nn.Linear)), None) or find(_WIDTHS)
    if heads is None or width is None:
        raise ValueError(
            f"the sizes of {name or 'the model'} ({type(module).__name__}) are not to be guessed: it has none of the "
            f"attributes {', '.join(_HEADS)}, or no nn.Linear. Pass example=(inputs of the model, ...) to "
            "swap_attention, which then looks at one forward"
        )
    return width, heads, find(_KV_HEADS) or heads
