"""Keeps the gate logits of past keys beside them in a key-value cache of any kind."""

import torch
from torch import Tensor


def _pack(b: Tensor, dtype: torch.dtype) -> Tensor:
    """b [B, H, N] as channels [B, H, N, c] of the given dtype, bit by bit: a half-precision cache does not round it."""
    b = b.contiguous().unsqueeze(-1)
    return b if b.dtype == dtype else b.view(dtype)


def _unpack(channels: Tensor, dtype: torch.dtype) -> Tensor:
    return (channels if channels.dtype == dtype else channels.contiguous().view(dtype)).squeeze(-1)


class GatedCache:
    """Stands in for a layer's cache during one forward: what the layer stores gets b as extra channels of its values.

    So b goes wherever the cache takes its values: into static buffers, out of a sliding window, along when beams are
    reordered or the sequence is cropped, to another device. Everything but ``update`` is the cache's own.
    """

    def __init__(self, cache, b: Tensor):
        self._cache = cache
        self.b = b  # of the new keys; after update, of all keys that the layer is to look at

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        layers = getattr(self._cache, "layers", ())
        layer = layers[layer_idx] if len(layers) > layer_idx else None
        if layer is not None and "Quantized" in type(layer).__name__:
            raise ValueError(
                f"the cache of layer {layer_idx} is a {type(layer).__name__}, expected one that keeps values as they "
                "are: the gate logits of past keys lie beside them"
            )
        channels = _pack(self.b.to(value_states.device), value_states.dtype)
        width = value_states.shape[-1] + channels.shape[-1]
        stored = getattr(layer, "values", None)
        if stored is not None and stored.dim() == 4 and stored.shape[-1] != width:
            raise ValueError(
                f"the cache of layer {layer_idx} holds values of {stored.shape[-1]} channels, expected {width}: it was "
                "filled without gates. Start with an empty cache after swap_attention"
            )
        keys, values = self._cache.update(
            key_states, torch.cat((value_states, channels), dim=-1), layer_idx, *args, **kwargs
        )
        values, channels = values.split((value_states.shape[-1], channels.shape[-1]), dim=-1)
        self.b = _unpack(channels, self.b.dtype)
        return keys, values

    def __getattr__(self, name):
        return getattr(self._cache, name)
