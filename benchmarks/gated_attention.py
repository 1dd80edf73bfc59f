"""Gated attention against SDPA, compiled FlexAttention and the eager formula: ``python -m benchmarks.gated_attention``.

Gates a and b are standard normal; the threshold is chosen per head so that the wanted share of the causal pairs is
kept, and the share that really is kept is printed. SDPA and FlexAttention compute plain attention over all pairs, which
is what a dense model would run; the eager formula computes the gate too. A row's ``ratio`` is seconds of the best peer
/ seconds of Sluice. FlexAttention has no backward on a CPU. A peer that did not run is null.
"""

import math
import warnings

import torch
import torch.nn.functional as F

import torch_sluice  # noqa: F401
from benchmarks import attention_profile, harness
from torch_sluice.attention.density import kept_pairs

PEERS = ("sdpa", "flex", "eager")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Case:
    """One row to measure, with its inputs."""

    def __init__(self, options, direction: str, dtype: str, n: int, density: float):
        self.direction, self.dtype, self.n, self.density = direction, dtype, n, density
        self.causal = not options.full
        generator = torch.Generator().manual_seed(0)

        def normal(heads, *shape):
            return torch.randn(options.batch, heads, n, *shape, generator=generator)

        heads, kv_heads = options.heads, options.kv_heads or options.heads
        self.grouped = kv_heads != heads
        each = (heads, kv_heads, kv_heads, heads)
        self.q, self.k, self.v, self.dout = (normal(count, options.head_dim).to(DTYPES[dtype]) for count in each)
        self.a, self.b = normal(heads), normal(kv_heads)
        self.logit_tau = None if density == 1 else self.find_threshold(density)
        self.achieved = 1.0 if density == 1 else self.density_at(self.logit_tau).mean().item()
        self.scale = 1 / math.sqrt(options.head_dim)

    def __str__(self) -> str:
        return f"{self.direction} {self.dtype} n={self.n} density {self.density:g}"

    def density_at(self, logit_tau):
        """Kept share of each head."""
        kept, possible = kept_pairs(self.a - logit_tau.unsqueeze(-1), self.b, tau=0.5, causal=self.causal)
        return kept / possible.unsqueeze(1)

    def find_threshold(self, density: float):
        """The logit_tau of each head that keeps this share, by bisection."""
        low, high = torch.full(self.a.shape[:2], -20.0), torch.full(self.a.shape[:2], 20.0)
        for _ in range(20):
            middle = (low + high) / 2
            too_many = self.density_at(middle) > density
            low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
        return high

    def run_operator(self, q, k, v, a, b):
        """out, lse, and the kept pairs of each query."""
        options = (*[None] * 7, self.causal, 0, 0, 0, 0.0, 0.0, self.scale)
        return torch.ops.sluice.gated_attention(q, k, v, a, b, self.logit_tau, *options)

    def run_sluice(self, q, k, v, a, b):
        return self.run_operator(q, k, v, a, b)[0]

    def count_needed(self) -> int:
        """Pairs that the products must go over: those that are kept. But those of queries with themselves the kernel
        takes apart, where a causal call drops others."""
        kept = int(self.run_operator(self.q, self.k, self.v, self.a, self.b)[2].sum())
        return kept - (self.a.numel() if self.causal and self.logit_tau is not None else 0)

    def run_sdpa(self, q, k, v, a, b):
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.grouped)

    def run_eager(self, q, k, v, a, b):
        if self.grouped:
            k, v, b = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v, b))
        scores = (q @ k.mT) * self.scale
        gate = a.unsqueeze(-1) + b.unsqueeze(-2)
        kept = torch.ones(self.n, self.n, dtype=torch.bool)
        if self.causal:
            scores = scores.masked_fill(~kept.tril(), -torch.inf)
        if self.logit_tau is not None:
            kept = gate >= self.logit_tau[..., None, None]
            if self.causal:
                kept |= torch.eye(self.n, dtype=torch.bool)
            scores = scores.masked_fill(~kept, -torch.inf)
        weights = scores.float().softmax(-1) * gate.sigmoid()
        return weights.nan_to_num(0.0).to(q.dtype) @ v

    def forward_of(self, function):
        """A call of the forward alone."""

        def call():
            with torch.no_grad():
                return function(self.q, self.k, self.v, self.a, self.b)

        return call

    def backward_of(self, function, gated: bool):
        """A call of the backward alone; the forward is done here, once."""
        inputs = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        gates = [x.detach().requires_grad_(gated) for x in (self.a, self.b)]
        wanted = inputs + (gates if gated else [])
        out = function(*inputs, *gates)
        return lambda: torch.autograd.grad(out, wanted, self.dout, retain_graph=True)


def fits_in_memory(case: Case, options) -> bool:
    """Whether the eager formula, with some six score matrices at a time, leaves half of the free memory free."""
    needed = 6 * 4 * options.batch * options.heads * case.n**2 * (2 if case.direction == "backward" else 1)
    try:
        with open("/proc/meminfo") as file:
            available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except OSError:
        return False
    return needed < available / 2


class Flex:
    """FlexAttention, compiled once for each shape and dtype; None where it does not compile."""

    def __init__(self):
        self._calls = {}
        self.problem = None

    def call(self, case: Case, options):
        key = case.n, case.dtype
        if key not in self._calls:
            self._calls[key] = self._compile(case, options)
        function = self._calls[key]
        return None if function is None else lambda: function(case.q, case.k, case.v)

    def _compile(self, case: Case, options):
        try:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            def causal(batch, head, query, key):
                return query >= key

            mask = create_block_mask(causal, None, None, case.n, case.n, device="cpu") if case.causal else None
            compiled = torch.compile(flex_attention, dynamic=False)

            def run(q, k, v):
                with torch.no_grad():
                    return compiled(q, k, v, block_mask=mask, scale=case.scale, enable_gqa=case.grouped)

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run(case.q, case.k, case.v)
            return run
        except Exception as error:  # whatever the compiler says: the peer is left out, and the reason printed
            self.problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            return None


def measure(case: Case, options, flex: Flex, machine: dict) -> dict:
    """Times one case and makes its row."""
    forward = case.direction == "forward"
    functions = {"sluice": case.run_sluice, "sdpa": case.run_sdpa}
    if fits_in_memory(case, options):
        functions["eager"] = case.run_eager
    if forward:
        candidates = {name: case.forward_of(function) for name, function in functions.items()}
        candidates["flex"] = None if options.no_flex else flex.call(case, options)
    else:
        candidates = {name: case.backward_of(function, name != "sdpa") for name, function in functions.items()}
    eager = candidates.pop("eager", None)
    timings = harness.time_interleaved(candidates, options.repeats)
    slow = harness.time_interleaved({"eager": eager}, 2) if eager is not None else None
    peers = {name: timings.seconds(name) if name in candidates else None for name in PEERS}
    peers["eager"] = slow.seconds("eager") if slow else None
    profile = attention_profile.measure(candidates["sluice"], case.count_needed(), options) if forward else None
    best = timings.fastest(name for name in PEERS if name in candidates)
    return {
        "pass": case.direction,
        "dtype": case.dtype,
        "causal": case.causal,
        "n": case.n,
        "density": case.density,
        "achieved_density": round(case.achieved, 4),
        "seconds": timings.seconds("sluice"),
        "peers": peers,
        "ratio": timings.ratio(best, "sluice"),
        **({"profile": profile} if options.profile else {}),
        "batch": options.batch,
        "heads": options.heads,
        "kv_heads": options.kv_heads or options.heads,
        "head_dim": options.head_dim,
        **machine,
    }


def parse_options(arguments=None):
    parser = harness.make_parser(__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, nargs="+", default=[2048, 8192], help="tokens")
    parser.add_argument("--density", type=float, nargs="+", default=[1, 0.5, 0.25, 0.1], help="kept causal pairs")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument(
        "--pass",
        nargs="+",
        choices=["forward", "backward"],
        default=["forward", "backward"],
        dest="directions",
        help="which passes",
    )
    parser.add_argument("--full", action="store_true", help="without the causal mask")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="key heads (default: as many as heads)")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out: compiling takes a minute")
    parser.add_argument("--profile", action="store_true", help="also say where the time of forwards goes")
    options = parser.parse_args(arguments)
    for density in options.density:
        if not 0 < density <= 1:
            parser.error(f"--density is {density}, expected a share above 0 and at most 1")
    if options.quick:
        options.n, options.density = [n for n in options.n if n <= 2048] or [1024], [1, 0.25]
        options.repeats, options.no_flex = min(options.repeats, 3), True
    return options


def main(arguments=None) -> None:
    options = parse_options(arguments)
    machine = harness.describe_machine(options.threads)
    harness.print_machine(machine)
    flex, rows = Flex(), []
    cases = [
        (direction, dtype, n, density)
        for direction in options.directions
        for dtype in options.dtype
        for n in options.n
        for density in options.density
    ]
    for values in harness.track(cases, lambda case: "{} {} n={} density {:g}".format(*case)):
        rows.append(measure(Case(options, *values), options, flex, machine))
    shape = f"B={options.batch} H={options.heads} D={options.head_dim}, {'full' if options.full else 'causal'}"
    seconds = harness.format_seconds
    harness.print_rows(
        f"gated attention, {shape}; ratio = best peer / sluice",
        rows,
        {
            "pass": lambda row: row["pass"],
            "dtype": lambda row: row["dtype"],
            "n": lambda row: str(row["n"]),
            "density": lambda row: f"{row['density']:g}",
            "achieved": lambda row: f"{row['achieved_density']:.3f}",
            "sluice": lambda row: seconds(row["seconds"]),
            **{name: (lambda row, name=name: seconds(row["peers"][name])) for name in PEERS},
            "ratio": lambda row: f"{row['ratio']:.2f}",
        },
    )
    attention_profile.print_profiles(rows)
    if flex.problem:
        harness.console.print(f"FlexAttention did not compile: {flex.problem}", highlight=False)
    harness.write_json(options.json, rows)


if __name__ == "__main__":
    main()
