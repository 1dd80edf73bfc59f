"""Keeps the gate logits of past keys beside them in a key-value cache of any kind."""

from typing import Any

import torch
from torch import Tensor

from torch_sluice.swap.cache_layer import append_beside, b_beside, follow, keeps_values_as_they_are

_EMPTY = "DummyLayer"  # the class by which transformers says that a layer stores nothing
_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
_WITHOUT_GATES = "it was filled without gates. Start with an empty cache after swap_attention"


def _pack(b: Tensor, dtype: torch.dtype, heads: int) -> Tensor:
    """b [B, H, N] as channels [B, heads, N, c] of the given dtype, bit by bit: half precision does not round it.

    A cache that keeps fewer heads than the gate has takes b of H / heads in each (one of latents: of them all); in one
    that keeps more, each b stands as often as its key head.
    """
    if heads > b.shape[1]:
        b = b.repeat_interleave(heads // b.shape[1], 1)
    b = b.unflatten(1, (heads, b.shape[1] // heads)).transpose(2, 3).contiguous()
    return b if b.dtype == dtype else b.view(dtype)


def _unpack(channels: Tensor, dtype: torch.dtype) -> Tensor:
    b = channels if channels.dtype == dtype else channels.contiguous().view(dtype)
    return b.transpose(2, 3).flatten(1, 2)


def _layer_without_keys():
    """A new one; None where transformers is too old to have them."""
    from transformers import cache_utils

    make = getattr(cache_utils, _EMPTY, None)
    return None if make is None else make()


class GatedCache:
    """Stands in for a layer's cache during one forward: what the layer stores gets b as extra channels of its values.

    So b goes wherever the cache takes its values: into static buffers, out of a sliding window, along when beams are
    reordered or the sequence is cropped, to another device. Layers that round what they store have b beside them, and
    so do those that store nothing, because they look at the keys of another layer (``complete``). Everything but
    ``update`` is the cache's own. Of the cache of an encoder and decoder it is the part for self-attention, and answers
    what the whole does.
    """

    def __init__(self, cache, b: Tensor):
        self.layer = None  # of the cache, once it was updated
        self.dropped = 0  # keys of the text that it no longer holds: a sliding one lets go of the first
        self._whole, self._cache = cache, getattr(cache, "self_attention_cache", cache)
        self.b = b  # of the new keys; after update, of all keys that the layer is to look at

    @property
    def self_attention_cache(self):
        return self

    def _find_layer(self, layer_idx: int):
        """The layer of the cache; None for a cache that has none."""
        layers = getattr(self._cache, "layers", None)
        if layers is None:
            return None
        make = getattr(self._cache, "layer_class_to_replicate", None)
        while make is not None and len(layers) <= layer_idx:
            layers.append(make())
        return layers[layer_idx] if len(layers) > layer_idx else None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        layer = self.layer = self._find_layer(layer_idx)
        if layer is not None and (b_beside(layer) is not None or not keeps_values_as_they_are(layer)):
            if b_beside(layer) is None and layer.get_seq_length():
                raise ValueError(f"the cache of layer {layer_idx} holds keys without gate logits: {_WITHOUT_GATES}")
            keys, values = self._cache.update(key_states, value_states, layer_idx, *args, **kwargs)
            self._put_beside(layer, keys.shape[-2])
            return keys, values
        b_heads, heads = self.b.shape[1], value_states.shape[1]
        if b_heads % heads and heads % b_heads:
            raise ValueError(
                f"layer {layer_idx} keeps values of {heads} heads in its cache, expected a divisor or a multiple of "
                f"{b_heads}, the key heads of its gate, whose logits lie beside them"
            )
        channels = _pack(self.b.to(value_states.device), value_states.dtype, heads)
        wider = torch.cat((value_states, channels), dim=-1)
        stored = getattr(layer, "values", None)
        if stored is not None and stored.dim() == 4 and stored.shape[-1] != wider.shape[-1]:
            self._make_room(layer, layer_idx, key_states, wider)
        keys, values = self._cache.update(key_states, wider, layer_idx, *args, **kwargs)
        if values.shape[-1] != wider.shape[-1]:  # this layer keeps keys alone, which are its values
            self._put_beside(layer, keys.shape[-2])
            return keys, values
        # Others drop nothing, and on an accelerator asking for a length would wait for it.
        if getattr(layer, "is_sliding", False):
            self.dropped = max(0, layer.get_seq_length() - keys.shape[-2])
        values, channels = values.split((value_states.shape[-1], channels.shape[-1]), dim=-1)
        self.b = _unpack(channels, self.b.dtype)
        return keys, values

    def _make_room(self, layer, layer_idx: int, key_states: Tensor, wider: Tensor) -> None:
        """A layer that was made ready for values without b is made anew, as long as it is empty."""
        length = layer.get_seq_length()
        reason = (
            f"the cache of layer {layer_idx} holds values of {layer.values.shape[-1]} channels, expected "
            f"{wider.shape[-1]}: {_WITHOUT_GATES}"
        )
        if isinstance(length, Tensor) and torch.compiler.is_compiling():
            torch._assert_async(length == 0, reason)
        elif length:
            raise ValueError(reason)
        layer.lazy_initialization(key_states, wider)

    def complete(self, n_k: int, layer_idx: int | None) -> None:
        """Behind a layer's own forward: b of all n_k keys, where it did not store any but looks at another layer's.

        Those keys are the last n_k of the text, or all of it and room for more.
        """
        layers = getattr(self._cache, "layers", None)
        if self.layer is not None or layers is None or not isinstance(layer_idx, int):
            return
        layer = layers[layer_idx] if len(layers) > layer_idx else _layer_without_keys()
        past = b_beside(layer)
        length = self.b.shape[-1] + (0 if past is None else past.shape[-1])
        stores = getattr(layer, "keys", None) is not None or type(layer).__name__ != _EMPTY
        if stores or not (torch.compiler.is_compiling() or length == self._cache.get_seq_length()):
            return  # this layer has nothing to do with what the cache holds
        while len(layers) < layer_idx:
            layers.append(_layer_without_keys())
        if len(layers) == layer_idx:
            layers.append(layer)
        self.layer = layer
        self._put_beside(layer, n_k)

    def _put_beside(self, layer, n_k: int) -> None:
        b = append_beside(layer, self.b)
        self.dropped = max(0, b.shape[-1] - n_k)
        self.b = b[..., -n_k:] if self.dropped else torch.nn.functional.pad(b, (0, n_k - b.shape[-1]))

    def text_begin(
        self, sizes: tuple[int, int, int], key_range: Tensor | None, q_offset: Tensor | None, window: int | None
    ) -> Tensor | None:
        """[B], where each text begins among the keys that the cache gave, below 0 if its first are gone; None: with the
        first valid key, the begin of key_range [B, 2].

        How much padding there was is known while some of it is held and seen, and kept with the cache's layer from then
        on. sizes: (B, Nq, Nk). q_offset: [B], as in the operator. window: that of the layer's mask, which hides the
        begin of a text from later queries.
        """
        batch, n_q, n_k = sizes
        begin = None if key_range is None else key_range[:, 0]
        hidden = window is not None and window < n_k
        if not self.dropped and not hidden:
            if window is not None or getattr(self.layer, "is_sliding", False):
                self._keep_padding(begin)
            return None
        padding = getattr(self.layer, "sluice_padding", None)
        padding = torch.zeros(batch, dtype=torch.long, device=self.b.device) if padding is None else padding
        begin = torch.zeros_like(padding) if begin is None else begin
        # Of the keys that the first query could see the mask hides some: those are padding. A text that begins before
        # them was seen to by an earlier forward.
        place = torch.full_like(begin, n_k - n_q) if q_offset is None else q_offset
        hidden_by_window = (place - (window or n_k) + 1).clamp(min=0)
        padding = torch.where((begin > hidden_by_window) | (place == 0), begin + self.dropped, padding)
        self._keep_padding(padding)
        return (padding - self.dropped).expand(batch)

    def _keep_padding(self, padding: Tensor | None) -> None:
        if self.layer is not None:
            follow(self.layer)
            self.layer.sluice_padding = padding

    def __getattr__(self, name):
        return getattr(self._cache if hasattr(self._cache, name) else self._whole, name)


def cache_among(kwargs: dict[str, Any]) -> str | None:
    """The name under which a layer's forward is given a cache that is one of transformers, or does as those do."""
    given = (name for name in _NAMES if hasattr(kwargs.get(name), "get_seq_length"))
    return next((name for name in given if hasattr(kwargs[name], "update")), None)


def with_gates(kwargs: dict[str, Any], name: str | None, b: Tensor) -> tuple[dict[str, Any], "Tensor | GatedCache"]:
    """The arguments of a layer's forward with a cache that keeps b [B, H, n], and that cache in place of b."""
    if name is None:
        return kwargs, b
    cache = GatedCache(kwargs[name], b)
    return {**kwargs, name: cache}, cache


def cross_layer(kwargs: dict[str, Any], layer_idx: int | None) -> tuple[Any, bool]:
    """The layer that keeps the keys of cross attention, in a cache of an encoder and decoder among the arguments of a
    forward, and whether it holds them; None without one, or as long as there is no such layer."""
    cache = kwargs.get(cache_among(kwargs))
    layers = getattr(getattr(cache, "cross_attention_cache", None), "layers", ())
    if not isinstance(layer_idx, int) or len(layers) <= layer_idx:
        return None, False
    return layers[layer_idx], bool(cache.is_updated.get(layer_idx))
