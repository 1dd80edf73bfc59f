"""The zoo's models of torch's own layers: convolutions, recurrence, attention and gates, written as users do."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import zoo_torch_images as images


def _inputs(*shape: int, integers: int = 0) -> Callable[[nn.Module, int, int, bool], Tensor]:
    """Draws one tensor of [rows, *shape], of ids below ``integers`` or of normal numbers."""

    def draw(model: nn.Module, rows: int, seed: int, padded: bool) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if integers:
            return torch.randint(integers, (rows, *shape), generator=generator)
        return torch.randn(rows, *shape, generator=generator)

    return draw


class Recurrent(nn.Module):
    """A speaker's encoder: frames through recurrent layers, the last state made a unit vector."""

    def __init__(self, kind: type[nn.RNNBase], bidirectional: bool = False):
        super().__init__()
        self.layers = kind(40, 64, 2, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(64 * (1 + bidirectional), 48)

    def forward(self, frames):
        states, _ = self.layers(frames)
        return functional.normalize(self.head(states[:, -1]).relu(), dim=1)


class Cells(nn.Module):
    """A recurrent cell in a loop."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(24, 64), nn.Linear(64, 8)

    def forward(self, frames):
        state = None
        for frame in frames.unbind(1):
            state = self.cell(frame, state)
        return self.head(state[0])


class Seq2Seq(nn.Module):
    """nn.Transformer between two embeddings."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(100, 64), nn.Embedding(100, 64)
        self.transformer = nn.Transformer(64, 4, 2, 2, 128, 0.0, batch_first=True)
        self.head = nn.Linear(64, 100)

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(6)
        return self.head(self.transformer(self.source(ids), self.target(ids[:, :6]), tgt_mask=mask))


class Attending(nn.Module):
    """nn.MultiheadAttention called as a layer, on itself and on another sequence."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(20, 64), nn.LayerNorm(64)
        self.own = nn.MultiheadAttention(64, 4, batch_first=True)
        self.other = nn.MultiheadAttention(64, 4, kdim=20, vdim=20, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        y = self.embed(x)
        y = y + self.own(y, y, y, need_weights=False)[0]
        return self.head(self.norm(y + self.other(y, x, x)[0]).mean(1))


class Gated(nn.Module):
    """A gated MLP: its two halves by ``chunk``, ``glu`` or two layers."""

    def __init__(self, split: str):
        super().__init__()
        self.split, self.first, self.norm = split, nn.Linear(32, 64), nn.LayerNorm(64)
        self.up, self.down, self.head = nn.Linear(64, 256), nn.Linear(128, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = self.first(x)
        y = self.up(self.norm(x))
        if self.split == "glu":
            y = functional.glu(y, -1)
        elif self.split == "chunk":
            gate, value = y.chunk(2, -1)
            y = functional.gelu(gate) * value
        else:
            value, gate = y.split([128, 128], -1)
            y = functional.silu(gate) * value
        return self.head(x + self.down(y))


class Causal(nn.Module):
    """A language model whose head is its embedding, read by a functional call."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(200, 64), nn.LayerNorm(64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, ids):
        x = self.embedding(ids).to(self.mlp[0].weight.dtype)
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, 4, 16).permute(2, 0, 3, 1, 4)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return functional.linear(x + self.mlp(x), self.embedding.weight)


class Shared(nn.Module):
    """One block that is run three times."""

    def __init__(self):
        super().__init__()
        self.first, self.block, self.head = nn.Linear(20, 64), nn.Linear(64, 64), nn.Linear(64, 6)

    def forward(self, x):
        x = self.first(x)
        for _ in range(3):
            x = x + self.block(x.relu())
        return self.head(x)


class Functional(nn.Module):
    """Weights of layers and bare parameters used by functional calls."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(24, 96), nn.Parameter(torch.rand(96) + 0.5)
        self.weight = nn.Parameter(torch.randn(64, 96) / math.sqrt(96))
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        y = functional.linear(x, self.layer.weight, self.layer.bias).relu() * self.scale
        return self.head((y @ self.weight.t()).relu())


class LowRank(nn.Linear):
    """A linear layer with a low-rank term, as adapters are."""

    def __init__(self, inputs, outputs, rank=4):
        super().__init__(inputs, outputs)
        self.down = nn.Parameter(torch.randn(rank, inputs) / math.sqrt(inputs))
        self.up = nn.Parameter(torch.randn(outputs, rank) / math.sqrt(rank))

    def forward(self, x):
        return super().forward(x) + functional.linear(functional.linear(x, self.down), self.up)


class Recommender(nn.Module):
    """Embedding bags, a bilinear layer and an MLP."""

    def __init__(self):
        super().__init__()
        self.user, self.items = nn.Embedding(100, 32), nn.EmbeddingBag(100, 32, mode="mean")
        self.cross = nn.Bilinear(32, 32, 32)
        self.mlp = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 1))

    def forward(self, ids):
        user, items = self.user(ids[:, 0]), self.items(ids[:, 1:])
        return self.mlp(torch.cat([user, items, self.cross(user, items)], 1))


def _mlp(*widths: int, activation: type[nn.Module] = nn.ReLU, layer: type[nn.Linear] = nn.Linear) -> nn.Module:
    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [layer(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def _parametrized(kind: str) -> nn.Module:
    model = _mlp(20, 96, 96, 6)
    if kind == "weight norm":
        nn.utils.parametrizations.weight_norm(model[2])
    else:
        nn.utils.parametrizations.spectral_norm(model[2])
    return model


def _token_norm() -> nn.Module:
    """Batch norm over tokens behind a linear layer."""
    return nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(64, 10))


def _conv1d(recurrent: bool) -> nn.Module:
    """Samples of sound through convolutions."""

    class Sound(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv1d(1, 32, 16, 8), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 64, 8, 4), nn.GroupNorm(8, 64),
                nn.GELU(), nn.Conv1d(64, 64, 3, padding=2, dilation=2, groups=4), nn.PReLU(64),
            )  # fmt: skip
            self.gru = nn.GRU(64, 32, batch_first=True) if recurrent else None
            self.head = nn.Linear(32 if recurrent else 64, 12)

        def forward(self, samples):
            y = self.layers(samples)
            return self.head(self.gru(y.transpose(1, 2))[0][:, -1] if recurrent else y.mean(-1))

    return Sound()


def _encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True, norm_first=norm_first)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(24, 64), body, nn.Linear(64, 8))


def _own(name: str) -> Callable[[], tuple[nn.Module, Callable]]:
    """A model of the test suite, whose helpers say how it is called."""

    def make():
        from tests.support import compress_models

        model, _ = compress_models.make(name)

        def draw(model, rows, seed, padded):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                drawn = [compress_models.MODELS[name][1]() for _ in range(rows)]  # of two or three rows each
            if isinstance(drawn[0], dict):
                return {key: torch.cat([inputs[key] for inputs in drawn])[:rows] for key in drawn[0]}
            return torch.cat(drawn)[:rows]

        return model, draw

    return make


def _entry(build: Callable[[], nn.Module], draw: Callable[..., Any]) -> Callable[[], tuple[nn.Module, Callable]]:
    def make():
        model = build().eval()
        images.enliven_batch_norms(model)
        return model, draw

    return make


_IMAGE = _inputs(3, 32, 32)
MODELS: dict[str, Callable[[], tuple[nn.Module, Callable]]] = {
    **{f"tests: {name}": _own(name) for name in
       ("mlp", "convolutions", "encoder", "gated", "bert", "llama", "gated llama")},
    "MLP": _entry(lambda: _mlp(64, 256, 256, 10), _inputs(64)),
    "MLP, deep, GELU": _entry(lambda: _mlp(20, 96, 96, 96, 96, 6, activation=nn.GELU), _inputs(20)),
    "MLP, low rank": _entry(lambda: _mlp(20, 96, 96, 6, layer=LowRank), _inputs(20)),
    "MLP, weight norm": _entry(lambda: _parametrized("weight norm"), _inputs(20)),
    "MLP, spectral norm": _entry(lambda: _parametrized("spectral norm"), _inputs(20)),
    "MLP, shared block": _entry(Shared, _inputs(20)),
    "MLP, functional": _entry(Functional, _inputs(24)),
    "MLP, batch norm over tokens": _entry(_token_norm, _inputs(20, 32)),
    **{f"gated MLP, {split}": _entry(lambda split=split: Gated(split), _inputs(6, 32))
       for split in ("glu", "chunk", "split")},
    "LSTM": _entry(lambda: Recurrent(nn.LSTM), _inputs(12, 40)),
    "LSTM, both ways": _entry(lambda: Recurrent(nn.LSTM, True), _inputs(12, 40)),
    "GRU": _entry(lambda: Recurrent(nn.GRU), _inputs(12, 40)),
    "RNN": _entry(lambda: Recurrent(nn.RNN), _inputs(12, 40)),
    "LSTMCell": _entry(Cells, _inputs(6, 24)),
    "Transformer": _entry(Seq2Seq, _inputs(12, integers=100)),
    "TransformerEncoder": _entry(lambda: _encoder(False), _inputs(10, 24)),
    "TransformerEncoder, norm first": _entry(lambda: _encoder(True), _inputs(10, 24)),
    "MultiheadAttention": _entry(Attending, _inputs(10, 20)),
    "language model, tied": _entry(Causal, _inputs(12, integers=200)),
    "recommender": _entry(Recommender, _inputs(6, integers=100)),
    "sound": _entry(lambda: _conv1d(False), _inputs(1, 2000)),
    "sound, GRU": _entry(lambda: _conv1d(True), _inputs(1, 2000)),
    **{name: _entry(build, _IMAGE) for name, build in images.MODELS.items()},
}  # fmt: skip
