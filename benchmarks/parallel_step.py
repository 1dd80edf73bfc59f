"""Times training steps in parallel, data parallel and tensor parallel: Sluice against Gloo.

The backends take turns in processes of their own: DTensor takes meshes of the same ranks for the same one, and would
send the calls of the second backend's model to the first one's group.
"""

import math
import signal
import statistics
import sys

from benchmarks import harness
from benchmarks.collective_launch import Run, RunFailed
from benchmarks.collective_report import median_ratio


def parse_options():
    parser = harness.make_parser(__doc__.splitlines()[0], repeats=5)
    parser.set_defaults(threads=1)
    parser.add_argument("--rounds", type=int, default=3, help="of processes, for each backend")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kind", nargs="+", choices=["data", "tensor"], default=["data", "tensor"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 128, 1024], help="of a rank's batch")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--backend", default="sluice", help="to be measured")
    parser.add_argument("--peer", default="gloo", help="to compare it with")
    options = parser.parse_args()
    if options.ranks < 2 or min(options.tokens) < 1 or options.layers < 1:
        parser.error("--ranks must be at least 2, --tokens and --layers at least 1")
    if options.hidden < 64 * options.ranks or options.hidden % (64 * options.ranks):
        parser.error(
            f"--hidden is {options.hidden}, expected a multiple of {64 * options.ranks}: heads of 64, per rank"
        )
    if options.backend == options.peer:
        parser.error("--backend and --peer must differ")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, expected 1 or more")
    if options.quick:
        options.tokens, options.repeats, options.rounds = options.tokens[:1], min(options.repeats, 3), 1
    return options


def measure(kind: str, tokens: int, options, machine: dict) -> dict:
    """One row."""
    facts = {"tokens": tokens, "hidden": options.hidden, "layers": options.layers}
    arguments = ["--kind", kind, "--repeats", str(options.repeats)]
    arguments += [word for name, value in facts.items() for word in (f"--{name}", str(value))]
    backends = [options.backend, options.peer]
    seconds, losses = {backend: [] for backend in backends}, {}
    for turn in range(options.rounds):
        for backend in reversed(backends) if turn % 2 else backends:
            with Run(f"torch:{backend}", options.ranks, arguments, program="benchmarks.parallel_step_rank") as run:
                result = next(run.rows())
                for _ in run.rows():  # until its ranks have ended
                    pass
            seconds[backend] += result["seconds"]
            losses[backend] = result["losses"]
    for one, other in zip(*losses.values(), strict=True):
        if not math.isclose(one, other, rel_tol=1e-4):
            raise RunFailed(f"{' and '.join(backends)} come to different losses: {losses}")
    row = {"operation": "step", "parallel": kind, **facts, "ranks": options.ranks}
    row["seconds"] = statistics.median(seconds[options.backend])
    row["peers"] = {options.peer: statistics.median(seconds[options.peer])}
    return row | {"ratio": median_ratio(seconds[options.peer], seconds[options.backend])} | machine


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the ranks are ended too
    options = parse_options()
    machine = harness.describe_machine(options.threads)
    harness.print_machine(machine)
    cases = [(kind, tokens) for kind in options.kind for tokens in options.tokens]
    try:
        rows = [measure(*case, options, machine) for case in harness.track(cases, lambda case: f"{case[0]} {case[1]}")]
    except RunFailed as failure:
        sys.exit(f"parallel_step: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
    harness.print_rows(
        f"steps of {options.layers} blocks, hidden {options.hidden}; ratio = {options.peer} / {options.backend}",
        rows,
        {
            "parallel": lambda row: row["parallel"],
            "tokens": lambda row: str(row["tokens"]),
            "ranks": lambda row: str(row["ranks"]),
            options.backend: lambda row: harness.format_seconds(row["seconds"]),
            options.peer: lambda row: harness.format_seconds(row["peers"][options.peer]),
            "ratio": lambda row: f"{row['ratio']:.2f}",
        },
    )
    harness.write_json(options.json, rows)


if __name__ == "__main__":
    main()
