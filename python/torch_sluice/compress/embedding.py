"""Embeddings in 8 bits: a quarter of the bytes. Of a small language model, the table is often half."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 1 << 16  # elements of a table that is worth it


class QuantizedEmbedding(nn.Module):
    """``nn.Embedding`` of int8 with a float32 scale for each row: int [...] -> [..., embedding_dim] in ``dtype``.

    A row w becomes round(w / scale) with scale = max |w| / 127: each element is within scale / 2 of the original.
    """

    kind = "QuantizedEmbedding"

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, dtype: str = "float32", weight: Tensor | None = None
    ):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.dtype = getattr(torch, dtype)
        weight = torch.zeros(num_embeddings, embedding_dim) if weight is None else weight.detach().float()
        scale = weight.abs().amax(1) / 127
        packed = (weight / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-127, 127)
        self.register_buffer("packed", packed.to(torch.int8))
        self.register_buffer("weight_scale", scale)

    @staticmethod
    def why_not(embedding: nn.Embedding) -> str | None:
        """What this class does not take of an embedding, or None."""
        if embedding.max_norm is not None:
            return "it renormalises its rows"
        if embedding.weight.numel() < SMALLEST:
            return "its table is small"
        return None

    @classmethod
    def from_float(cls, embedding: nn.Embedding) -> "QuantizedEmbedding":
        weight = embedding.weight
        dtype = str(weight.dtype).removeprefix("torch.")
        layer = cls(embedding.num_embeddings, embedding.embedding_dim, dtype=dtype, weight=weight)
        return layer.train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.packed).to(torch.float32)
        return (rows * self.weight_scale[ids].unsqueeze(-1)).to(self.dtype)

    def config(self) -> dict:
        """What recreates the layer but its buffers, as plain values."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, "dtype": dtype}

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
