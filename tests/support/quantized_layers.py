"""Layers with quantised weights of every kind, and what the tests of them share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_sluice.compress import quantize_layer
from torch_sluice.compress.quantized import QuantizedWeight


def relative_error(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


class Conv1D(nn.Module):
    """As transformers' of this name, which GPT-2 is made of: the weight is [in_features, out_features]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        out = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return out.view(*x.shape[:-1], self.nf)


class Tied(nn.Module):
    """A language model's ends: one table for lookup and product, and a norm between."""

    def __init__(self, rows=300, width=40):
        super().__init__()
        self.embed, self.hidden = nn.Embedding(rows, width), nn.Linear(width, width)
        self.head = nn.Linear(width, rows, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.hidden(self.embed(ids)).relu())


class LowRank(nn.Linear):
    """A subclass as LoRA makes them."""

    def __init__(self, inputs, outputs, rank=2):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(rank, inputs)), nn.Parameter(torch.randn(outputs, rank) * 0.1)

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


def layers():
    """(name, layer in floating point, input, options)."""
    torch.manual_seed(0)
    yield "linear", nn.Linear(20, 7), torch.randn(5, 20), {}
    yield "4 bits", nn.Linear(64, 9, bias=False), torch.randn(2, 3, 64), {"weight_bits": 4, "group_size": 32}
    yield "convolution", nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.randn(2, 4, 6, 6), {}
    yield "embedding", nn.Embedding(30, 12), torch.randint(30, (3, 4)), {}
    yield "Conv1D", Conv1D(9, 16), torch.randn(2, 3, 16), {}
    yield "subclass", LowRank(24, 10), torch.randn(4, 24), {}


NAMES = [name for name, *_ in layers()]


def quantized(name) -> tuple[nn.Module, nn.Module, Tensor]:
    """The layer of this name with a quantised weight, the original, and an input."""
    for other, layer, x, options in layers():
        if other == name:
            original = layer.requires_grad_(False)
            twin = next(layer for other, layer, *_ in layers() if other == name).requires_grad_(False)
            twin.load_state_dict(original.state_dict())
            return quantize_layer(twin, **options), original, x
    raise KeyError(name)


def tied(rows=300, width=40) -> tuple[Tied, Tied]:
    """A model whose tied table is one quantised weight, and the original."""
    torch.manual_seed(0)
    model, original = Tied(rows, width).requires_grad_(False), Tied(rows, width).requires_grad_(False)
    original.load_state_dict(model.state_dict())
    weight = nn.Parameter(QuantizedWeight.from_float(model.embed.weight, "linear"), requires_grad=False)
    model.embed.weight = model.head.weight = weight
    return model, original
