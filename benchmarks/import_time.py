"""Times `import torch` in new processes: with the backend registered by its entry points, and without."""

import importlib.metadata
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import harness

REGISTERED, OFF, ABSENT = "registered", "autoload off", "no entry points"
_GROUPS = ("torch.backends", "torch.distributed.backends")
_PROGRAM = """
import time
start = time.perf_counter()
import torch
seconds = time.perf_counter() - start
print(seconds, "SLUICE" in torch.distributed.Backend._plugins)
"""


def is_installed() -> bool:
    """Whether the entry points are those of an installed package, so that no process can be without them."""
    return bool(importlib.metadata.entry_points(group=_GROUPS[0], name="sluice"))


def write_entry_points(folder: Path) -> None:
    """What an installed package says of itself, for a package that isn't installed."""
    metadata = folder / "sluice_registration-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sluice-registration\nVersion: 1\n")
    lines = [f"[{group}]\nsluice = torch_sluice_backend:register\n" for group in _GROUPS]
    (metadata / "entry_points.txt").write_text("\n".join(lines))


def environments(folder: Path) -> dict[str, dict | None]:
    """The environment of each candidate; None: there is no such process here."""
    paths = [str(Path(__file__).parents[1] / "python"), os.environ.get("PYTHONPATH", "")]
    plain = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
    if is_installed():
        registered = plain
    else:
        write_entry_points(folder)
        registered = {**plain, "PYTHONPATH": os.pathsep.join([str(folder), *paths])}
    off = {**registered, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    return {REGISTERED: registered, OFF: off, ABSENT: None if is_installed() else plain}


def time_import(environment: dict, expected: bool) -> float:
    """Seconds that `import torch` takes in a new process. Raises where the backend isn't there as expected."""
    output = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, check=True, capture_output=True, text=True
    )
    seconds, registered = output.stdout.split()
    if registered != str(expected):
        raise RuntimeError(f"the backend's name is {'known' if expected else 'unknown'} to torch, expected otherwise")
    return float(seconds)


def measure(repeats: int, machine: dict) -> dict:
    """The row: medians, the middle half of each candidate's times, and what registering adds."""
    with tempfile.TemporaryDirectory() as folder:
        candidates = {name: found for name, found in environments(Path(folder)).items() if found is not None}
        time_import(candidates[OFF], expected=False)  # files come into memory
        seconds, names = {name: [] for name in (REGISTERED, OFF, ABSENT)}, list(candidates)
        for turn in harness.track(list(range(repeats)), lambda turn: f"round {turn + 1}"):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                seconds[name].append(time_import(candidates[name], expected=name == REGISTERED))
    timings = harness.Timings(seconds)
    return {
        "operation": "import torch",
        "dtype": None,
        "seconds": timings.seconds(REGISTERED),
        "peers": {name: timings.seconds(name) for name in (OFF, ABSENT)},
        "ratio": timings.ratio(OFF, REGISTERED),
        "spread": {name: middle_half(times) if times else None for name, times in seconds.items()},
        "added_seconds": {
            name: statistics.median(x - y for x, y in zip(seconds[REGISTERED], seconds[name], strict=True))
            for name in names[1:]
        },
        "repeats": repeats,
    } | machine


def middle_half(times: list[float]) -> list[float]:
    """The quartiles between which half of the times lie."""
    if len(times) == 1:
        return times * 2
    quartiles = statistics.quantiles(times, method="inclusive")
    return [quartiles[0], quartiles[2]]


def main(arguments: list[str] | None = None) -> None:
    options = harness.make_parser(__doc__.splitlines()[0], repeats=21).parse_args(arguments)
    repeats = min(options.repeats, 3) if options.quick else options.repeats
    machine = harness.describe_machine(options.threads)
    harness.print_machine(machine)
    row = measure(repeats, machine)
    lines = [{"name": name} for name, spread in row["spread"].items() if spread is not None]
    medians = {REGISTERED: row["seconds"], **row["peers"]}

    def added(name: str) -> str:
        return "" if name == REGISTERED else f"{1e3 * row['added_seconds'][name]:+.1f} ms"

    harness.print_rows(
        f"import torch in new processes; ratio = autoload off / registered: {row['ratio']:.3f}",
        lines,
        {
            "": lambda line: line["name"],
            "median": lambda line: harness.format_seconds(medians[line["name"]]),
            "middle half": lambda line: " to ".join(map(harness.format_seconds, row["spread"][line["name"]])),
            "registering adds": lambda line: added(line["name"]),
        },
    )
    harness.write_json(options.json, [row])


if __name__ == "__main__":
    main()
