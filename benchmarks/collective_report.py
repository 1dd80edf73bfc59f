"""Rows, tables and the plot of the benchmark of collectives, from the seconds that its ranks report."""

import statistics
from pathlib import Path

from benchmarks import harness
from benchmarks.collective_cases import MB, Case

SHARED_FROM = MB  # bytes of input from which the share of memory bandwidth says something


def median_ratio(slower: list[float], faster: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(x / y for x, y in zip(slower, faster, strict=True))


def _common(case: Case, level: str, seconds: float, pinned: bool, bandwidth: float, machine: dict) -> dict:
    row = {"operation": "collective", "level": level, **case.as_dict(), "seconds": seconds, "pinned": pinned}
    shared = case.least_traffic and case.bytes >= SHARED_FROM
    row["bandwidth"] = bandwidth
    row["bandwidth_share"] = case.least_traffic / bandwidth / seconds if shared else None
    return row | machine


def torch_rows(case: Case, seconds: dict, peer: str | None, pinned: bool, bandwidth: float, machine: dict) -> list:
    """Two rows: the backend against its peer, and what torch's dispatch adds to the C core."""
    own, core = seconds["torch"], seconds["core"]
    row = _common(case, "torch", statistics.median(own), pinned, bandwidth, machine)
    row["peers"] = {peer: statistics.median(seconds[peer])} if peer else {}
    row["ratio"] = median_ratio(seconds[peer], own) if peer else None
    added = statistics.median(x - y for x, y in zip(own, core, strict=True))
    dispatch = {"operation": "dispatch", **case.as_dict(), "seconds": added, "torch_seconds": row["seconds"]}
    return [row, dispatch | {"core_seconds": statistics.median(core), "pinned": pinned} | machine]


def core_row(case: Case, by_peer: dict[str, dict], pinned: bool, bandwidth: float, machine: dict) -> dict:
    """The C core against each MPI, with which it ran in turn; ratio: to the one that comes off better."""
    own = [second for seconds in by_peer.values() for second in seconds["core"]]
    row = _common(case, "core", statistics.median(own), pinned, bandwidth, machine)
    row["peers"] = {peer: statistics.median(seconds[peer]) for peer, seconds in by_peer.items() if peer in seconds}
    row["ratios"] = {
        peer: median_ratio(seconds[peer], seconds["core"]) for peer, seconds in by_peer.items() if peer in seconds
    }
    row["ratio"] = min(row["ratios"].values(), default=None)
    return row


def format_bytes(size: int) -> str:
    """In the largest unit that leaves no remainder."""
    for unit, name in ((1 << 20, "MB"), (1 << 10, "KB")):
        if size and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"


def describe_case(case: Case) -> str:
    """For progress."""
    return f"{case.op} {format_bytes(case.bytes)} {case.dtype}, {case.ranks} ranks"


def print_tables(rows: list[dict]) -> None:
    """One for each level, one for what torch adds."""
    for level, what in (("torch", "through torch.distributed; ratio = peer / sluice"),
                        ("core", "the C core; ratio = the better MPI / sluice")):  # fmt: skip
        wanted = [row for row in rows if row.get("level") == level]
        if wanted:
            _print_level(what, wanted)
    dispatch = [row for row in rows if row["operation"] == "dispatch"]
    if dispatch:
        columns = {"torch": "torch_seconds", "core": "core_seconds", "added": "seconds"}
        shown = {name: (lambda row, key=key: _signed_seconds(row[key])) for name, key in columns.items()}
        harness.print_rows("what torch's dispatch adds to the C core", dispatch, _case_columns() | shown)


def _signed_seconds(seconds: float) -> str:
    return harness.format_seconds(seconds) if seconds >= 0 else "-" + harness.format_seconds(-seconds)


def _case_columns() -> dict:
    return {
        "op": lambda row: row["op"],
        "input": lambda row: format_bytes(row["bytes"]),
        "dtype": lambda row: row["dtype"],
        "ranks": lambda row: str(row["ranks"]) + (" pinned" if row["pinned"] else ""),
    }


def _print_level(title: str, rows: list[dict]) -> None:
    peers = sorted({peer for row in rows for peer in row["peers"]})
    columns = _case_columns() | {"sluice": lambda row: harness.format_seconds(row["seconds"])}
    for peer in peers:
        columns[peer] = lambda row, peer=peer: harness.format_seconds(row["peers"].get(peer))
    columns["ratio"] = lambda row: "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
    columns["of bandwidth"] = lambda row: "-" if row["bandwidth_share"] is None else f"{row['bandwidth_share']:.0%}"
    harness.print_rows(title, rows, columns)


def plot(rows: list[dict], path: Path) -> None:
    """all_reduce in float32: cost against size at the fewest ranks, and against ranks at 1 MB. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        harness.console.print(f"{path} is not drawn: matplotlib is not installed")
        return
    rows = [row for row in rows if row.get("op") == "all_reduce" and row.get("dtype") == "float32" and "level" in row]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    fewest = min((row["ranks"] for row in rows), default=0)
    _draw(left, [row for row in rows if row["ranks"] == fewest], "bytes", f"all_reduce, {fewest} ranks", "bytes")
    _draw(right, [row for row in rows if row["bytes"] == MB], "ranks", "all_reduce of 1 MB", "ranks")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    harness.console.print(f"wrote {path}", highlight=False)


def _draw(axes, rows: list[dict], key: str, title: str, label: str) -> None:
    lines: dict[str, list] = {}
    for row in rows:
        pinned = ", pinned" if row["pinned"] else ""
        lines.setdefault(f"sluice, {row['level']}{pinned}", []).append((row[key], row["seconds"]))
        for peer, seconds in row["peers"].items():
            lines.setdefault(f"{peer}{pinned}", []).append((row[key], seconds))
    for name, points in sorted(lines.items()):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(title=title, xlabel=label, ylabel="seconds", xscale="log", yscale="log")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize="small")
