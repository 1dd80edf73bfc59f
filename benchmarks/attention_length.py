"""How the cost of attention grows with the number of tokens: ``python -m benchmarks.attention_length --plot FILE``.

Time: the forward of gated attention at several densities beside SDPA over all pairs, interleaved, as in
``benchmarks.gated_attention``. Memory: the most that a process of its own held during one call beyond what it held
before, with output and, of the backward, gradients; beside it the plain formula, as far as half of the free memory
takes it. ``slope`` of the last row is the exponent p of bytes ~ n^p over the longest half of the lengths.

A row of ``--json`` has ``what`` ("time", "memory" or "slope"), ``n``, ``density``, ``pass``; ``seconds`` and ``peers``
in seconds, or ``bytes`` and ``peers`` in bytes (null: it was not run); ``ratio`` as everywhere.
"""

import argparse
import math
import multiprocessing
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.gated_attention import Case, fits_in_memory
from benchmarks.memory import forget_peak, held_bytes, peak_bytes
from torch_sluice._memory import release_memory

LENGTHS = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
DENSITIES = [1, 0.5, 0.25, 0.1]
COLOURS = {"SDPA": "#64748b", "formula": "#c2791b", "sluice": ["#99d5cc", "#4fb3a5", "#0f766e", "#0a4a45"]}


def bytes_of_call(options: argparse.Namespace, direction: str, n: int, density: float, name: str) -> int:
    """The most that one call takes beyond what was held before it."""
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        case, small = Case(options, direction, "float32", n, density), Case(options, direction, "float32", 64, density)
    inputs = [x.requires_grad_(direction == "backward") for x in (case.q, case.k, case.v, case.a, case.b)]
    few = [x.requires_grad_(direction == "backward") for x in (small.q, small.k, small.v, small.a, small.b)]
    _call(getattr(small, f"run_{name}"), few, small.dout if direction == "backward" else None)  # code and threads
    release_memory()  # or what made the inputs leaves room that is not counted
    forget_peak()
    held = held_bytes()
    _call(getattr(case, f"run_{name}"), inputs, case.dout if direction == "backward" else None)
    return peak_bytes() - held


def _call(function, inputs: list[torch.Tensor], dout: torch.Tensor | None) -> None:
    with torch.set_grad_enabled(dout is not None):
        out = function(*inputs)
    if dout is not None:
        torch.autograd.grad(out, [x for x in inputs if x.requires_grad], dout, allow_unused=True)


def measure_memory(options: argparse.Namespace, direction: str, n: int, density: float, machine: dict) -> dict:
    """The row of one length; each figure from a process that does nothing else."""
    case = argparse.Namespace(direction=direction, n=n)
    names = ["sluice", "sdpa"] + ["eager"] * fits_in_memory(case, options)
    found = {}
    for name in names:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name] = pool.apply(bytes_of_call, (options, direction, n, density, name))
    peers = {name: found.get(name) for name in ("sdpa", "eager")}
    shape = {"batch": options.batch, "heads": options.heads, "head_dim": options.head_dim}
    return {
        "what": "memory", "pass": direction, "n": n, "density": density, "bytes": found["sluice"], "peers": peers,
        **shape, **machine,
    }  # fmt: skip


def measure_time(options: argparse.Namespace, n: int, machine: dict) -> list[dict]:
    """A row for each density; all of them and SDPA take turns."""
    cases = {f"{density:g}": Case(options, "forward", "float32", n, density) for density in options.density}
    candidates = {name: case.forward_of(case.run_sluice) for name, case in cases.items()}
    first = next(iter(cases.values()))
    candidates["sdpa"] = first.forward_of(first.run_sdpa)
    timings = harness.time_interleaved(candidates, options.repeats if n < 2 * max(options.n) / 4 else 3)
    shape = {"batch": options.batch, "heads": options.heads, "head_dim": options.head_dim}
    return [
        {
            "what": "time", "pass": "forward", "n": n, "density": case.density,
            "achieved_density": round(case.achieved, 4), "seconds": timings.seconds(name),
            "peers": {"sdpa": timings.seconds("sdpa")}, "ratio": timings.ratio("sdpa", name), **shape, **machine,
        }
        for name, case in cases.items()
    ]  # fmt: skip


def find_slope(rows: list[dict], direction: str) -> float:
    """The exponent p of bytes ~ n^p, by least squares over the longer half of the lengths."""
    points = sorted((row["n"], row["bytes"]) for row in rows if row["what"] == "memory" and row["pass"] == direction)
    points = [(math.log(n), math.log(max(size, 1))) for n, size in points[len(points) // 2 :]]
    x, y = (torch.tensor(axis, dtype=torch.float64) for axis in zip(*points, strict=True))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def draw(rows: list[dict], path: Path) -> None:
    """Time and memory against n, both on logarithmic axes."""
    import matplotlib
    from matplotlib.figure import Figure

    from torch_sluice.report.figure import STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        times = [row for row in rows if row["what"] == "time"]
        densities = sorted({row["density"] for row in times}, reverse=True)
        first = [row for row in times if row["density"] == densities[0]]
        left.plot(
            [r["n"] for r in first], [r["peers"]["sdpa"] * 1e3 for r in first], color=COLOURS["SDPA"], label="SDPA"
        )
        for density, colour in zip(densities, COLOURS["sluice"], strict=False):
            own = [row for row in times if row["density"] == density]
            left.plot(
                [r["n"] for r in own], [r["seconds"] * 1e3 for r in own], color=colour, label=f"density {density:g}"
            )
        left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms of a forward")
        memory = [row for row in rows if row["what"] == "memory"]
        for direction, style in (("forward", "-"), ("backward", "--")):
            own = [row for row in memory if row["pass"] == direction]
            lines = {
                "density .1": (COLOURS["sluice"][2], lambda row: row["bytes"]),
                "SDPA": (COLOURS["SDPA"], lambda row: row["peers"]["sdpa"]),
                "the formula": (COLOURS["formula"], lambda row: row["peers"]["eager"]),
            }
            for name, (colour, of) in lines.items():
                points = [(row["n"], of(row) / 2**20) for row in own if of(row)]
                label = f"{name}, {'forward' if direction == 'forward' else 'forward and backward'}"
                right.plot(*zip(*points, strict=True), style, color=colour, label=label)
        right.set(xscale="log", yscale="log", xlabel="tokens", ylabel="MB beyond the inputs")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.legend(fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    harness.console.print(f"wrote {path}", highlight=False)


def parse_options(arguments=None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__.splitlines()[0], repeats=5)
    parser.add_argument("--n", type=int, nargs="+", default=LENGTHS, help="tokens")
    parser.add_argument("--density", type=float, nargs="+", default=DENSITIES, help="kept causal pairs")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory into this SVG or PNG")
    options = parser.parse_args(arguments)
    options.full, options.kv_heads = False, None
    if options.quick:
        options.n, options.repeats = [256, 1024, 4096], 2
    options.n = sorted(options.n)
    return options


def main(arguments=None) -> None:
    options = parse_options(arguments)
    machine = harness.describe_machine(options.threads)
    harness.print_machine(machine)
    rows: list[dict] = []
    work = [("time", "forward", n) for n in options.n]
    work += [("memory", direction, n) for direction in ("forward", "backward") for n in options.n]
    for what, direction, n in harness.track(work, lambda item: "{} {} n={}".format(*item)):
        if what == "time":
            rows += measure_time(options, n, machine)
        else:
            rows.append(measure_memory(options, direction, n, min(options.density), machine))
    for direction in ("forward", "backward"):
        rows.append({"what": "slope", "pass": direction, "value": find_slope(rows, direction), **machine})
    print_rows(rows, options)
    if options.plot:
        draw(rows, options.plot)
    harness.write_json(options.json, rows)


def print_rows(rows: list[dict], options: argparse.Namespace) -> None:
    times = [row for row in rows if row["what"] == "time"]
    harness.print_rows(
        f"forward, causal, float32, B={options.batch} H={options.heads} D={options.head_dim}; ratio = SDPA / sluice",
        times,
        {
            "n": lambda row: str(row["n"]),
            "density": lambda row: f"{row['density']:g}",
            "sluice": lambda row: harness.format_seconds(row["seconds"]),
            "SDPA": lambda row: harness.format_seconds(row["peers"]["sdpa"]),
            "ratio": lambda row: f"{row['ratio']:.2f}",
        },
    )

    def megabytes(size: int | None) -> str:
        return "-" if size is None else f"{size / 2**20:.1f}"

    harness.print_rows(
        f"MB of a call beyond its inputs, density {min(options.density):g}",
        [row for row in rows if row["what"] == "memory"],
        {
            "pass": lambda row: row["pass"],
            "n": lambda row: str(row["n"]),
            "sluice": lambda row: megabytes(row["bytes"]),
            "SDPA": lambda row: megabytes(row["peers"]["sdpa"]),
            "formula": lambda row: megabytes(row["peers"]["eager"]),
        },
    )
    for row in rows:
        if row["what"] == "slope":
            harness.console.print(f"{row['pass']}: bytes grow as n^{row['value']:.2f}", highlight=False)


if __name__ == "__main__":
    main()
