"""Times training steps with a monitor and without: everything on, TensorBoard, JSON lines, and a port being scraped.

Two cases: a small model, whose short steps show best what a step costs, and the main job. Steps with and without
take turns on the same model. ``overhead`` is the median over rounds of with / without within a round, minus 1; the
middle half of the rounds stands beside it, as ``middle_half``. ``monitor_seconds`` is what the monitor's own code takes
of a step, timed by itself, since the noise of a machine may hide the difference: the mean over all watched steps;
``monitor_cpu_seconds`` leaves out what other processes took in the meantime.
"""

import contextlib
import statistics
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import torch_sluice
from benchmarks import harness
from torch_sluice.monitor import MonitorWarning

CASES = ("small model", "main job")
SCRAPES_EVERY = 1.0  # seconds; Prometheus asks every 15 s or 60 s in common settings


def small_model() -> tuple[nn.Module, Callable[[], float], int]:
    """A layer with gated attention, 8 x 128 tokens a step: (model, step that gives the loss, tokens)."""
    torch.manual_seed(0)
    width = 128
    feedforward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    model = nn.Sequential(torch_sluice.GatedAttention(width, 4, window=16), feedforward)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x = torch.randn(8, 128, width)

    def step() -> float:
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return model, step, 8 * 128


def main_job() -> tuple[nn.Module, Callable[[], float], int]:
    """Sluice's side of ``torch-sluice train --preset demo`` at its first steps."""
    from torch_sluice.train.settings import PRESETS
    from torch_sluice.train.sluice import SluiceSide

    settings = replace(PRESETS["demo"], threads=torch.get_num_threads())
    side = SluiceSide(settings)
    shape = (settings.micro_size, settings.context + 1)
    batches = [torch.randint(0, 256, shape) for _ in range(settings.micro_batches)]
    return side.model, lambda: side.run_micro_batches(batches), settings.tokens_per_step


@contextlib.contextmanager
def scraping(port: int) -> Iterator[None]:
    """Reads the metrics, now and again, from another thread, as Prometheus would."""
    done = threading.Event()

    def scrape() -> None:
        while not done.wait(SCRAPES_EVERY):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
                response.read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Watched:
    """The step with a monitor around it; times the monitor's part as well."""

    def __init__(self, monitor, step: Callable[[], float], tokens: int):
        self._monitor, self._step, self._tokens = monitor, step, tokens
        self.own_seconds: list[float] = []
        self.own_cpu_seconds: list[float] = []

    def __call__(self) -> None:
        begin, cpu_begin = time.perf_counter(), time.thread_time()
        with self._monitor.step(self._tokens) as figures:
            inside, cpu_inside = time.perf_counter(), time.thread_time()
            figures["loss"] = self._step()
            inside, cpu_inside = time.perf_counter() - inside, time.thread_time() - cpu_inside
        self.own_seconds.append(time.perf_counter() - begin - inside)
        self.own_cpu_seconds.append(time.thread_time() - cpu_begin - cpu_inside)


def measure(case: str, repeats: int, steps: int, machine: dict) -> dict:
    """The row of a case: ``repeats`` rounds of ``steps`` steps each way."""
    model, step, tokens = small_model() if case == "small model" else main_job()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", MonitorWarning)
        monitor = torch_sluice.Monitor(
            model, jsonl=Path(folder) / "steps.jsonl", log_dir=Path(folder) / "board", metrics_port=0
        )
        with monitor, scraping(monitor.metrics_port):
            watched = Watched(monitor, step, tokens)
            for _ in range(3):  # the first counts operations; then the peak is measured, and TensorBoard starts
                watched()
            watched.own_seconds.clear()
            watched.own_cpu_seconds.clear()

            def rounds_of(call: Callable[[], object]) -> float:
                start = time.perf_counter()
                for _ in range(steps):
                    call()
                return (time.perf_counter() - start) / steps

            seconds = {"with": [], "without": []}
            for turn in range(repeats):
                for name in ("with", "without") if turn % 2 else ("without", "with"):
                    seconds[name].append(rounds_of(watched if name == "with" else step))
            mfu = monitor.mfu
    ratios = [x / y - 1 for x, y in zip(seconds["with"], seconds["without"], strict=True)]
    quartiles = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
    without, own = statistics.median(seconds["without"]), statistics.mean(watched.own_seconds)
    return {
        "operation": "training step with a monitor",
        "case": case,
        "dtype": "float32",
        "seconds": statistics.median(seconds["with"]),
        "peers": {"without": without},
        "ratio": 1 / (1 + statistics.median(ratios)),
        "overhead": statistics.median(ratios),
        "middle_half": [quartiles[0], quartiles[2]],
        "monitor_seconds": own,
        "monitor_cpu_seconds": statistics.mean(watched.own_cpu_seconds),
        "monitor_share": own / without,
        "mfu": mfu,
        "rounds": repeats,
        "steps_a_round": steps,
        **machine,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = harness.make_parser(__doc__.splitlines()[0], repeats=31)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args(arguments)
    machine = harness.describe_machine(options.threads)
    harness.print_machine(machine)
    repeats, steps = (2, 3) if options.quick else (options.repeats, 20)
    rows = [
        measure(case, repeats, steps if case == "small model" else 1, machine)
        for case in harness.track(options.case, str)
    ]
    harness.print_rows(
        "a step with everything on, against one without a monitor",
        rows,
        {
            "case": lambda row: row["case"],
            "without": lambda row: harness.format_seconds(row["peers"]["without"]),
            "overhead": lambda row: f"{row['overhead']:+.2%}",
            "middle half of the rounds": lambda row: " to ".join(f"{x:+.2%}" for x in row["middle_half"]),
            "monitor's own code": lambda row: harness.format_seconds(row["monitor_seconds"]),
            "of it on the processor": lambda row: harness.format_seconds(row["monitor_cpu_seconds"]),
            "of a step": lambda row: f"{row['monitor_share']:.2%}",
        },
    )
    harness.write_json(options.json, rows)


if __name__ == "__main__":
    main()
