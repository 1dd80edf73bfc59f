"""Decoding with a paged KV cache: ``python -m benchmarks.kv_cache``.

One query a sequence against ``--n-k`` keys. First time and bandwidth: ``torch_sluice.gated_attention_paged`` against
``gated_attention`` of the same keys in a dense tensor ("contiguous"), and ``F.scaled_dot_product_attention`` of all
pairs. Gates are standard normal, and the threshold of each head keeps the wanted share of its keys. ``ratio`` is
seconds of SDPA / seconds of the paged operator, ``ratio_contiguous`` the same of "contiguous". ``bandwidth_share`` is
the bytes that must be read (kept rows of k and v, all of b) / seconds, over the rate at which ``torch.sum`` reads k and
v in the same rounds ("read").

Then what eviction keeps and costs, of gates that go in stretches, as a text's interest does: rows "evict" have the
bytes that a sequence holds, and the error of out relative to that of the whole cache. ``budget`` null: by the gate
alone, which is exact. ``peer_error`` is the error when the oldest blocks go instead.
"""

import math

import torch
import torch.nn.functional as F

import torch_sluice
from benchmarks import harness

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PEERS = ("contiguous", "sdpa", "read")
STRETCH = 64  # tokens of a stretch of like interest
SINKS, WINDOW = 4, 64


class Case:
    """A cache that is filled, one query a sequence, and the same keys side by side."""

    def __init__(self, options, dtype: str, batch: int, stretches: bool = False):
        self.options, self.dtype, self.batch = options, dtype, batch
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        heads, n_k, width = options.kv_heads, options.n_k, options.head_dim
        self.q = normal(batch, options.heads, 1, width).to(DTYPES[dtype])
        self.k, self.v = (normal(batch, heads, n_k, width).to(DTYPES[dtype]) for _ in range(2))
        self.a, self.b = normal(batch, options.heads, 1), normal(batch, heads, n_k)
        if stretches:
            interest = normal(batch, 1, -(-n_k // STRETCH)).repeat_interleave(STRETCH, 2)
            self.b = self.b / 2 + 3 * interest[:, :, :n_k]
        blocks = batch * -(-n_k // options.block_size)
        self.cache = torch_sluice.KVCache(blocks, options.block_size, heads, width, dtype=DTYPES[dtype])
        if options.shuffle:
            order = torch.randperm(blocks, generator=generator).tolist()
            self.cache._free = order
        self.sequences = [self.cache.allocate() for _ in range(batch)]
        step = 8 * options.block_size
        for begin in range(0, n_k, step):  # sequences grow in turn, so that their blocks lie among each other's
            tokens = slice(begin, begin + step)
            for entry, sequence in enumerate(self.sequences):
                one = slice(entry, entry + 1)
                self.cache.append(sequence, self.k[one, :, tokens], self.v[one, :, tokens], self.b[one, :, tokens])
        self.scale = 1 / math.sqrt(width)

    def find_threshold(self, density: float):
        """([B, Hq] logit_tau that keeps this share of the keys, or None; the share that it does keep)."""
        if density == 1:
            return None, 1.0
        group = self.options.heads // self.options.kv_heads
        z = self.a + self.b.repeat_interleave(group, 1)
        rank = max(1, round((1 - density) * self.options.n_k))
        threshold = z.kthvalue(rank).values
        return threshold, (z >= threshold[..., None]).double().mean().item()

    def run_paged(self, logit_tau=None, window=0, sinks=0):
        cache = self.cache
        table, lengths = cache.block_table(self.sequences), cache.seqlens_k(self.sequences)
        inputs = (self.q, cache.k_cache, cache.v_cache, self.a, cache.b_cache, table, lengths, logit_tau)
        options = (None, None, None, True, window, sinks, 0, 0.0, self.scale)
        return torch.ops.sluice.gated_attention_paged(*inputs, *options)[0]

    def run_contiguous(self, logit_tau=None):
        options = (*[None] * 7, True, 0, 0, 0, 0.0, 0.0, self.scale)
        return torch.ops.sluice.gated_attention(self.q, self.k, self.v, self.a, self.b, logit_tau, *options)[0]

    def run_sdpa(self):
        grouped = self.options.heads != self.options.kv_heads
        return F.scaled_dot_product_attention(self.q, self.k, self.v, enable_gqa=grouped)

    def read(self):
        return self.k.sum(), self.v.sum()

    def row_bytes(self) -> int:
        """Of a key and its value, for all key heads."""
        return 2 * self.options.kv_heads * self.options.head_dim * self.k.element_size()

    def held_bytes(self) -> int:
        """Of the blocks that sequences have."""
        held = self.cache.num_blocks - self.cache.free_blocks
        return held * self.options.block_size * (self.row_bytes() + 4 * self.options.kv_heads)


def describe(case: Case) -> dict:
    options = case.options
    return {
        "dtype": case.dtype, "batch": case.batch, "n_k": options.n_k, "heads": options.heads,
        "kv_heads": options.kv_heads, "head_dim": options.head_dim, "block_size": options.block_size,
        "shuffled": options.shuffle,
    }  # fmt: skip


def measure_decode(case: Case, density: float, machine: dict) -> dict:
    """Times one density and makes its row."""
    logit_tau, achieved = case.find_threshold(density)
    calls = {
        "sluice": lambda: case.run_paged(logit_tau), "contiguous": lambda: case.run_contiguous(logit_tau),
        "sdpa": case.run_sdpa, "read": case.read,
    }  # fmt: skip
    timings = harness.time_interleaved(calls, case.options.repeats)
    keys = case.batch * case.options.n_k
    needed = keys * (achieved * case.row_bytes() + 4 * case.options.kv_heads)
    bandwidth = keys * case.row_bytes() / timings.seconds("read")
    return {
        "operation": "decode", **describe(case), "density": density, "achieved_density": round(achieved, 4),
        "seconds": timings.seconds("sluice"), "peers": {name: timings.seconds(name) for name in PEERS},
        "ratio": timings.ratio("sdpa", "sluice"), "ratio_contiguous": timings.ratio("contiguous", "sluice"),
        "bandwidth": bandwidth,
        "bandwidth_share": timings.ratio("read", "sluice") * needed / (keys * case.row_bytes()),
        "cache_bytes": case.held_bytes(), **machine,
    }  # fmt: skip


def relative_error(found, wanted) -> float:
    difference = (found - wanted).double().square().sum() / wanted.double().square().sum()
    return difference.sqrt().item()


def attend_to_newest(case: Case, blocks: int, logit_tau, window: int, sinks: int):
    """What is left to attend to if the oldest blocks go, but for the one with the sinks."""
    size, n_k = case.options.block_size, case.options.n_k
    column = torch.arange(n_k) // size
    mask = (column == 0) | (column > column[-1] - (blocks - 1))
    options = (None, None, None, mask.view(1, 1, 1, n_k), *[None] * 3, True, window, sinks, 0, 0.0, 0.0, case.scale)
    return torch.ops.sluice.gated_attention(case.q, case.k, case.v, case.a, case.b, logit_tau, *options)[0]


def measure_eviction(options, dtype: str, batch: int, budget: float | None, machine: dict) -> dict:
    """Evicts from a fresh cache and makes the row; budget: the share of the blocks that may stay."""
    case = Case(options, dtype, batch, stretches=True)
    near = dict(window=min(WINDOW, options.n_k // 8), sinks=SINKS)
    logit_tau = torch.zeros(batch, options.heads)
    whole = case.run_paged(logit_tau, **near)
    columns = -(-options.n_k // options.block_size)
    least = 2 + -(-near["window"] // options.block_size) + -(-SINKS // options.block_size)
    blocks = None if budget is None else max(round(budget * columns), least)
    case.cache.evict(tau=0.5, a_max=case.a.max().item(), **near, budget=blocks)
    timings = harness.time_interleaved({"sluice": lambda: case.run_paged(logit_tau, **near)}, options.repeats)
    newest = None if blocks is None else attend_to_newest(case, blocks, logit_tau, **near)
    return {
        "operation": "evict", **describe(case), "budget": budget,
        "relative_error": relative_error(case.run_paged(logit_tau, **near), whole),
        "peer_error": None if newest is None else relative_error(newest, whole),
        "seconds": timings.seconds("sluice"), "peers": {}, "ratio": None, "cache_bytes": case.held_bytes(),
        "bytes_before": case.cache.num_blocks * options.block_size * (case.row_bytes() + 4 * options.kv_heads),
        **machine,
    }  # fmt: skip


def parse_options(arguments=None):
    parser = harness.make_parser(__doc__.splitlines()[0])
    parser.add_argument("--n-k", type=int, default=32768, help="keys of a sequence")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="sequences")
    parser.add_argument("--density", type=float, nargs="+", default=[1, 0.5, 0.1], help="kept keys")
    parser.add_argument("--budget", type=float, nargs="*", default=[0.5, 0.25, 0.1], help="blocks that may stay")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--heads", type=int, default=8, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a block")
    parser.add_argument("--shuffle", action="store_true", help="blocks in random order, as after long use")
    options = parser.parse_args(arguments)
    for name, shares in (("density", options.density), ("budget", options.budget)):
        for share in shares:
            if not 0 < share <= 1:
                parser.error(f"--{name} is {share}, expected a share above 0 and at most 1")
    if options.heads % options.kv_heads:
        parser.error(f"--heads is {options.heads}, expected a multiple of --kv-heads, {options.kv_heads}")
    if options.quick:
        options.n_k, options.repeats = min(options.n_k, 2048), min(options.repeats, 3)
        options.batch, options.dtype = [min(options.batch)], options.dtype[:1]
    return options


def print_tables(decode: list[dict], evict: list[dict], options) -> None:
    shape = (
        f"n_k={options.n_k} H={options.heads}/{options.kv_heads} D={options.head_dim}, blocks of {options.block_size}"
    )
    seconds = harness.format_seconds
    harness.print_rows(
        f"decoding, {shape}; ratio = sdpa / sluice",
        decode,
        {
            "dtype": lambda row: row["dtype"],
            "batch": lambda row: str(row["batch"]),
            "density": lambda row: f"{row['achieved_density']:.3f}",
            "sluice": lambda row: seconds(row["seconds"]),
            **{name: (lambda row, name=name: seconds(row["peers"][name])) for name in PEERS},
            "ratio": lambda row: f"{row['ratio']:.2f}",
            "to contiguous": lambda row: f"{row['ratio_contiguous']:.2f}",
            "of bandwidth": lambda row: f"{row['bandwidth_share']:.0%}",
            "cache": lambda row: f"{row['cache_bytes'] / 2**20:.1f} MiB",
        },
    )
    harness.print_rows(
        f"eviction, {shape}; error of out, relative",
        evict,
        {
            "dtype": lambda row: row["dtype"],
            "batch": lambda row: str(row["batch"]),
            "budget": lambda row: "by the gate" if row["budget"] is None else f"{row['budget']:g}",
            "kept": lambda row: f"{row['cache_bytes'] / row['bytes_before']:.1%}",
            "error": lambda row: f"{row['relative_error']:.2g}",
            "oldest first": lambda row: "-" if row["peer_error"] is None else f"{row['peer_error']:.2g}",
            "sluice": lambda row: seconds(row["seconds"]),
        },
    )


def main(arguments=None) -> None:
    options = parse_options(arguments)
    machine = harness.describe_machine(options.threads)
    harness.print_machine(machine)
    decode, evict = [], []
    shapes = [(dtype, batch) for dtype in options.dtype for batch in options.batch]
    for dtype, batch in harness.track(shapes, lambda shape: f"decode {shape[0]} batch {shape[1]}"):
        case = Case(options, dtype, batch)
        decode += [measure_decode(case, density, machine) for density in options.density]
    smallest = (options.dtype[0], options.batch[0])
    for budget in harness.track([None, *options.budget], lambda budget: f"evict, budget {budget}"):
        evict.append(measure_eviction(options, *smallest, budget, machine))
    print_tables(decode, evict, options)
    harness.write_json(options.json, decode + evict)


if __name__ == "__main__":
    main()
