"""nn.MultiheadAttention after pruning: with fewer heads than torch's own class allows for its width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SlicedMultiheadAttention(nn.MultiheadAttention):
    """As ``nn.MultiheadAttention``, with ``num_heads`` heads of ``head_dim`` channels whatever ``embed_dim`` is.

    A layer becomes one by ``layer.__class__ = SlicedMultiheadAttention``; arguments and results are its parent's.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._split(x) for x in self._project(query, key, value))
        bias = self._bias(q, k, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask is None with is_causal=True, expected the causal mask that is_causal describes")
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            weights = torch.softmax(scores if bias is None else scores + bias, -1)
            weights = F.dropout(weights, dropout)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out, weights = F.scaled_dot_product_attention(q, k, v, bias, dropout), None
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self._packed():
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _packed(self) -> bool:
        return self.in_proj_weight is not None

    def _split(self, x: Tensor) -> Tensor:
        """[batch, tokens, heads * head_dim] -> [batch, heads, tokens, head_dim]"""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _bias(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
        """What is added to the scores [batch, heads, queries, keys]."""
        bias = None
        for mask, shape in ((key_padding_mask, (len(q), 1, 1, k.shape[2])), (attn_mask, None)):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
            if shape is None:
                shape = (1, 1, *mask.shape) if mask.dim() == 2 else (len(q), -1, *mask.shape[1:])
            mask = mask.reshape(shape)
            bias = mask if bias is None else bias + mask
        return bias


def head_sizes(module: nn.MultiheadAttention) -> dict[str, int]:
    """The sizes that go with the parameters of a layer that was cut.

    Raises:
        ValueError: the layer has biases for keys and values, or adds a key of zeros.
    """
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        raise ValueError("bias_k, bias_v or add_zero_attn is set, expected an nn.MultiheadAttention without them")
    if module.in_proj_weight is not None:
        inner, width = module.in_proj_weight.shape[0] // 3, module.in_proj_weight.shape[1]
        keys, values = width, width
    else:
        (inner, width), keys, values = (
            module.q_proj_weight.shape, module.k_proj_weight.shape[1], module.v_proj_weight.shape[1]
        )  # fmt: skip
    sizes = {"embed_dim": width, "kdim": keys, "vdim": values, "num_heads": inner // module.head_dim}
    # torch's fused layers read the projections themselves where this is set.
    return {**sizes, "_qkv_same_embed_dim": False}
