"""Small models that move their channels in the ways in which models do: where a rule about layers would go wrong."""

import torch
import torch.nn.functional as F
from torch import nn


class Shuffle(nn.Module):
    """ShuffleNet's: channels of four groups are interleaved."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.first(x).relu()
        n, c, h, w = x.shape
        x = x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.second(x).relu().mean((2, 3)))


class FusedHeads(nn.Module):
    """Attention whose one projection gives q, k and v in some order of (3, heads, head_dim)."""

    def __init__(self, order="heads first", heads=4, head_dim=8):
        super().__init__()
        self.order, self.heads = order, heads
        self.embed, self.norm = nn.Linear(10, 32), nn.LayerNorm(32)
        self.qkv, self.proj = nn.Linear(32, 3 * heads * head_dim), nn.Linear(heads * head_dim, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.embed(x)
        b, n, _ = x.shape
        y = self.qkv(self.norm(x))
        if self.order == "heads first":
            q, k, v = y.reshape(b, n, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        elif self.order == "three first":
            q, k, v = y.reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = y.reshape(b, n, -1, self.heads, 3).permute(4, 0, 3, 1, 2)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        return self.head(x + self.proj(y))


class SharedKeys(nn.Module):
    """Two query heads for each of two key heads, in one projection in which each group has its keys behind it."""

    def __init__(self):
        super().__init__()
        self.groups, self.share = 2, 2
        self.embed, self.qkv = nn.Linear(10, 32), nn.Linear(32, 2 * (2 + 2) * 8)
        self.proj, self.head = nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, x):
        x = self.embed(x)
        b, n, _ = x.shape
        y = self.qkv(x).view(b, n, self.groups, self.share + 2, 8)
        q, k, v = y.split([self.share, 1, 1], 3)
        q, k, v = q.flatten(2, 3), *(t.expand(-1, -1, -1, self.share, -1).flatten(2, 3) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
        return self.head(x + self.proj(y.transpose(1, 2).flatten(2)))


class Halves(nn.Module):
    """A gated MLP whose one projection gives both halves."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.up, self.down = kind, nn.Linear(20, 128), nn.Linear(64, 6)

    def forward(self, x):
        y = self.up(x)
        if self.kind == "glu":
            return self.down(F.glu(y, -1))
        if self.kind == "split":
            gate, value = y.split(y.shape[-1] // 2, -1)
        else:
            gate, value = y.chunk(2, -1)
        return self.down(F.silu(gate) * value)


class Moves(nn.Module):
    """Channels of one layer are moved before the next reads them."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.first, self.second = kind, nn.Linear(20, 32), nn.Linear(32, 7)
        self.register_buffer("order", torch.randperm(32))

    def forward(self, x):
        y = self.first(x).relu()
        if self.kind == "roll":
            y = y.roll(5, -1)
        elif self.kind == "flip":
            y = y.flip(-1)
        elif self.kind == "buffer":
            y = y[..., self.order]
        elif self.kind == "swap":
            y = torch.cat(y.chunk(2, -1)[::-1], -1)
        return self.second(y)


class Flattened(nn.Module):
    """Channels come last before the image is flattened."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Linear(32 * 64, 7)

    def forward(self, x):
        return self.second(self.first(x).relu().permute(0, 2, 3, 1).flatten(1))


class Cell(nn.Module):
    """An LSTMCell in a loop."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(12, 32), nn.Linear(32, 4)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0])


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.layers = getattr(nn, kind)(12, 32, 2, batch_first=True, **options)
        self.head = nn.Linear(64 if options.get("bidirectional") else options.get("proj_size", 32), 4)

    def forward(self, x):
        return self.head(self.layers(x)[0][:, -1])


class LowRank(nn.Linear):
    """A LoRA layer before training: its second matrix is 0."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, 4, bias=False), nn.Linear(4, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class Functional(nn.Module):
    """The embedding's weight is the head's, in a call of its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden = nn.Embedding(50, 32), nn.Linear(32, 48)
        self.back = nn.Linear(48, 32)

    def forward(self, ids):
        return F.linear(self.back(self.hidden(self.embed(ids)).relu()), self.embed.weight)


class Squeezed(nn.Module):
    """Squeeze-and-excitation, and a softmax over channels."""

    def __init__(self):
        super().__init__()
        self.first, self.down, self.up = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.second, self.head = nn.Conv2d(32, 16, 1), nn.Linear(16, 3)

    def forward(self, x):
        x = self.first(x).relu()
        x = x * self.up(self.down(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        return self.head(self.second(x).amax((2, 3)).softmax(-1))


class Width(nn.Module):
    """The width is written into the code, where no size tells that it changes what is computed."""

    def __init__(self):
        super().__init__()
        self.width, self.first, self.second = 32, nn.Linear(20, 32), nn.Linear(32, 5)

    def forward(self, x):
        return self.second(self.first(x).relu() * self.width**-0.5)


class RootMeanSquare(nn.Module):
    """An RMS norm as libraries write it; with ``plus_one`` its weight is 1 more than its parameter, as Gemma's."""

    def __init__(self, width, plus_one=False):
        super().__init__()
        self.plus_one = plus_one
        self.weight = nn.Parameter(torch.randn(width) * 0.1 if plus_one else torch.rand(width) + 0.5)

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (1 + self.weight if self.plus_one else self.weight)


class Normed(nn.Module):
    """A residual stream under RMS norms."""

    def __init__(self, plus_one=False):
        super().__init__()
        self.embed, self.norm = nn.Linear(10, 32), RootMeanSquare(32, plus_one)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.last, self.head = RootMeanSquare(32, plus_one), nn.Linear(32, 5)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.down(self.up(self.norm(x)).relu())
        return self.head(self.last(x))


def image():
    return torch.randn(2, 3, 8, 8)


def rows():
    return torch.randn(4, 20)


def sequence(width=10):
    return torch.randn(2, 6, width)


def low_rank():
    return nn.Sequential(LowRank(20, 64), nn.ReLU(), LowRank(64, 8))


# name -> (model, inputs, {layer: (units, channels of each)}), or None where a note has to say why nothing is pruned
MOVES = {
    "shuffle": (Shuffle, image, {"first": (8, 4), "second": (16, 1)}),
    **{
        f"fused, {order}": (
            lambda order=order: FusedHeads(order), sequence, {"embed": (32, 1), "qkv heads": (4, 24)},
        )
        for order in ("heads first", "three first", "three last")
    },
    "shared keys": (SharedKeys, sequence, {"embed": (32, 1), "qkv heads": (2, 32)}),
    **{kind: (lambda kind=kind: Halves(kind), rows, {"up": (64, 2)}) for kind in ("glu", "chunk", "split")},
    "flip": (lambda: Moves("flip"), rows, {"first": (32, 1)}),
    "swap": (lambda: Moves("swap"), rows, {"first": (16, 2)}),
    "roll": (lambda: Moves("roll"), rows, {"first": (32, 1)}),
    "order in a buffer": (lambda: Moves("buffer"), rows, {"first": (32, 1)}),
    "flattened": (Flattened, image, {"first": (32, 1)}),
    "cell": (Cell, lambda: sequence(12), {"cell.weight_ih": (32, 4)}),
    "lstm": (lambda: Recurrent("LSTM"), lambda: sequence(12), {"layers.weight_ih_l0": (32, 4)}),
    "projected": (
        lambda: Recurrent("LSTM", proj_size=24), lambda: sequence(12), {"layers.weight_ih_l0": (32, 4)},
    ),
    "gru": (
        lambda: Recurrent("GRU", bidirectional=True), lambda: sequence(12), {"layers.weight_ih_l0": (32, 3)},
    ),
    "rnn": (lambda: Recurrent("RNN"), lambda: sequence(12), {"layers.weight_ih_l0": (32, 1)}),
    "low rank": (low_rank, rows, {"0": (64, 1), "0.down": (4, 1), "2.down": (4, 1)}),
    "functional": (Functional, lambda: torch.randint(0, 50, (2, 6)), {"embed": (32, 1), "hidden": (48, 1)}),
    "squeezed": (Squeezed, image, {"first": (32, 1), "down": (8, 1), "second": (16, 1)}),
    "width in code": (Width, rows, {"first": (32, 1)}),
    **{
        f"root mean square, {plus}": (
            lambda plus=plus: Normed(plus == "plus one"), sequence, {"embed": (32, 1), "up": (64, 1)},
        )
        for plus in ("plain", "plus one")
    },
}  # fmt: skip
