"""Runs a function on each entry of the zoo in a process of its own, within a time and a memory; and the options and
the table that the programs of the zoo share. Processor time counts, so that a busy machine ends no model.

A process is forked from one that has imported everything, so that it starts at once. What it writes by ``note()`` is
kept if it is ended: a row of a model that hangs says where.
"""

import argparse
import collections
import fnmatch
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import harness, zoo

Examine = Callable[[zoo.Entry, Callable[[dict], None]], dict]
UNBUILT, ERROR, BUILDING = "unbuilt", "error", "building it"
_PATIENCE = 10  # times the limit of processor time, after which a process that waits is ended


def make_parser(description: str, seconds: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file, one a line")
    parser.add_argument("--only", metavar="PATTERN", help="models whose name or family matches, with * and ?; or a|b|c")
    parser.add_argument("--jobs", type=harness._positive, default=2, help="models at a time")
    parser.add_argument("--threads", type=harness._positive, default=1, help="threads of torch for each")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="take rows that this file has, run the others")
    parser.add_argument("--seconds", type=harness._positive, default=seconds, help="that a model may take")
    parser.add_argument(
        "--gigabytes", type=harness._positive, default=12, help="of address space that a model may take"
    )
    return parser


def select(pattern: str | None) -> list[zoo.Entry]:
    """The entries that a pattern names; all without one."""
    entries = zoo.architectures()
    if pattern is None:
        return entries
    patterns = pattern.split("|")
    return [e for e in entries if any(fnmatch.fnmatch(e.name, p) or p == e.family for p in patterns)]


def run(examine: Examine, options: argparse.Namespace) -> list[dict]:
    """A row for each entry that the options name: what ``examine`` gives, with ``model``, ``family``, ``seconds``.

    Progress goes to standard error; ``--json`` is written as rows come, so that a run can be resumed.
    """
    entries = select(options.only)
    kept = {}
    if options.resume is not None and options.resume.exists():
        kept = {row["model"]: row for row in _read(options.resume)}
    rows = [kept[entry.name] for entry in entries if entry.name in kept]
    waiting = [entry for entry in entries if entry.name not in kept]
    begin = time.monotonic()
    for number, row in enumerate(run_each(waiting, examine, options), 1):
        rows.append(row)
        left = (time.monotonic() - begin) / number * (len(waiting) - number)
        line = f"[{number}/{len(waiting)}, {left / 60:.0f} min left] {row['model']}: {row['status']}"
        print(f"{line} ({row['seconds']:.1f} s) {row['reason'][:120]}", file=sys.stderr, flush=True)
        _write(options.json, rows)
    _write(options.json, rows)
    return rows


def _read(path: Path) -> list[dict]:
    """The rows of a file: a list in JSON, however it is laid out; or one row a line, the last perhaps cut off."""
    text = path.read_text()
    try:
        rows = json.loads(text)
        return rows if isinstance(rows, list) else [rows]
    except ValueError:
        return list(_whole_lines(text))


def _whole_lines(text: str) -> Iterator[dict]:
    for line in text.splitlines():
        try:
            row = json.loads(line.strip().rstrip(","))
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _write(path: Path | None, rows: list[dict]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def run_each(entries: list[zoo.Entry], examine: Examine, options: argparse.Namespace) -> Iterator[dict]:
    """Rows in the order in which models are done."""
    _import_everything()
    waiting, running = collections.deque(entries), {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                entry = waiting.popleft()
                path = Path(folder) / f"{len(waiting)}.json"
                running[_start(entry, examine, path, options)] = entry, path, time.monotonic()
            child, status = os.wait()
            entry, path, begin = running.pop(child)
            row = {"model": entry.name, "family": entry.family, "status": ERROR, "reason": ""}
            if path.exists():
                row |= json.loads(path.read_text())
                path.unlink()
            if status:
                reason = _describe_end(status, row.get("stage", "starting"), options.seconds)
                row |= {"status": UNBUILT if row.get("stage") == BUILDING else ERROR, "reason": reason}
            row.pop("stage", None)
            yield {**row, "seconds": round(row.get("seconds", time.monotonic() - begin), 2)}


def _describe_end(status: int, stage: str, seconds: int) -> str:
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number in (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM):
        return f"not done after {seconds} s of processor time, while {stage}"
    return f"ended by {signal.Signals(number).name if number else status}, while {stage}"


def _import_everything() -> None:
    import transformers
    import transformers.generation
    import transformers.masking_utils
    import transformers.modeling_layers
    import transformers.models.auto.modeling_auto

    transformers.logging.set_verbosity_error()


def _start(entry: zoo.Entry, examine: Examine, path: Path, options: argparse.Namespace) -> int:
    child = os.fork()
    if child:
        return child
    try:  # nothing of the parent's may run in the child: it ends by _exit
        resource.setrlimit(resource.RLIMIT_AS, (options.gigabytes << 30,) * 2)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (options.seconds,) * 2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_PATIENCE * options.seconds)
        torch.set_num_threads(options.threads)
        path_of_part = path.with_suffix(".part")
        found: dict = {}

        def note(more: dict) -> None:
            found.update(more)
            path_of_part.write_text(json.dumps(found))
            path_of_part.rename(path)

        begin = time.monotonic()
        note({"stage": BUILDING})
        try:
            note(examine(entry, note))
        except zoo.Unbuildable as error:
            note({"status": UNBUILT, "reason": str(error)})
        except BaseException as error:
            note({"status": ERROR, "reason": describe(error)})
        note({"seconds": found.get("seconds", time.monotonic() - begin)})
    finally:
        os._exit(0)


def describe(error: BaseException) -> str:
    """An exception in one line, and the place in this project that it left last, or else the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "torch_sluice" in frame.filename]
    frame = (own or frames)[-1]
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno} ({frame.name}): {text}"


def print_summary(title: str, rows: list[dict], goals: dict[str, str]) -> None:
    """How many rows have each status, by family, and each reason of what is no success, the most frequent first."""
    table = []
    for family in (*dict.fromkeys(row["family"] for row in rows), "all"):
        mine = [row for row in rows if family in (row["family"], "all")]
        built = [row for row in mine if row["status"] != UNBUILT]
        counts = collections.Counter(row["status"] for row in mine)
        table.append({"family": family, "built": len(built), UNBUILT: counts[UNBUILT], **{
            status: f"{counts[status]} ({counts[status] / max(1, len(built)):.0%})" for status in goals}})  # fmt: skip
    columns = {name: lambda row, name=name: str(row[name]) for name in ("family", "built", *goals, UNBUILT)}
    harness.print_rows(title, table, columns)
    for status in (ERROR, UNBUILT):
        for row in rows:
            if row["status"] == status:
                harness.console.print(f"{status}: {row['model']}: {row['reason']}", highlight=False, markup=False)
    for status, goal in goals.items():
        if goal:
            harness.console.print(f"goal: {status} {goal}", highlight=False)
