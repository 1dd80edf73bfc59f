"""Keeps the gate logits of past keys beside them in a key-value cache of any kind."""

import torch
from torch import Tensor


def _pack(b: Tensor, dtype: torch.dtype, heads: int) -> Tensor:
    """b [B, H, N] as channels [B, heads, N, c] of the given dtype, bit by bit: half precision does not round it.

    heads is H, or 1: a cache of latents has one head, which then takes b of them all.
    """
    b = b.unsqueeze(-1) if heads == b.shape[1] else b.transpose(1, 2).unsqueeze(1)
    b = b.contiguous()
    return b if b.dtype == dtype else b.view(dtype)


def _unpack(channels: Tensor, dtype: torch.dtype, heads: int) -> Tensor:
    b = channels if channels.dtype == dtype else channels.contiguous().view(dtype)
    return b.squeeze(-1) if heads == b.shape[1] else b.squeeze(1).transpose(1, 2)


class GatedCache:
    """Stands in for a layer's cache during one forward: what the layer stores gets b as extra channels of its values.

    So b goes wherever the cache takes its values: into static buffers, out of a sliding window, along when beams are
    reordered or the sequence is cropped, to another device. Everything but ``update`` is the cache's own. Of the cache
    of an encoder and decoder it is the part for self-attention, and answers what the whole does.
    """

    def __init__(self, cache, b: Tensor):
        self.layer = None  # of the cache, once it was updated
        self.dropped = 0  # keys of the text that it no longer holds: a sliding one lets go of the first
        self._whole, self._cache = cache, getattr(cache, "self_attention_cache", cache)
        self.b = b  # of the new keys; after update, of all keys that the layer is to look at

    @property
    def self_attention_cache(self):
        return self

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        layers = getattr(self._cache, "layers", ())
        layer = layers[layer_idx] if len(layers) > layer_idx else None
        if layer is not None and "Quantized" in type(layer).__name__:
            raise ValueError(
                f"the cache of layer {layer_idx} is a {type(layer).__name__}, expected one that keeps values as they "
                "are: the gate logits of past keys lie beside them"
            )
        heads = self.b.shape[1]
        if value_states.shape[1] not in (1, heads):
            raise ValueError(
                f"layer {layer_idx} keeps values of {value_states.shape[1]} heads in its cache, expected 1 or {heads}, "
                "the key heads of its gate, whose logits lie beside them"
            )
        channels = _pack(self.b.to(value_states.device), value_states.dtype, value_states.shape[1])
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
        self.layer = self._cache.layers[layer_idx] if len(getattr(self._cache, "layers", ())) > layer_idx else None
        # Others drop nothing, and on an accelerator asking for a length would wait for it.
        if getattr(self.layer, "is_sliding", False):
            self.dropped = max(0, self.layer.get_seq_length() - keys.shape[-2])
        values, channels = values.split((value_states.shape[-1], channels.shape[-1]), dim=-1)
        self.b = _unpack(channels, self.b.dtype, heads)
        return keys, values

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
        if self.dropped:
            padding = torch.where(begin > 0, begin + self.dropped, padding)
        elif n_q == n_k:
            padding = begin
        elif q_offset is not None:  # a cache longer than the text, that is empty before these queries
            padding = torch.where(q_offset == 0, begin, padding)
        self._keep_padding(padding)
        return (padding - self.dropped).expand(batch)

    def _keep_padding(self, padding: Tensor | None) -> None:
        if self.layer is not None:
            self.layer.sluice_padding = padding

    def __getattr__(self, name):
        return getattr(self._cache if hasattr(self._cache, name) else self._whole, name)
