"""Times collectives between the ranks of this machine: Sluice against Gloo, MPICH and Open MPI.

Level torch goes through torch.distributed, with both backends in the same processes; level core calls the C core
without torch, in the same processes as one MPI after the other. Rounds of both take turns. "of bandwidth": the least
traffic that the collective could do with, over its time, as a share of what as many processes reach in copying.
"""

import json
import os
import signal
import sys

from benchmarks import collective_peers, collective_report, harness
from benchmarks.collective_cases import ITEM_BYTES, KB, MB, OPS, Case, select_cases
from benchmarks.collective_launch import Run, RunFailed
from torch_sluice import library_path


def parse_options():
    parser = harness.make_parser(__doc__.splitlines()[0], repeats=9)
    parser.set_defaults(threads=1)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--op", nargs="+", choices=OPS, help="all by default")
    parser.add_argument("--bytes", type=int, nargs="+", help="each rank's input; by default what suits each op")
    parser.add_argument("--dtype", nargs="+", choices=ITEM_BYTES)
    parser.add_argument("--pin", action="store_true", help="one processor for each rank")
    parser.add_argument("--no-pin", action="store_true", help="with --pin: measure both")
    parser.add_argument("--peers", nargs="*", choices=["gloo", *collective_peers.MPI], default=None)
    parser.add_argument("--level", choices=["torch", "core", "both"], default="both")
    parser.add_argument("--backend", default="sluice", help="of torch.distributed, to be measured")
    parser.add_argument("--library", help="with the C core; by default the one that torch_sluice loads")
    parser.add_argument("--tuning", nargs="+", default=[], metavar="NAME=BYTES", help="of the C core at level core")
    parser.add_argument("--plot", type=harness.Path, metavar="FILE", help="cost of all_reduce against size and ranks")
    options = parser.parse_args()
    if min(options.ranks) < 2:
        parser.error("--ranks must be at least 2")
    if options.bytes and min(options.bytes) < 0:
        parser.error("--bytes must not be negative")
    if options.quick:
        options.repeats = min(options.repeats, 3)
    options.peers = ["gloo", *collective_peers.MPI] if options.peers is None else options.peers
    try:
        options.tuning = {name: int(value) for name, value in (each.split("=") for each in options.tuning)}
    except ValueError:
        parser.error("--tuning expects NAME=BYTES, for instance piece=131072")
    return options


def list_cases(options) -> dict[int, list[Case]]:
    """Ranks -> cases; with a plot also what that needs."""
    cases = {
        ranks: select_cases(ranks, options.quick, options.op, options.bytes, options.dtype) for ranks in options.ranks
    }
    if options.plot:
        sizes = [KB << shift for shift in range(0, 11 if options.quick else 17, 2)]
        wanted = [Case("all_reduce", size, "float32", min(options.ranks)) for size in sizes]
        wanted += [Case("all_reduce", MB, "float32", ranks) for ranks in (2, 4, 8, 16)]
        for case in wanted:
            known = cases.setdefault(case.ranks, [])
            known += [case] if case not in known else []
    return {ranks: [case for case in known if _fits(case)] for ranks, known in cases.items()}


def _fits(case: Case) -> bool:
    """Says so if it doesn't."""
    needed = case.ranks * (case.input_bytes + case.output_bytes)
    left = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > left // 2:
        harness.console.print(f"left out: {collective_report.describe_case(case)}, which needs {needed / 1e9:.1f} GB")
    return needed <= left // 2


def run_ranks(peer: str, cases: list[Case], pinned: bool, options, advance) -> tuple[float, list[dict]]:
    """Bandwidth, and of each case the seconds in each round, engine by engine."""
    arguments = ["--library", str(options.library or library_path()), "--repeats", str(options.repeats)]
    arguments += ["--cases", json.dumps([case.as_dict() for case in cases]), *(["--pin"] if pinned else [])]
    if options.tuning and not peer.startswith("torch:"):
        arguments += ["--tuning", json.dumps(options.tuning)]
    bandwidth, seconds = 0.0, []
    with Run(peer, cases[0].ranks, arguments) as run:
        for row in run.rows():
            if "bandwidth" in row:
                bandwidth = row["bandwidth"]
            else:
                seconds.append(row["seconds"])
                advance(peer, cases[len(seconds) - 1])
    return bandwidth, seconds


def measure_torch(cases: list[Case], pinned: bool, options, machine: dict, advance) -> list[dict]:
    """All cases of one number of ranks."""
    peer = "gloo" if "gloo" in options.peers else None
    names = f"torch:{options.backend}" + (f",{peer}" if peer else "")
    bandwidth, seconds = run_ranks(names, cases, pinned, options, advance)
    rows = []
    for case, each in zip(cases, seconds, strict=True):
        rows += collective_report.torch_rows(case, each, peer, pinned, bandwidth, machine)
    return rows


def measure_core(cases: list[Case], pinned: bool, mpis: list[str], options, machine: dict, advance) -> list[dict]:
    """The same with the C core, once beside each MPI."""
    runs = {mpi: run_ranks(mpi, cases, pinned, options, advance) for mpi in mpis}
    bandwidth = max(bandwidth for bandwidth, _ in runs.values())
    return [
        collective_report.core_row(case, {mpi: runs[mpi][1][i] for mpi in mpis}, pinned, bandwidth, machine)
        for i, case in enumerate(cases)
    ]


def find_mpis(options) -> list[str]:
    """Those that are there, installed now if need be; a line about each that isn't."""
    found = []
    for mpi in collective_peers.MPI:
        if options.level == "torch" or mpi not in options.peers:
            continue
        try:
            collective_peers.install_mpi(mpi)
            found.append(mpi)
        except collective_peers.PeerMissing as missing:
            harness.console.print(str(missing), highlight=False)
    return found


def measure(options, machine: dict, rows: list[dict]) -> None:
    """Adds to the rows as they come, so that those are left which came before an interruption."""
    cases, mpis = list_cases(options), find_mpis(options)
    placements = ([True] if options.pin else []) + ([False] if options.no_pin or not options.pin else [])
    trees = (options.level != "core") + len(mpis)
    steps = [(pinned, ranks) for pinned in placements for ranks in cases if cases[ranks]]
    with harness.Progress(console=harness.console, transient=True, disable=not harness.console.is_terminal) as progress:
        task = progress.add_task("", total=trees * sum(len(cases[ranks]) for _, ranks in steps))

        def advance(peer: str, case: Case) -> None:
            progress.update(task, advance=1, description=f"{peer}: {collective_report.describe_case(case)}")

        for pinned, ranks in steps:
            if options.level != "core":
                rows += measure_torch(cases[ranks], pinned, options, machine, advance)
            if mpis:
                rows += measure_core(cases[ranks], pinned, mpis, options, machine, advance)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the ranks are ended too
    options = parse_options()
    machine = harness.describe_machine(options.threads)
    machine |= {"processors": len(os.sched_getaffinity(0))}
    harness.print_machine(machine)
    rows, problem = [], None
    try:
        measure(options, machine, rows)
    except RunFailed as failure:
        problem = f"collectives: {failure}"
    except (KeyboardInterrupt, SystemExit) as end:
        problem = 130 if isinstance(end, KeyboardInterrupt) else end.code
    if problem and not rows:
        sys.exit(problem)
    bandwidths = {(row["ranks"], row["pinned"]): row["bandwidth"] for row in rows if "bandwidth" in row}
    for (ranks, pinned), bandwidth in bandwidths.items():
        where = "pinned processes" if pinned else "processes"
        harness.console.print(f"{ranks} {where} copy at {bandwidth / 1e9:.1f} GB/s, reads and writes together")
    collective_report.print_tables(rows)
    harness.write_json(options.json, rows)
    if problem:
        sys.exit(problem)
    if options.plot:
        collective_report.plot(rows, options.plot)


if __name__ == "__main__":
    main()
