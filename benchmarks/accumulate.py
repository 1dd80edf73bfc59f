"""Fused gradient accumulation against torch's own ``add_``: ``python -m benchmarks.accumulate``.

Three tables:

- one call: adding a gradient into its sum and measuring it (norm, largest magnitude, finiteness). Peers are ``add_``
  into float32, which measures nothing; ``add_`` and the three further passes that measure; and the eager form of
  the seed's ``adaptive_precision`` (norm, branch, cast, add). Operands come from memory, not from the cache: each
  call takes the next of a pool of tensors. A row's ``ratio`` is seconds of ``add_`` / seconds of Sluice.
- one window of a model, session and hooks included: the ordinary loop against ``torch_sluice.accumulate``.
- the error of the sum after a window, by format: the reason for the scale and for stochastic rounding. Not timed.
"""

import itertools

import torch
from torch import nn

import torch_sluice
from benchmarks import harness
from torch_sluice.accumulate.operators import count_blocks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
POOL_BYTES = 256 << 20  # more than any cache: what a call touches was last touched a whole pool ago
PEERS = ("add_", "add_ and measure", "adaptive_precision")


def add_and_measure(total, grad):
    total.add_(grad)
    return torch.linalg.vector_norm(grad), grad.abs().max(), grad.isfinite().all()


def adaptive_precision(total, grad):
    """The seed's rule as it stands there: cast by the norm, then add."""
    grad = grad.float() if torch.linalg.vector_norm(grad) > 1e-3 else grad.half()
    total.add_(grad)


class Pool:
    """Gradients and sums in all formats, handed out in turn."""

    def __init__(self, elements: int, grad_dtype: torch.dtype, warm: bool):
        count = 1 if warm else max(2, POOL_BYTES // (elements * 4))
        self.grads = [torch.randn(elements).mul_(1e-6).to(grad_dtype) for _ in range(count)]
        self.singles = [torch.zeros(elements) for _ in range(count)]
        self.halves = [torch.zeros(elements, dtype=torch.float16) for _ in range(count)]
        self.exponents = [torch.zeros(count_blocks(elements), dtype=torch.int8) for _ in range(count)]

    def in_turn(self, function, *lists):
        turn = itertools.cycle(zip(*lists, strict=True))
        return lambda: function(*next(turn))

    def candidates(self) -> dict:
        accumulate = torch.ops.sluice.accumulate_

        def fp32(total, grad):
            accumulate(total, None, grad, 1.0, False, None)

        def fp16(rounding):
            return lambda half, exponents, grad: accumulate(half, exponents, grad, 1.0, False, rounding)

        halves = self.halves, self.exponents, self.grads
        return {
            "fp32": self.in_turn(fp32, self.singles, self.grads),
            "fp16 stochastic": self.in_turn(fp16(7), *halves),
            "fp16 nearest": self.in_turn(fp16(None), *halves),
            "add_": self.in_turn(torch.Tensor.add_, self.singles, self.grads),
            "add_ and measure": self.in_turn(add_and_measure, self.singles, self.grads),
            "adaptive_precision": self.in_turn(adaptive_precision, self.singles, self.grads),
        }


def measure_call(case, options, machine) -> list[dict]:
    elements, grad_dtype, warm = case
    timings = harness.time_interleaved(Pool(elements, DTYPES[grad_dtype], warm).candidates(), options.repeats)
    return [
        {
            "operation": "accumulate_",
            "format": format,
            "dtype": grad_dtype,
            "elements": elements,
            "memory": "warm" if warm else "cold",
            "seconds": timings.seconds(format),
            "peers": {name: timings.seconds(name) for name in PEERS},
            "ratio": timings.ratio("add_", format),
            "ratio_to_measuring": timings.ratio("add_ and measure", format),
            **machine,
        }
        for format in ("fp32", "fp16 stochastic", "fp16 nearest")
    ]


class Window:
    """A model with many parameters and little to compute, and a window of micro-batches for it."""

    def __init__(self, every: int, width: int):
        self.every, self.width = every, width
        self.batch = torch.randn(16, width)

    def runner(self, policy: str | None):
        model = nn.Sequential(*(nn.Linear(self.width, self.width, bias=False) for _ in range(12)))
        optimizer = torch.optim.SGD(model.parameters(), 1e-6)
        session = None
        if policy:
            session = torch_sluice.accumulate(model, optimizer, policy=policy)
            session.__enter__()

        def run():
            for i in range(self.every):
                (model(self.batch).square().mean() / self.every).backward()
                if i + 1 == self.every:
                    optimizer.step()
                    optimizer.zero_grad()

        return run, session

    def measure(self, options, machine) -> list[dict]:
        policies = ("auto", "fp32", "fp16", "seed")
        runners = {name: self.runner(name) for name in policies}
        candidates = {"torch": self.runner(None)[0], **{name: run for name, (run, _) in runners.items()}}
        timings = harness.time_interleaved(candidates, options.repeats)
        elements = 12 * self.width**2
        rows = []
        for name, (_, session) in runners.items():
            stats = session.stats()
            session.__exit__(None, None, None)
            rows.append(
                {
                    "operation": "window",
                    "format": name,
                    "dtype": "float32",
                    "elements": elements,
                    "every": self.every,
                    "fp16_share": stats.fp16_share,
                    "bytes": stats.bytes,
                    "peer_bytes": 4 * elements,
                    "seconds": timings.seconds(name),
                    "peers": {"torch": timings.seconds("torch")},
                    "ratio": timings.ratio("torch", name),
                    **machine,
                }
            )
        return rows


def sum_up(format: str, grads) -> torch.Tensor:
    """The gradients added up in this format, as float32."""
    if format in ("float32", "bfloat16", "float16"):
        total = torch.zeros_like(grads[0], dtype=DTYPES[format])
        for grad in grads:
            total += grad.to(total.dtype)
        return total.float()
    half = torch.zeros_like(grads[0], dtype=torch.float16)
    exponents = torch.zeros(count_blocks(half.numel()), dtype=torch.int8)
    for seed, grad in enumerate(grads):
        rounding = seed if format == "scaled float16, stochastic" else None
        torch.ops.sluice.accumulate_(half, exponents, grad, 1.0, seed == 0, rounding)
    out = torch.empty_like(half, dtype=torch.float32)
    torch.ops.sluice.read_accumulator(half, exponents, 1.0, out)
    return out


FORMATS = ("float32", "float16", "bfloat16", "scaled float16, nearest", "scaled float16, stochastic")


def measure_errors(elements: int, norm: float, every: int, machine: dict) -> list[dict]:
    """Sums of gradients that share a direction, as those of micro-batches do: half signal, half noise."""
    generator = torch.Generator().manual_seed(0)

    def normal():
        return torch.randn(elements, generator=generator) * (norm / elements**0.5)

    signal = normal()
    grads = [(signal + normal()) / 2**0.5 for _ in range(every)]
    exact = sum(grad.double() for grad in grads)
    rows = []
    for format in FORMATS:
        total = sum_up(format, grads)
        rows.append(
            {
                "operation": "error",
                "format": format,
                "dtype": "float32",
                "elements": elements,
                "norm": norm,
                "every": every,
                "relative_error": ((total - exact).norm() / exact.norm()).item(),
                "flushed": ((total == 0) & (exact != 0)).double().mean().item(),
                "seconds": None,
                "peers": {},
                "ratio": None,
                **machine,
            }
        )
    return rows


def parse_options(arguments=None):
    parser = harness.make_parser(__doc__.splitlines()[0], repeats=15)
    parser.add_argument("--elements", type=int, nargs="+", default=[1 << 16, 1 << 20, 1 << 22, 1 << 25])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="of gradients")
    parser.add_argument("--warm", action="store_true", help="operands stay in the cache if they fit")
    parser.add_argument("--every", type=int, default=8, help="micro-batches in a window")
    parser.add_argument("--width", type=int, default=1024, help="of the layers of the window's model")
    parser.add_argument("--error-elements", type=int, default=31_000_000, help="of the sums whose error is shown")
    options = parser.parse_args(arguments)
    if min(*options.elements, options.every, options.width, options.error_elements) < 1:
        parser.error("--elements, --every, --width and --error-elements must be at least 1")
    if options.quick:
        options.elements, options.dtype, options.repeats = [1 << 22], ["float32"], min(options.repeats, 5)
        options.width, options.error_elements = min(options.width, 512), min(options.error_elements, 1 << 20)
    return options


def print_tables(calls, windows, errors) -> None:
    seconds = harness.format_seconds
    harness.print_rows(
        "one gradient added to its sum; ratio = add_ / sluice",
        calls,
        {
            "format": lambda row: row["format"],
            "gradient": lambda row: row["dtype"],
            "elements": lambda row: f"{row['elements']:,}",
            "memory": lambda row: row["memory"],
            "sluice": lambda row: seconds(row["seconds"]),
            **{name: (lambda row, name=name: seconds(row["peers"][name])) for name in PEERS},
            "ratio": lambda row: f"{row['ratio']:.2f}",
            "to measuring": lambda row: f"{row['ratio_to_measuring']:.2f}",
        },
    )
    harness.print_rows(
        "a window of a model of 12 linear layers, hooks included; ratio = torch / sluice",
        windows,
        {
            "policy": lambda row: row["format"],
            "elements": lambda row: f"{row['elements']:,}",
            "every": lambda row: str(row["every"]),
            "in 16 bits": lambda row: f"{row['fp16_share']:.0%}",
            "MB of sums": lambda row: f"{row['bytes'] / 1e6:.1f}",
            "MB of .grad": lambda row: f"{row['peer_bytes'] / 1e6:.1f}",
            "sluice": lambda row: seconds(row["seconds"]),
            "torch": lambda row: seconds(row["peers"]["torch"]),
            "ratio": lambda row: f"{row['ratio']:.2f}",
        },
    )
    harness.print_rows(
        "error of the sum of a window",
        errors,
        {
            "format": lambda row: row["format"],
            "elements": lambda row: f"{row['elements']:,}",
            "norm": lambda row: f"{row['norm']:g}",
            "every": lambda row: str(row["every"]),
            "relative error": lambda row: f"{row['relative_error']:.1e}",
            "flushed to 0": lambda row: f"{row['flushed']:.1%}",
        },
    )


def main(arguments=None) -> None:
    options = parse_options(arguments)
    machine = harness.describe_machine(options.threads)
    harness.print_machine(machine)
    steps = [("call", (n, dtype, options.warm)) for dtype in options.dtype for n in options.elements]
    steps += [("window", None), *(("error", norm) for norm in (1e-3, 1.0))]
    calls, windows, errors = [], [], []
    for kind, case in harness.track(steps, lambda step: f"{step[0]} {step[1] or ''}"):
        if kind == "call":
            calls += measure_call(case, options, machine)
        elif kind == "window":
            windows += Window(options.every, options.width).measure(options, machine)
        else:
            errors += measure_errors(options.error_elements, case, options.every, machine)
    print_tables(calls, windows, errors)
    harness.write_json(options.json, calls + windows + errors)


if __name__ == "__main__":
    main()
