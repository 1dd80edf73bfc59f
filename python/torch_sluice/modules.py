"""``torch_sluice.GatedAttention``: gated sparse attention as a layer."""

from torch import Tensor, nn

from torch_sluice.attention import Gate, attend


class GatedAttention(nn.Module):
    """Multi-head self-attention whose learned gate picks the pairs of tokens that are worth computing.

    ``softmax(QK^T / sqrt(d)) * sigmoid(W_g [q; k]) V`` of Gated Sparse Attention. W_g is linear, so it splits into one
    number per query and one per key, a_i and b_j, here linear in the layer's input x: see
    :class:`torch_sluice.attention.Gate`. Pairs with ``sigmoid(a_i + b_j) < tau`` are not computed; see
    :func:`torch_sluice.gated_attention` for the formula.

    Args:
        dim: channels of x.
        heads: query heads; must divide dim.
        kv_heads: key and value heads, a divisor of heads; default heads.
        causal: tokens see themselves and the past only.
        tau: gate below which a pair is dropped, in [0, 1). 0 computes every pair: the formula above to the letter.
        window: the last ``window`` keys of each query are kept and not gated.
        sinks: nor are the first ``sinks`` keys of each sequence, behind its padding.
        opening: gate of every pair at the start, in (0, 1).
        target_density: share in (0, 1] of the pairs to which ``torch_sluice.attention.DensityController(model,
            steps=...)`` drives the gate; None: the controller is told, or there is none.
        bias: whether the projection to q, k, v has a bias.
        out_proj: whether a linear layer over the heads follows.
        device, dtype: of the projections; the gate's parameters are float32 (float64 with float64).

    Shapes: x [B, N, dim] -> [B, N, dim], in the dtype of x.
    """

    def __init__(
        self, dim: int, heads: int = 8, *, kv_heads: int | None = None, causal: bool = False, tau: float = 0.5,
        window: int = 0, sinks: int = 0, opening: float = 0.95, target_density: float | None = None, bias: bool = True,
        out_proj: bool = False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if heads < 1 or dim < 1 or dim % heads:
            raise ValueError(f"dim is {dim} and heads is {heads}, expected positive numbers of which heads divides dim")
        self.gate = Gate(dim, heads, kv_heads, tau=tau, opening=opening, target_density=target_density, device=device)
        if dtype is not None and dtype.itemsize == 8:
            self.gate.to(dtype)
        self.dim, self.heads, self.kv_heads = dim, heads, self.gate.kv_heads
        self.causal, self.window, self.sinks = causal, window, sinks
        self.head_dim = dim // heads
        self.to_qkv = nn.Linear(dim, sum(self._widths()), bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(dim, dim, device=device, dtype=dtype) if out_proj else nn.Identity()

    def _widths(self) -> list[int]:
        return [self.heads * self.head_dim] + 2 * [self.kv_heads * self.head_dim]

    def forward(self, x: Tensor, key_range: Tensor | None = None) -> Tensor:
        """x [B, N, dim]; key_range [B, 2] int64, begin and end of the tokens that are not padding (default: all)."""
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {list(x.shape)}, expected [batch, tokens, {self.dim}]")
        q, k, v = self.to_qkv(x).split(self._widths(), dim=-1)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        out = attend(
            self.gate, x, q, k, v, causal=self.causal, window=self.window, sinks=self.sinks, key_range=key_range
        )
        return self.out_proj(out.transpose(1, 2).flatten(-2))

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, causal={self.causal}, "
            f"window={self.window}, sinks={self.sinks}"
        )
