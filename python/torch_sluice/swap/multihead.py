"""nn.MultiheadAttention by the operator: a subclass that a swapped module is turned into, and back."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_sluice.attention import Gate
from torch_sluice.swap.call import GateOptions, attend_gated, attend_open
from torch_sluice.swap.masks import as_bool_mask


def _keep(mask: Tensor) -> Tensor:
    """The module's masks say True (or -inf) where *not* to look; this one where to. A bias stays a bias."""
    if mask.dtype == torch.bool:
        return ~mask
    keep = as_bool_mask(mask)
    return mask if keep is None else keep


def _join(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    if first.dtype == second.dtype == torch.bool:
        return first & second
    biases = (
        torch.zeros(m.shape, device=m.device).masked_fill(~m, -torch.inf) if m.dtype == torch.bool else m
        for m in (first, second)
    )
    return sum(biases)


class SluiceMultiheadAttention(nn.MultiheadAttention):
    """An nn.MultiheadAttention after ``swap_attention``: same parameters, same call.

    With open gates, what the operator does not take (weights, dropout, biases as masks) goes the old way. With a gate
    that learns, the weights are ``softmax * gate`` and are computed densely beside the output, so pass
    ``need_weights=False`` where they are not needed.
    """

    # Set by swap_attention; made as an instance of the parent, so there is no __init__.
    sluice_gate: Gate | None
    sluice_options: GateOptions

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        gate = self.sluice_gate
        dropout = self.dropout if self.training else 0.0
        old_way = dict(
            key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
            average_attn_weights=average_attn_weights, is_causal=is_causal,
        )  # fmt: skip
        if gate is None and (need_weights or dropout or query.is_nested):
            return super().forward(query, key, value, **old_way)
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError("query, key or value is a nested tensor, expected dense ones with a key_padding_mask")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is True and attn_mask is None, expected the causal mask that it is a hint for")

        batched = query.dim() == 3
        if batched and not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        elif not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = self._project(query, key, value)
        mask, causal = self._mask(attn_mask, key_padding_mask, is_causal, batched)

        weights = None
        if gate is None:
            out = attend_open(q, k, v, mask=mask, causal=causal, scale=None)
            if out is None:
                arguments = (query, key, value)
                if batched and not self.batch_first:
                    arguments = tuple(x.transpose(0, 1) for x in arguments)
                elif not batched:
                    arguments = tuple(x.squeeze(0) for x in arguments)
                    old_way["key_padding_mask"] = None if key_padding_mask is None else key_padding_mask.squeeze(0)
                return super().forward(*arguments, **old_way)
        else:
            out, weights = attend_gated(
                gate, gate(query, key), self.sluice_options, q, k, v, mask=mask, causal=causal, dropout=dropout
            )
            if need_weights:
                weights = weights()
                weights = weights.mean(dim=1) if average_attn_weights else weights
                weights = weights if batched else weights.squeeze(0)
            else:
                weights = None
        out = self.out_proj(out.transpose(1, 2).flatten(-2))
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return out, weights

    def _project(self, *inputs: Tensor) -> list[Tensor]:
        """query, key and value [B, N, channels] -> q, k, v [B, heads, N, head_dim]."""
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        ]

    def _mask(self, attn_mask, key_padding_mask, is_causal, batched) -> tuple[Tensor | None, bool]:
        """The two masks as one that broadcasts to [B, heads, Nq, Nk], True where to look; and whether it is causal."""
        if is_causal and key_padding_mask is None:
            return None, True  # the hint is trusted, as the parent trusts it
        if attn_mask is not None:
            attn_mask = _keep(attn_mask)
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
            else:
                attn_mask = attn_mask[None, None]
        if key_padding_mask is not None:
            key_padding_mask = _keep(key_padding_mask)[:, None, None, :]
        return _join(attn_mask, key_padding_mask), is_causal


def why_not(module: nn.MultiheadAttention) -> str | None:
    """What keeps this module from being swapped, if anything."""
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds keys of its own (add_bias_kv or add_zero_attn)"
    return None


def make_gate(module: nn.MultiheadAttention, **arguments) -> Gate:
    if module.kdim != module.embed_dim:
        raise ValueError(
            f"an nn.MultiheadAttention has kdim = {module.kdim}, expected embed_dim = {module.embed_dim}: the gate "
            "reads queries and keys by one width"
        )
    return Gate(module.embed_dim, module.num_heads, **arguments)


def _no_fast_path(module, args):
    """A forward pre-hook that only exists: nn.TransformerEncoderLayer bypasses self_attn unless it sees one."""
