"""Norms of a weight's channels against torch's own sums: ``python -m benchmarks.channel_norms``.

Peers: ``weight.abs().sum(dims)`` in the weight's type, and with float64 sums, which is what the operator's rounding
equals; ``torch.linalg.vector_norm(weight, 1, dims)``. ``ratio`` is seconds of the fastest peer / seconds of Sluice.
``SLUICE_ISA=scalar`` times the tier below.
"""

import torch

from benchmarks import harness

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = {  # name -> (shape, memory format, dimension of the channels)
    "linear out": ((3072, 768), None, 0),
    "linear in": ((3072, 768), None, 1),
    "conv out": ((512, 512, 3, 3), None, 0),
    "conv in": ((512, 512, 3, 3), None, 1),
    "conv out, channels last": ((512, 512, 3, 3), torch.channels_last, 0),
    "conv in, channels last": ((512, 512, 3, 3), torch.channels_last, 1),
}


def measure(name, dtype, options, machine) -> dict:
    shape, layout, dim = CASES[name]
    weight = torch.randn(shape).to(DTYPES[dtype])
    if layout is not None:
        weight = weight.to(memory_format=layout)
    dims = [d for d in range(len(shape)) if d != dim]
    peers = {
        "abs().sum()": lambda: weight.abs().sum(dims),
        "in float64": lambda: weight.abs().sum(dims, dtype=torch.float64),
        "vector_norm": lambda: torch.linalg.vector_norm(weight, 1, dims),
    }
    sluice = {"sluice": lambda: torch.ops.sluice.channel_norms(weight, dim)}
    timings = harness.time_interleaved({**sluice, **peers}, options.repeats)
    return {
        "operation": "channel_norms", "case": name, "dtype": dtype, "shape": list(shape),
        "seconds": timings.seconds("sluice"), "peers": {peer: timings.seconds(peer) for peer in peers},
        "ratio": timings.ratio(timings.fastest(peers), "sluice"), **machine,
    }  # fmt: skip


def main(arguments=None) -> list[dict]:
    options = harness.make_parser(__doc__.splitlines()[0]).parse_args(arguments)
    machine = harness.describe_machine(options.threads)
    harness.print_machine(machine)
    cases = [(name, dtype) for dtype in DTYPES for name in CASES]
    if options.quick:
        cases, options.repeats = cases[:2], min(options.repeats, 3)
    rows = [measure(*case, options, machine) for case in harness.track(cases, lambda case: case[0])]
    seconds = harness.format_seconds
    columns = {
        "channels": lambda row: row["case"],
        "dtype": lambda row: row["dtype"],
        "sluice": lambda row: seconds(row["seconds"]),
        **{peer: (lambda row, peer=peer: seconds(row["peers"][peer])) for peer in rows[0]["peers"]},
        "ratio": lambda row: f"{row['ratio']:.2f}",
    }
    harness.print_rows("L1 norms of channels; ratio = fastest peer / sluice", rows, columns)
    harness.write_json(options.json, rows)
    return rows


if __name__ == "__main__":
    main()
