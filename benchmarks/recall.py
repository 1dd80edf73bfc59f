"""Where a gate earns its place: associative recall among noise, accuracy against density for dense, window and gate.

    python -m benchmarks.recall [--quick | --n N] [--target D ...] [--seed S] [--threads T] [--json FILE]

A small model learns the task of ``benchmarks.recall_task`` with dense attention, on 256 tokens and then on n. From
there, each with as many steps on as many sequences: dense goes on; gates close to a target density under a
``DensityController``; a sliding window of twice that density is trained in its place. The trained gates are measured as
they are deployed: hard selection by the operator, kept pairs counted exactly. Windows of other densities are put on the
dense model without training.

What is compared here is accuracy, not time: a row's ``peers`` holds the accuracy of dense and ``ratio`` is that of the
row over it. ``seconds``, a training step's, is for orientation: the kinds are trained one after the other.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from benchmarks import harness
from benchmarks.recall_task import PAIRS, QUERIES, SYMBOLS, Model, density_of_window, draw, evaluate, window_of
from torch_sluice.attention import DensityController, parameter_groups

SHORT = 256
DENSE_RATE, RATE, GATE_RATE = 4e-3, 1e-3, 10e-3
UNTRAINED_WINDOWS = (0.1, 0.2, 0.4, 0.6, 0.8)
CHANCE = 1 / SYMBOLS


def batch_size(n):
    """Sequences per step: as many tokens at every length up to 1024, 4 sequences beyond."""
    return max(4, 4096 // n)


def train(model, n, steps, rate, seed, on_step, controller=None, enough=None):
    """Trains in place; ``enough``: stop once the running mean of the loss is below it. Returns the steps done."""
    generator = torch.Generator().manual_seed(seed)
    groups = parameter_groups(model, rate, 0.01, gate_lr=GATE_RATE)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    running = None
    for step in range(steps):
        batch = draw(batch_size(n), n, generator)
        loss = F.cross_entropy(model(batch).flatten(0, 1), batch.answer.flatten())
        value = loss.item()
        running = value if running is None else 0.95 * running + 0.05 * value
        (controller.loss(loss) if controller else loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        density = ""
        if controller:
            controller.step()
            density = f"density {controller.density:.3f}"
        on_step(f"loss {running:.3f} {density}")
        if enough is not None and step >= 100 and running < enough:
            return step + 1
    return steps


class Benchmark:
    """Runs the kinds of attention one after the other and collects a row for each."""

    def __init__(self, n, options, machine, progress):
        self.n, self.targets, self.steps, self.dense_steps = n, options.target, options.steps, options.dense_steps
        self.sequences, self.seed, self.window = options.sequences, options.seed, options.window
        self.machine, self.progress, self.status = machine, progress, ""
        self.rows = []

    def _train(self, title, model, steps, *arguments, **options):
        bar = self.progress.add_task(title, total=steps, status="")
        begin = time.perf_counter()

        def on_step(text):
            self.status = text
            self.progress.update(bar, advance=1, status=text)

        done = train(model, *arguments, on_step=on_step, **options)
        seconds = time.perf_counter() - begin
        self.progress.update(bar, completed=steps)
        self.progress.console.print(f"{title}: {done} steps in {seconds:.0f} s, {self.status}")
        return done, seconds

    def _add_row(self, method, model, density=None, steps=0, seconds=0.0, **more):
        accuracy, kept = evaluate(model, self.n, self.sequences)
        dense = next((row["accuracy"] for row in self.rows if row["method"] == "dense"), accuracy)
        self.rows.append(
            {
                "operation": "recall",
                "method": method,
                "dtype": "float32",
                "causal": True,
                "n": self.n,
                "density": kept if density is None else density,
                "accuracy": accuracy,
                "peers": {"dense": dense},
                "ratio": accuracy / dense if dense else None,
                "steps": steps,
                "seconds": seconds / steps if steps else None,
                "seed": self.seed,
                **more,
                **self.machine,
            }
        )

    def run(self):
        torch.manual_seed(self.seed)
        model = Model()
        n, seed, steps = self.n, self.seed, self.dense_steps
        done = self._train(f"dense, n = {SHORT}", model, steps, SHORT, steps, DENSE_RATE, seed, enough=0.02)[0]
        if n != SHORT:
            done += self._train(f"dense, n = {n}", model, steps, n, steps, RATE, seed + 1, enough=0.02)[0]
        start = copy.deepcopy(model)

        _, seconds = self._train(f"dense, n = {n}, on", model, self.steps, n, self.steps, RATE, seed + 2)
        self._add_row("dense", model, 1.0, self.steps, seconds, steps_before=done)
        for target in self.targets:
            self._run_gate(copy.deepcopy(start), target)
        wide = window_of(2 * self.targets[0], n)
        cut = copy.deepcopy(start)
        cut.cut_to_window(wide)
        _, seconds = self._train(f"window of {wide}", cut, self.steps, n, self.steps, RATE, seed + 2)
        self._add_row("window", cut, density_of_window(wide, n), self.steps, seconds, window=wide)
        for density in UNTRAINED_WINDOWS:
            wide = window_of(density, n)
            model.cut_to_window(wide)
            self._add_row("window, untrained", model, density_of_window(wide, n), window=wide)
        return self.rows

    def _run_gate(self, model, target):
        model.add_gates(self.window)
        controller = DensityController(model, target, self.steps)
        title = f"gate, target {target:g}"
        _, seconds = self._train(
            title, model, self.steps, self.n, self.steps, RATE, self.seed + 2, controller=controller
        )
        controller.close()
        self._add_row("gate", model, None, self.steps, seconds, target=target, window=self.window)


def print_rows(rows):
    table = Table(title=f"Recall, n = {rows[0]['n']}: {PAIRS} pairs, {QUERIES} queries, chance {CHANCE:.1%}")
    for title in ("attention", "window", "target", "density", "answers right", "of dense", "step"):
        table.add_column(title, justify="left" if title == "attention" else "right")
    for row in rows:
        table.add_row(
            row["method"], str(row.get("window", "")), f"{row['target']:g}" if "target" in row else "",
            f"{row['density']:.3f}", f"{row['accuracy']:.1%}", f"{row['ratio']:.1%}" if row["ratio"] else "-",
            harness.format_seconds(row["seconds"]),
        )  # fmt: skip
    harness.console.print(table)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recall", description=__doc__.split("\n\n")[0])
    parser.add_argument("--n", type=int, default=2048, help="tokens of a sequence (default: 2048)")
    parser.add_argument("--quick", action="store_true", help="n = 256, the quick size")
    parser.add_argument("--target", type=float, nargs="+", default=[0.1], help="densities of the gate (default: 0.1)")
    parser.add_argument("--steps", type=int, default=400, help="steps of each kind of attention (default: 400)")
    parser.add_argument("--dense-steps", type=int, default=1500, help="at most, before, per length (default: 1500)")
    parser.add_argument("--window", type=int, default=4, help="keys next to a query that the gate leaves alone")
    parser.add_argument("--sequences", type=int, default=128, help="sequences of the evaluation (default: 128)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="default: as torch decides")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    options = parser.parse_args(arguments)
    n = SHORT if options.quick else options.n
    if n < 48:
        parser.error(f"--n is {n}, expected at least 48")
    for name in ("steps", "dense_steps", "sequences"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected at least 1")
    for target in options.target:
        if not 0 < target <= 0.5:
            parser.error(f"--target is {target}, expected numbers in (0, 0.5]")
    machine = harness.describe_machine(options.threads if options.threads > 0 else torch.get_num_threads())
    harness.print_machine(machine)
    columns = (
        *(TextColumn("{task.description:24}"), BarColumn(), TextColumn("{task.completed}/{task.total}")),
        *(TimeRemainingColumn(), TextColumn("{task.fields[status]}")),
    )
    with Progress(*columns, console=harness.console) as progress:
        rows = Benchmark(n, options, machine, progress).run()
    print_rows(rows)
    harness.write_json(options.json, rows)


if __name__ == "__main__":
    main()
