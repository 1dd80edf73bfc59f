"""Models whose code moves channels by their places: by fixed numbers, or by indices in buffers."""

import random

import torch
import torch.nn.functional as F
from torch import nn


class Model(nn.Module):
    """A forward over some layers and buffers; those that are called ``_..`` are not in the state_dict."""

    def __init__(self, forward, **members):
        super().__init__()
        self.run = forward
        for name, member in members.items():
            if isinstance(member, torch.Tensor):
                self.register_buffer(name, member, persistent=not name.startswith("_"))
            else:
                setattr(self, name, member)

    def forward(self, x):
        return self.run(self, x)


def shuffled(count):
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))


def image(channels=3):
    return torch.randn(2, channels, 6, 6, generator=torch.Generator().manual_seed(1))


def rows(*sizes):
    return torch.randn(*(sizes or (4,)), 20, generator=torch.Generator().manual_seed(1))


def dense(width=32, reads=None, **members):
    """Rows through two layers with something between them."""

    def build(move):
        def forward(self, x):
            return self.last(move(self, self.first(x).relu()))

        return Model(forward, first=nn.Linear(20, width), last=nn.Linear(reads or width, 7), **members)

    return lambda move: (lambda: build(move), rows())


def spatial(width=24, reads=None, **members):
    """The same with images."""

    def build(move):
        def forward(self, x):
            return self.last(move(self, self.first(x).relu()))

        layers = {"first": nn.Conv2d(3, width, 3, padding=1), "last": nn.Conv2d(reads or width, 7, 1)}
        return Model(forward, **layers, **members)

    return lambda move: (lambda: build(move), image())


def norm(width=24):
    return nn.BatchNorm2d(width)


# name -> (maker of (build, inputs), what is done between the layers, {layer: (units, channels of each)})
CASES = {
    "roll": (dense(), lambda m, h: h.roll(5, -1), {"first": (32, 1)}),
    "roll between norms": (
        spatial(before=norm(), after=norm()),
        lambda m, h: m.after(m.before(h).roll(-5, 1)),
        {"first": (24, 1)},
    ),
    "roll under a layer norm": (
        dense(norm=nn.LayerNorm(32)), lambda m, h: m.norm(h.roll(5, -1)), {"first": (32, 1)},
    ),
    "roll of channels and positions": (spatial(), lambda m, h: h.roll((3, 1), (1, 2)), {"first": (24, 1)}),
    "roll under a group norm": (
        spatial(norm=nn.GroupNorm(4, 24)), lambda m, h: m.norm(h.roll(5, 1)), {"first": (4, 6)},
    ),
    "roll before depth-wise": (
        spatial(deep=nn.Conv2d(24, 24, 3, groups=24, padding=1)), lambda m, h: m.deep(h.roll(5, 1)),
        {"first": (24, 1)},
    ),
    "roll before groups": (
        spatial(16, groups=nn.Conv2d(16, 16, 1, groups=4)), lambda m, h: m.groups(h.roll(5, 1)),
        {"first": (4, 4), "groups": (4, 4)},
    ),
    "roll in a residual": (
        spatial(branch=nn.Conv2d(24, 24, 3, padding=1), norm=norm()),
        lambda m, h: h + m.norm(m.branch(h.roll(3, 1))),
        {"first": (24, 1)},
    ),
    "roll of a residual": (
        spatial(branch=nn.Conv2d(24, 24, 3, padding=1), norm=norm()),
        lambda m, h: h + m.norm(m.branch(h)).roll(3, 1),
        {"first": (24, 1)},
    ),
    "roll by half, onto itself": (dense(24), lambda m, h: h + h.roll(h.shape[1] // 2, 1), {"first": (12, 2)}),
    "roll beside itself": (dense(16, 32), lambda m, h: torch.cat([h, h.roll(3, 1)], 1), {"first": (16, 1)}),
    "roll of both": (
        dense(16, 32), lambda m, h: torch.cat([h, h.roll(3, 1)], 1).roll(5, 1), {"first": (16, 1)},
    ),
    "roll, then a flat image": (
        dense(16, 16 * 6),
        lambda m, h: h.unsqueeze(2).expand(-1, -1, 6).roll(3, 1).flatten(1),
        {"first": (16, 1)},
    ),
    "roll by slices": (dense(), lambda m, h: torch.cat([h[:, 5:], h[:, :5]], 1), {"first": (32, 1)}),
    "flip": (spatial(norm=norm()), lambda m, h: m.norm(h.flip(1)), {"first": (24, 1)}),
    "flip onto itself": (dense(), lambda m, h: h + h.flip(1), {"first": (16, 2)}),
    "every other": (dense(32, 16), lambda m, h: h[:, ::2], {"first": (16, 2)}),
    "every third": (dense(32, 11), lambda m, h: h[:, ::3], {"first": (10, 3)}),
    "every other of a roll": (dense(32, 16), lambda m, h: h.roll(3, 1)[:, ::2], {"first": (16, 2)}),
    "every other beside the others": (
        spatial(norm=norm()), lambda m, h: m.norm(torch.cat([h[:, ::2], h[:, 1::2]], 1)), {"first": (24, 1)},
    ),
    "every other, onto the others": (dense(32, 16), lambda m, h: h[:, ::2] + h[:, 1::2], {"first": (16, 2)}),
    "two readers": (
        dense(32, 16, other=nn.Linear(16, 16)), lambda m, h: h[:, ::2] + m.other(h[:, 1::2]), {"first": (16, 2)},
    ),
    "buffer": (spatial(norm=norm(), order=shuffled(24)), lambda m, h: m.norm(h[:, m.order]), {"first": (24, 1)}),
    "buffer that is not saved": (dense(_order=shuffled(32)), lambda m, h: h[:, m._order], {"first": (32, 1)}),
    "buffer of int32": (dense(order=shuffled(32).int()), lambda m, h: h[:, m.order], {"first": (32, 1)}),
    "index_select": (dense(order=shuffled(32)), lambda m, h: h.index_select(1, m.order), {"first": (32, 1)}),
    "gather": (
        spatial(order=shuffled(24)),
        lambda m, h: h.gather(1, m.order[None, :, None, None].expand(len(h), -1, 6, 6)),
        {"first": (24, 1)},
    ),
    "take_along_dim": (
        dense(order=shuffled(32)), lambda m, h: torch.take_along_dim(h, m.order[None], 1), {"first": (32, 1)},
    ),
    "buffer and its inverse": (
        dense(order=shuffled(32), inverse=shuffled(32).argsort(), scale=torch.rand(32)),
        lambda m, h: h + (h[:, m.order] * m.scale)[:, m.inverse],
        {"first": (32, 1)},
    ),
    "buffer, inverted in the code": (
        dense(order=shuffled(32), other=nn.Linear(32, 32)),
        lambda m, h: h + m.other(h[:, m.order])[:, m.order.argsort()],
        {"first": (32, 1)},
    ),
    "buffer of two dimensions": (
        dense(32, 8, order=shuffled(32).view(4, 8)), lambda m, h: h[:, m.order].sum(1), {"first": (4, 8)},
    ),
    "buffer that leaves some out": (
        dense(32, 16, order=shuffled(32)[:16]), lambda m, h: h[:, m.order], {"first": (16, 2)},
    ),
    "buffer that repeats": (
        dense(16, 32, order=torch.cat([shuffled(16), shuffled(16).flip(0)])), lambda m, h: h[:, m.order],
        {"first": (16, 1)},
    ),
    "buffer in rings": (
        dense(order=torch.arange(32).view(8, 4).roll(1, 1).flatten()), lambda m, h: h + h[:, m.order],
        {"first": (8, 4)},
    ),
    "two buffers in a residual": (
        dense(order=shuffled(32), other=shuffled(32).flip(0), branch=nn.Linear(32, 32)),
        lambda m, h: h[:, m.other] + m.branch(h)[:, m.order],
        {"first": (32, 1)},
    ),
    "buffer between rolls": (
        dense(order=shuffled(32)), lambda m, h: h.roll(3, 1)[:, m.order].roll(5, 1), {"first": (32, 1)},
    ),
    "buffer over a weight": (
        dense(order=shuffled(32), weight=nn.Parameter(torch.randn(32, 32))),
        lambda m, h: F.linear(h, m.weight[:, m.order]),
        {"first": (32, 1), "weight": (32, 1)},
    ),
    "order that the code computes": (
        dense(), lambda m, h: h[:, torch.arange(h.shape[1] - 1, -1, -1)], {"first": (32, 1)},
    ),
    "quarters that move along another dimension": (
        dense(),
        lambda m, h: torch.cat([part.roll(place, 0) for place, part in enumerate(
            (h[:, : h.shape[1] // 4], h[:, h.shape[1] // 4 : h.shape[1] // 2], h[:, h.shape[1] // 2 :]))], 1),
        {"first": (8, 4)},
    ),
    "slices of fixed size": (
        dense(32, 16, other=nn.Linear(24, 16), narrow=nn.Linear(8, 16)),
        lambda m, h: m.narrow(h[:, :8]) + m.other(h[:, 8:]),
        {"first": (24, 1), "other": (16, 1)},
    ),
}  # fmt: skip

# name -> (maker, what is done, the operator that the note has to name)
REFUSED = {
    "roll onto itself": (dense(), lambda m, h: h + h.roll(5, 1), "aten::roll moves its channels by 5"),
    "roll by a fixed half, onto itself": (
        dense(24), lambda m, h: h + h.roll(12, 1), "aten::roll moves its channels by 12",
    ),
    "numbers in the code": (dense(), lambda m, h: h[:, [*range(16, 32), *range(16)]], "aten::index takes its channels"),
    "tensor that is no buffer": (
        dense(hidden=[shuffled(32)]), lambda m, h: h[:, m.hidden[0]], "aten::index takes its channels",
    ),
    "buffer that the code changes": (
        dense(order=shuffled(32)), lambda m, h: h[:, (m.order + 1) % 32], "aten::index takes its channels",
    ),
    "slices that a layer of fixed size reads": (
        dense(16, 8), lambda m, h: h[:, 2:10], "aten::slice takes 2:10 of its channels",
    ),
}  # fmt: skip


class Random(nn.Module):
    """Layers between which channels are moved in ways drawn by ``seed``."""

    def __init__(self, seed: int, images: bool):
        super().__init__()
        self._draw, self._images = random.Random(seed), images
        self.layers, self.norms, self.steps = nn.ModuleList(), nn.ModuleList(), []
        width = self._layer(self.steps, 3 if images else 20, self._draw.choice([12, 16, 18]))
        for _ in range(self._draw.randint(2, 4)):
            width = self._some(self.steps, width)
            if self._draw.random() < 0.3:
                inner = []
                inside = self._layer(inner, self._some(inner, width), width)
                self.steps.append(("residual", inner))
                assert inside == width
            else:
                width = self._layer(self.steps, width, self._draw.choice([12, 16, 18]))
        self._layer(self.steps, self._some(self.steps, width), 5)

    def _layer(self, steps, width, out):
        layer = nn.Conv2d(width, out, 1) if self._images else nn.Linear(width, out)
        self.layers.append(layer)
        steps.append(("layer", len(self.layers) - 1))
        return out

    def _some(self, steps, width):
        """Adds moves; returns the new width."""
        for _ in range(self._draw.randint(1, 3)):
            kind = self._draw.choice(["roll", "flip", "order", "inverse", "norm", "apart", "beside", "swap", "every"])
            place = self._draw.randint(2, width - 2)
            if kind in ("order", "inverse"):
                order = list(range(width))
                self._draw.shuffle(order)
                name = f"order{sum(1 for _ in self.buffers())}"
                self.register_buffer(name, torch.tensor(order))
                steps.append((kind, name))
            elif kind == "norm":
                self.norms.append(nn.BatchNorm2d(width) if self._images else nn.BatchNorm1d(width))
                self.norms[-1].running_mean.uniform_(-1, 1)
                steps.append((kind, len(self.norms) - 1))
            elif kind == "every" and width % 4:
                continue
            else:
                steps.append((kind, place))
                width = width * 2 if kind == "beside" else width // 2 if kind == "every" else width
        return width

    def forward(self, x):
        return self._run(self.steps, x)

    def _run(self, steps, h):
        for kind, what in steps:
            if kind == "layer":
                h = self.layers[what](h)
                h = h if what == len(self.layers) - 1 else F.leaky_relu(h)
            elif kind == "residual":
                h = h + self._run(what, h)
            elif kind == "norm":
                h = self.norms[what](h)
            elif kind == "roll":
                h = h.roll(what, 1)
            elif kind == "flip":
                h = h.flip(1)
            elif kind == "order":
                h = h[:, getattr(self, what)]
            elif kind == "inverse":
                h = h.index_select(1, getattr(self, what).argsort())
            elif kind == "apart":
                h = torch.cat([h[:, ::2], h[:, 1::2]], 1)
            elif kind == "beside":
                h = torch.cat([h, h.roll(what, 1)], 1)
            elif kind == "swap":
                h = torch.cat([h[:, what:], h[:, :what]], 1)
            elif kind == "every":
                h = h[:, ::2]
        return h
