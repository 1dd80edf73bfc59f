"""Draws random calls of gated attention: dense, packed and paged ones, with all that may be said at a call."""

import math
import random
import zlib
from typing import Any, NamedTuple

import torch

LAYOUTS = ("plain", "heads inside", "expanded batch", "cut out", "shifted", "strided")
_PAIRS = 1 << 21  # at most, of a call: the formula is dense
_PAGED_OPTIONS = ("attn_mask", "alibi_slopes", "softcap", "sliding_window", "window", "sinks", "scale", "tau", "causal")


class Choices:
    """What a call is. Each choice has a name, is a function of seed and name alone, and may be pinned by its name."""

    def __init__(self, seed: int, pins: dict[str, Any]):
        self.seed, self.pins, self.made = seed, pins, {}

    def random(self, name: str) -> random.Random:
        return random.Random(zlib.crc32(f"{self.seed} {name}".encode()))

    def generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.random(name).randrange(1 << 30))

    def one(self, name: str, options: tuple) -> Any:
        value = self.pins[name] if name in self.pins else self.random(name).choice(options)
        self.made[name] = value
        return value

    def sometimes(self, name: str, share: float, options: tuple) -> Any:
        """One of options in that share of the calls, else None."""
        drawn = self.random(f"{name}?").random() < share
        value = self.pins[name] if name in self.pins else (self.random(name).choice(options) if drawn else None)
        if value is not None:
            self.made[name] = value
        return value


class Drawn(NamedTuple):
    """A call: what is differentiated is q, k, v, a, b, and what the options have of an output gate and a mask."""

    kind: str  # "dense", "packed", "paged"
    inputs: tuple  # q, k, v, a, b, each [B, H, N, ...]; packed: B is 1, and N the tokens of all sequences
    dout: torch.Tensor
    options: dict  # of gated_attention and of the formula
    lengths: list | None  # packed: (queries, keys) of each sequence; paged: keys of each sequence
    block_size: int  # paged
    holes: bool  # paged: blocks may be dropped
    choices: Choices


def _sizes(c: Choices) -> dict[str, int]:
    """Small sizes mostly, on both sides of what kernels take at once; now and then large ones."""
    heads_kv = c.one("heads_kv", (1, 1, 2, 3))
    sizes = dict(
        batch=c.one("batch", (1, 1, 2, 3)), heads_kv=heads_kv, heads=heads_kv * c.one("group", (1, 1, 2, 3, 7)),
        n_q=c.one("n_q", (0, 1, 1, 2, 3, 7, 8, 9, 16, 17, 31, 64, 65, 130, 300)),
        n_k=c.one("n_k", (0, 1, 2, 5, 8, 15, 16, 33, 64, 70, 129, 257, 513, 1100)),
        head_dim=c.one("head_dim", (1, 3, 8, 16, 31, 32, 40, 64, 64, 96, 128, 256)),
    )  # fmt: skip
    sizes["head_dim_v"] = c.sometimes("head_dim_v", 0.3, (1, 5, 16, 24, 64, 80, 256)) or sizes["head_dim"]
    if c.one("square", (True, True, False, False, False)):
        sizes["n_k"] = sizes["n_q"]
    while sizes["batch"] * sizes["heads"] * sizes["n_q"] * sizes["n_k"] > _PAIRS:
        sizes["heads"], sizes["heads_kv"], sizes["batch"] = heads_kv, heads_kv, 1
        sizes["n_q"] //= 2
    return sizes


def _options(c: Choices, batch: int, heads: int, n_q: int, n_k: int, head_dim_v: int) -> dict[str, Any]:
    options = dict(causal=c.one("causal", (True, True, True, False, False)))
    tau = c.sometimes("tau", 0.9, (0.0, 0.3, 0.5, 0.7, 0.9, 0.9999, "heads", "batch and heads"))
    if isinstance(tau, str):
        shape = (heads,) if tau == "heads" else (batch, heads)
        tau = torch.rand(shape, generator=c.generator("tau")) * 0.99
    numbers = dict(
        tau=tau,
        window=c.sometimes("window", 0.5, (1, 2, 5, 16, 17, 64, 2000)),
        sinks=c.sometimes("sinks", 0.4, (1, 2, 4, 17, 2000)),
        scale=c.sometimes("scale", 0.2, (0.01, 0.3, 1.0, -0.2)),
        sliding_window=c.sometimes("sliding_window", 0.2, (1, 2, 9, 64, 5000)),
        softcap=c.sometimes("softcap", 0.15, (0.3, 5.0, 50.0)),
        mode=c.sometimes("mode", 0.35, ("post", "log")),
    )
    options |= {name: number for name, number in numbers.items() if number is not None}
    draw = c.random("places")
    if c.sometimes("key_range", 0.35, (True,)):
        options["key_range"] = torch.tensor(
            [sorted((draw.randint(0, n_k), draw.randint(0, n_k))) for _ in range(batch)]
        ).view(batch, 2)
    if n_k >= n_q and c.sometimes("q_offset", 0.35, (True,)):
        options["q_offset"] = torch.tensor([draw.randint(0, n_k - n_q) for _ in range(batch)])
    if c.sometimes("alibi_slopes", 0.15, (True,)):
        slopes = torch.rand(heads, generator=c.generator("alibi_slopes"))
        options["alibi_slopes"] = slopes if draw.random() < 0.5 else slopes.expand(batch, heads)
    if c.sometimes("output_gate", 0.15, (True,)):
        shape = (batch, heads, n_q, draw.choice((1, head_dim_v)))
        options["output_gate"] = torch.randn(shape, generator=c.generator("output_gate"))
    dtype = c.sometimes("attn_mask", 0.3, (torch.bool, torch.float32, torch.bfloat16, torch.float16, torch.float64))
    if dtype is not None:
        options["attn_mask"] = draw_mask(c, (batch, heads, n_q, n_k), dtype)
    if c.sometimes("text_begin", 0.25, (True,)):
        begins = options["key_range"][:, 0].tolist() if "key_range" in options else [0] * batch
        options["text_begin"] = torch.tensor([begin - draw.choice((0, 1, 3, 100)) for begin in begins])
    return options


def draw_mask(c: Choices, shape: tuple, dtype: torch.dtype) -> torch.Tensor:
    """Booleans or numbers, with holes or without, broadcast over some dimensions, maybe transposed in memory."""
    draw, generator = c.random("attn_mask shape"), c.generator("attn_mask")
    shape = [1 if draw.random() < 0.35 else size for size in shape]
    seen = torch.rand(shape, generator=generator) < draw.choice((1.0, 0.8, 0.2))
    mask = seen if dtype == torch.bool else torch.randn(shape, generator=generator).masked_fill(~seen, -math.inf)
    mask = mask.to(dtype)
    return mask.mT.contiguous().mT if draw.random() < 0.3 else mask


def _tensor(c: Choices, name: str, shape: tuple, dtype: torch.dtype, spread: float = 1.0) -> torch.Tensor:
    """Normal entries in one of the layouts that a model may hand over."""
    generator = c.generator(name)

    def normal(*sizes):
        return (torch.randn(*sizes, generator=generator) * spread).to(dtype)

    layout, (batch, heads, length, *rest) = c.one(f"layout of {name}", LAYOUTS), shape
    if layout == "heads inside":
        return normal(batch, length, heads, *rest).transpose(1, 2)
    if layout == "expanded batch":
        return normal(1, heads, length, *rest).expand(shape)
    if layout == "cut out":
        return normal(batch, heads + 1, length + 3, *rest)[:, 1:, 2 : length + 2]
    if layout == "shifted":  # one element from where an allocation begins: aligned to nothing
        whole = normal(batch * heads * length * (rest[0] if rest else 1) + 1)
        return whole[1:].view(shape)
    if layout == "strided" and rest:
        return normal(batch, heads, length, 2 * rest[0])[..., ::2]
    return normal(*shape)


def draw_call(seed: int, **pins: Any) -> Drawn:
    """The call of a seed, of which some choices are pinned."""
    c = Choices(seed, pins)
    kind = c.one("kind", ("dense", "dense", "dense", "packed", "paged"))
    sizes, lengths, block_size = _sizes(c), None, 1
    dtype = c.one("dtype", (torch.float32, torch.float32, torch.bfloat16, torch.float16))
    draw = c.random("lengths")
    if kind == "packed":
        sizes["batch"], count = 1, c.one("sequences", (0, 1, 2, 3, 5))
        longest_q, longest_k = max(1, sizes["n_q"]), max(1, sizes["n_k"])
        lengths = []
        for _ in range(count):
            n = draw.choice((0, 1, longest_q // 2, draw.randint(0, longest_q)))
            other = n if sizes["n_q"] == sizes["n_k"] else draw.choice((0, 1, draw.randint(0, longest_k)))
            lengths.append((n, max(n, other)))
            if draw.random() < 0.3:
                lengths.append(lengths[-1])
        sizes["n_q"], sizes["n_k"] = sum(n for n, _ in lengths), sum(n for _, n in lengths)
    if kind == "paged":
        block_size = c.one("block_size", (1, 2, 3, 8, 16, 33))
        sizes["n_k"] = max(1, sizes["n_k"])
        lengths = [draw.choice((sizes["n_k"], draw.randint(0, sizes["n_k"]))) for _ in range(sizes["batch"])]
        sizes["n_k"] = -(-max(lengths, default=1) // block_size) * block_size or block_size
        sizes["n_q"] = max(1, sizes["n_q"])
    texts = len(lengths) if kind == "packed" else sizes["batch"]
    options = _options(c, texts, sizes["heads"], sizes["n_q"], sizes["n_k"], sizes["head_dim_v"])
    if options.get("mode") == "log":
        options.setdefault("tau", 0.0)  # or the operator finds one by itself
    if kind == "packed":
        for name in ("key_range", "q_offset", "text_begin", "attn_mask"):
            options.pop(name, None)
        if "output_gate" in options:
            shape = (1, sizes["heads"], sizes["n_q"], options["output_gate"].shape[3])
            options["output_gate"] = torch.randn(shape, generator=c.generator("output_gate"))
    if kind == "paged":
        options = {name: value for name, value in options.items() if name in _PAGED_OPTIONS}
        if c.sometimes("q_offset", 0.35, (True,)):
            options["q_offset"] = torch.tensor([draw.randint(-sizes["n_q"], max(0, n - 1)) for n in lengths])
    queries = (sizes["batch"], sizes["heads"], sizes["n_q"])
    keys = (sizes["batch"], sizes["heads_kv"], sizes["n_k"])
    spread = c.one("spread", (1.0, 1.0, 1.0, 0.0, 3.0))
    inputs = (
        _tensor(c, "q", (*queries, sizes["head_dim"]), dtype, spread),
        _tensor(c, "k", (*keys, sizes["head_dim"]), dtype, spread),
        _tensor(c, "v", (*keys, sizes["head_dim_v"]), dtype),
        *(
            _tensor(c, name, shape, torch.float32, c.one(f"spread of {name}", (0.0, 1.0, 3.0, 30.0)))
            for name, shape in (("a", queries), ("b", keys))
        ),
    )
    dout = _tensor(c, "dout", (*queries, sizes["head_dim_v"]), dtype)
    holes = bool(c.sometimes("holes", 0.4, (True,)))
    return Drawn(kind, inputs, dout, options, lengths, block_size, holes, c)
