"""What every benchmark shares: interleaved timing, ratios of rounds, the machine's facts, tables, JSON and progress.

A machine is never quiet, so nothing here believes a single time. In each round every candidate runs once, one after the
other and in an order that turns; a ratio is the median over rounds of the ratio within a round, so that what slows a
stretch of the run slows both sides of it. What takes milliseconds runs three times in a round and its best time counts:
being interrupted by another process only ever adds, and by whole time slices.

``--json`` writes a list of rows, one for each case. A row says what ran (``pass`` or ``operation``, ``dtype``, sizes),
``seconds`` of Sluice, ``peers`` (name -> seconds, null: it did not run), ``ratio`` (a peer / Sluice: above 1, Sluice is
faster), and where: ``threads``, ``isa``, ``processor``, ``torch``. A program says so where a row is not about time.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from torch_sluice.info import describe_plugin

console = Console()
if not console.is_terminal:
    console = Console(width=140)  # a file or a pipe: as wide as the tables need


def make_parser(description: str, repeats: int = 9) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--threads", type=_positive, default=2, help="threads of torch, which both sides use")
    parser.add_argument("--repeats", type=_positive, default=repeats, help="rounds of timing")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases: a look, not a measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def describe_machine(threads: int) -> dict:
    """The facts that belong beside each figure; sets the number of threads."""
    torch.set_num_threads(threads)
    facts = describe_plugin()
    return {
        "threads": threads,
        "isa": facts["cpu"]["isa"],
        "processor": facts["cpu"]["model"],
        "torch": facts["torch"]["version"],
    }


class Timings:
    """Seconds of each candidate in each round."""

    def __init__(self, seconds: dict[str, list[float]]):
        self._seconds = seconds

    def seconds(self, name: str) -> float | None:
        """Median of this candidate; None if it did not run."""
        return statistics.median(self._seconds[name]) if self._seconds.get(name) else None

    def ratio(self, name: str, other: str) -> float:
        """Median over rounds of seconds of name / seconds of other."""
        pairs = zip(self._seconds[name], self._seconds[other], strict=True)
        return statistics.median(x / y for x, y in pairs)

    def fastest(self, names: Iterable[str]) -> str:
        """Which of these that ran has the smallest median."""
        return min((name for name in names if self._seconds.get(name)), key=self.seconds)


def time_interleaved(
    candidates: dict[str, Callable[[], object] | None], repeats: int, shortest: float = 2e-3
) -> Timings:
    """Times all candidates, one after the other in each of ``repeats`` rounds, after one round that isn't counted.

    Args:
        candidates: name -> what to time; None is left out.
        repeats: rounds.
        shortest: seconds; what is faster is called so often in a row that it takes this long.
    """
    active = {name: call for name, call in candidates.items() if call is not None}
    calls, bursts = {}, {}
    for name, call in active.items():
        call()
        once = min(_time(call, 1) for _ in range(2))
        calls[name] = max(1, round(shortest / max(once, 1e-7)))
        bursts[name] = 3 if once < 0.05 else 1
    seconds = {name: [] for name in candidates}
    names = list(active)
    gc.collect()
    gc.disable()
    try:
        for turn in range(repeats):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                seconds[name].append(min(_time(active[name], calls[name]) for _ in range(bursts[name])))
    finally:
        gc.enable()
    return Timings(seconds)


def _time(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def track(cases: list, describe: Callable[[object], str]) -> Iterator:
    """Goes through the cases, with a progress bar once that takes more than two seconds."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    started = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cases), visible=False)
        for case in cases:
            visible = time.perf_counter() - started > 2
            progress.update(task, description=describe(case), visible=visible, refresh=True)
            yield case
            progress.advance(task)


def print_rows(title: str, rows: list[dict], columns: dict[str, Callable[[dict], str]]) -> None:
    """A table: column heading -> what to show of a row."""
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(columns):
        table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(show(row) for show in columns.values()))
    console.print(table)


def print_machine(machine: dict) -> None:
    """One line: what the figures were measured on."""
    console.print(
        f"{machine['processor']}, {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}",
        highlight=False,
    )


def format_seconds(seconds: float | None) -> str:
    """Three digits and a unit; a dash for None."""
    if seconds is None:
        return "-"
    for factor, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def write_json(path: Path | None, rows: list[dict]) -> None:
    """Writes the rows, one a line."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    console.print(f"wrote {path}", highlight=False)
