"""Associative recall among noise: the task, and a small model for it whose attention can be dense, windowed or gated.

A sequence of n tokens holds 8 pair tokens (a key and a value each) anywhere in its first 5/8 and 16 query tokens (a key
each) anywhere in the rest; all others are noise. At each query the value that went with its key is to be named, one of
64: guessing gives 1.6 %, naming any value of the sequence 12.5 %. Nothing says where a pair is, so no window that
leaves most of the sequence out can do it; who knows that only queries look far, and only at pairs, needs 128 pairs of
tokens of the n^2 / 2.
"""

import bisect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from torch_sluice import gated_attention
from torch_sluice.attention import Gate, attend, kept_pairs

SYMBOLS = 64  # distinct keys, values, and noise tokens
PAIRS, QUERIES = 8, 16
NOISE, PAIR, QUERY = 0, 1, 2  # roles of a token
TAU = 0.5


class Batch(NamedTuple):
    """role, key, value, noise: [B, n] int64, what each token is; place, answer: [B, QUERIES]."""

    role: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    noise: torch.Tensor
    place: torch.Tensor
    answer: torch.Tensor


def draw(count, n, generator):
    """A batch of ``count`` sequences of n >= 48 tokens."""

    def choose(total, wanted):
        return torch.rand(count, total, generator=generator).argsort(1)[:, :wanted]

    past = n * 5 // 8
    role, key, value = torch.zeros(3, count, n, dtype=torch.long)
    noise = torch.randint(0, SYMBOLS, (count, n), generator=generator)
    pair_place, place = choose(past, PAIRS), past + choose(n - past, QUERIES)
    keys = choose(SYMBOLS, PAIRS)
    values = torch.randint(0, SYMBOLS, (count, PAIRS), generator=generator)
    asked = torch.randint(0, PAIRS, (count, QUERIES), generator=generator)
    role.scatter_(1, pair_place, PAIR).scatter_(1, place, QUERY)
    key.scatter_(1, pair_place, keys).scatter_(1, place, keys.gather(1, asked))
    value.scatter_(1, pair_place, values)
    return Batch(role, key, value, noise, place, values.gather(1, asked))


def window_of(density, n):
    """The widest window that keeps at most ``density`` of the causal pairs of n tokens (at least 1)."""
    wanted = density * n * (n + 1) / 2
    return max(1, bisect.bisect_right(range(1, n + 1), wanted, key=lambda w: w * n - w * (w - 1) // 2))


def density_of_window(window, n):
    return (window * n - window * (window - 1) / 2) / (n * (n + 1) / 2)


class Attention(nn.Module):
    """Causal self-attention in one of three kinds: dense by SDPA; ``window``: the last keys only; or with a gate."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.gate, self.window = None, 0
        self.counts = None  # (kept, possible) pairs, while evaluating

    def forward(self, x):
        batch, n, _ = x.shape
        q, k, v = self.to_qkv(x).view(batch, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.gate is not None:
            logits = self.gate(x)
            if not self.training:
                kept, possible = kept_pairs(*logits, tau=TAU, causal=True, window=self.window)
                self.counts = kept.sum().item(), possible.sum().item() * self.heads
            out = attend(self.gate, None, q, k, v, causal=True, window=self.window, logits=logits)
        elif self.window:
            closed = torch.full((batch, self.heads, n), -20.0)
            out = gated_attention(q, k, v, closed, closed, tau=TAU, causal=True, window=self.window)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).flatten(-2))


class Model(nn.Module):
    """A pre-norm transformer without positions: recall goes by content."""

    def __init__(self, width=64, heads=2, layers=2):
        super().__init__()
        self.width, self.heads = width, heads
        self.role = nn.Embedding(3, width)
        self.key, self.value, self.noise = (nn.Embedding(SYMBOLS, width) for _ in range(3))
        self.attention = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.before_attention, self.before_mlp = (
            nn.ModuleList(nn.LayerNorm(width) for _ in range(layers)) for _ in range(2)
        )
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, SYMBOLS)

    def forward(self, batch):
        """Logits [B, QUERIES, SYMBOLS] of the answers."""
        role = batch.role
        x = self.role(role)
        for table, symbol, present in (
            (self.key, batch.key, role != NOISE),
            (self.value, batch.value, role == PAIR),
            (self.noise, batch.noise, role == NOISE),
        ):
            x = x + table(symbol) * present.unsqueeze(-1)
        layers = zip(self.attention, self.before_attention, self.mlp, self.before_mlp, strict=True)
        for attention, before_attention, mlp, before_mlp in layers:
            x = x + attention(before_attention(x))
            x = x + mlp(before_mlp(x))
        places = batch.place.unsqueeze(-1).expand(-1, -1, self.width)
        return self.head(self.norm(x).gather(1, places))

    def add_gates(self, window):
        for attention in self.attention:
            attention.window = window
            attention.gate = Gate(self.width, self.heads, tau=TAU)

    def cut_to_window(self, window):
        for attention in self.attention:
            attention.window = window


@torch.no_grad()
def evaluate(model, n, sequences, seed=12345):
    """Share of right answers, and density (None where nothing is gated) over the same ``sequences`` sequences."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    right = total = kept = possible = 0
    size = max(1, 4096 // n)
    for start in range(0, sequences, size):
        batch = draw(min(size, sequences - start), n, generator)
        right += (model(batch).argmax(-1) == batch.answer).sum().item()
        total += batch.answer.numel()
        for attention in model.attention:
            if attention.gate is not None:
                kept, possible = kept + attention.counts[0], possible + attention.counts[1]
    model.train()
    return right / total, kept / possible if possible else None
