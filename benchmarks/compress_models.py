"""Real models through ``torch_sluice.compress``, against what else makes them faster.

``python -m benchmarks.compress_models``. For each model (benchmarks/models/, one file each): its metric before and
after, on data that neither ``compress()`` nor fine-tuning has seen; latency of one call at batch 1 and 8, median and
95th percentile; bytes as stored; processor time of a call, and energy where the machine exposes RAPL. Peers
(benchmarks/compress_peers.py) run the same inputs in the same rounds, and their metrics are measured too, so that no
one's speed is bought by accuracy unseen. Sluice's model is timed as it is and through ``torch.compile``.

A row of ``--json``: ``model``, ``metric``, ``metric_before``, ``metric_after``, ``kept``, ``latency_ms`` (median, batch
1), ``peers`` (name -> the same of that peer; null: not to be had), ``bytes``, ``bytes_before``; ``p95_ms``,
``batch8_ms``, ``batch8_p95_ms``, ``cpu_seconds`` and ``joules`` of one call at batch 1 (null: not exposed), ``cosine``
(of outputs to the original's), ``ratios`` (peer / Sluice, median over rounds), ``details`` (all of this for each peer),
``variants`` (all that was measured; of one name the fastest that keeps the metric stands for it), ``asked`` (the share
that ``compress()`` was to keep, which it promises of other data), ``goals`` (met or not).
"""

import argparse
import importlib
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

import torch_sluice
from benchmarks import compress_peers, harness
from benchmarks.compress_peers import PEERS, Peer, build_peer
from benchmarks.compress_report import print_report
from benchmarks.compress_timing import Latency, measure_latencies, median_ratio
from benchmarks.models.task import FineTune, MissingPackageError, Task, call, mean_cosine

MODELS = ("minilm", "crepe", "digits", "text", "gpt2", "t5", "pitch", "vit")
BATCHES = (1, 8)
OURS = "sluice"
GATED = "gated"  # the text model with its gate alone, before compression
GOALS = {"latency": 0.4, "kept": 0.97, "bytes": 0.3}  # shares of float32 eager's


@dataclass
class Entry:
    """A peer, or Sluice's model, and what was measured of it."""

    peer: Peer
    metric: float | None = None
    cosine: float | None = None
    latency: dict[int, Latency] = field(default_factory=dict)

    def as_dict(self) -> dict:
        if self.peer.problem:
            return {"how": self.peer.how, "problem": self.peer.problem}
        one, eight = (self.latency[batch] for batch in BATCHES)
        return {
            "how": self.peer.how,
            "metric": self.metric,
            "cosine": self.cosine,
            "latency_ms": one.median * 1e3,
            "p95_ms": one.p95 * 1e3,
            "batch8_ms": eight.median * 1e3,
            "batch8_p95_ms": eight.p95 * 1e3,
            "cpu_seconds": one.cpu_seconds,
            "joules": one.energy,
            "bytes": self.peer.bytes,
        }


def load_task(name: str, quick: bool) -> Task:
    return importlib.import_module(f"benchmarks.models.{name}").load(quick)


def compress_task(task: Task, options: argparse.Namespace) -> torch.nn.Module:
    """The compressed model; with ``--saved`` it is kept in that folder, and taken from there if it was made before."""
    path = options.saved / f"{task.name}{'-quick' if options.quick else ''}.pt" if options.saved else None
    if path is not None and path.exists():
        return torch_sluice.compress.load(path, task.model)
    keep = options.keep
    if task.dense is not None:
        # What is to be kept is a share of the dense model's metric, of which the gate may have taken some.
        dense, gated = (task.metric(model, task.selection) for model in (task.dense, task.model))
        keep = min(1.0, keep * dense / gated)
    finetune = FineTune(task) if options.finetune and task.train_step else None
    compressed = torch_sluice.compress(
        task.model,
        task.draw_inputs(1),
        task.selection,
        keep=keep,
        metric=task.metric,
        finetune=finetune,
        finetune_steps=max(1, task.train_steps),
        threads=options.threads,
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch_sluice.compress.save(compressed, path)
    return compressed


def saved_bytes(compressed: torch.nn.Module, folder: Path) -> int:
    path = folder / "compressed.pt"
    torch_sluice.compress.save(compressed, path)
    return path.stat().st_size


def collect_entries(task: Task, compressed, options, folder: Path) -> list[Entry]:
    """Sluice's model and every peer, with metrics. Peers that share a name are variants of one."""
    size = saved_bytes(compressed, folder)
    entries = [Entry(Peer(OURS, compressed, size, "pruned, int8 dynamic"))]
    if options.compile:
        entries += map(
            Entry, compress_peers.compiled_peers(OURS, compressed, size, "pruned, int8 dynamic", task, folder)
        )
    if task.dense is not None:
        size = compress_peers.stored_bytes(task.model)
        entries.append(Entry(Peer(GATED, task.model, size, "float32, gate only")))
    for name in PEERS:
        if name == "eager" or name in options.peers:
            entries += map(Entry, build_peer(name, task, folder))
    original = task.dense or task.model
    for entry in harness.track(entries, lambda entry: f"{task.name}: metric of {entry.peer.name}"):
        if entry.peer.run is not None:
            entry.metric = task.metric(entry.peer.run, task.heldout)
            entry.cosine = mean_cosine(entry.peer.run, original, task.heldout[:4])
    return entries


def time_entries(task: Task, entries: list[Entry], options) -> None:
    running = {str(number): entry for number, entry in enumerate(entries) if entry.peer.run is not None}
    for batch in BATCHES:
        inputs = task.draw_inputs(batch)
        candidates = {key: partial(call, entry.peer.run, inputs) for key, entry in running.items()}
        for key, latency in measure_latencies(candidates, options.repeats, options.calls).items():
            running[key].latency[batch] = latency


def choose_variants(entries: list[Entry], metric_before: float, keep: float) -> dict[str, Entry]:
    """One entry for each name: of variants the fastest that keeps the metric, or else the most accurate."""
    chosen: dict[str, Entry] = {}
    for name in dict.fromkeys(entry.peer.name for entry in entries):
        variants = [entry for entry in entries if entry.peer.name == name]
        running = [entry for entry in variants if entry.peer.run is not None]
        keeping = [entry for entry in running if entry.metric >= keep * metric_before]
        if keeping:
            chosen[name] = min(keeping, key=lambda entry: entry.latency[1].median)
        else:
            chosen[name] = max(running, key=lambda entry: entry.metric) if running else variants[0]
    return chosen


def make_row(task: Task, compressed, entries: list[Entry], machine: dict) -> dict:
    metric_before = next(entry.metric for entry in entries if entry.peer.name == "eager")
    chosen = choose_variants(entries, metric_before, GOALS["kept"])
    variants = [{"name": entry.peer.name, **entry.as_dict()} for entry in entries]
    ours, eager = chosen[OURS], chosen["eager"]
    details = {name: entry.as_dict() for name, entry in chosen.items() if name != OURS}
    row = {
        "model": task.name,
        "title": task.title,
        "metric": task.metric_name,
        "metric_before": eager.metric,
        "metric_after": ours.metric,
        "kept": ours.metric / eager.metric if eager.metric else None,
        **{key: value for key, value in ours.as_dict().items() if key not in ("how", "metric")},
        "peers": {name: detail.get("latency_ms") for name, detail in details.items()},
        "bytes_before": eager.peer.bytes,
        "ratios": {
            name: median_ratio(entry.latency[1], ours.latency[1])
            for name, entry in chosen.items()
            if name != OURS and entry.peer.run is not None
        },
        "details": details,
        "how": ours.peer.how,
        "variants": variants,
        "asked": compressed.compression_report.keep,
        "layers": [
            [layer.name, layer.action, layer.before, layer.after] for layer in compressed.compression_report.layers
        ],
        "notes": task.notes,
        **machine,
    }
    rival = row["peers"].get("onnxruntime")
    row["goals"] = {
        "latency": row["latency_ms"] <= GOALS["latency"] * row["peers"]["eager"],
        "kept": row["kept"] is not None and row["kept"] >= GOALS["kept"],
        "bytes": row["bytes"] <= GOALS["bytes"] * row["bytes_before"],
        "onnxruntime": row["latency_ms"] < rival if rival is not None else None,
    }
    return row


def measure_model(name: str, options, machine: dict) -> dict | None:
    task = load_task(name, options.quick)
    compressed = compress_task(task, options)
    if options.compress_only:
        report = compressed.compression_report
        text = f"{task.title}, compressed in {report.seconds:.1f} s\n{report}"
        harness.console.print(text, highlight=False, markup=False)
        return None
    with tempfile.TemporaryDirectory(prefix="compress_models_") as folder:
        entries = collect_entries(task, compressed, options, Path(folder))
        time_entries(task, entries, options)
    return make_row(task, compressed, entries, machine)


def parse_options(arguments=None):
    parser = harness.make_parser(__doc__.splitlines()[0], repeats=12)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="which models")
    parser.add_argument(
        "--keep", type=float, default=GOALS["kept"], help="share of the metric that compress() is to keep"
    )
    parser.add_argument("--calls", type=int, default=5, help="calls that are timed in a round, after two that aren't")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="besides eager")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="don't time Sluice's model compiled")
    parser.add_argument("--no-finetune", dest="finetune", action="store_false", help="compress without training")
    parser.add_argument("--saved", type=Path, metavar="FOLDER", help="keep compressed models here, and reuse them")
    parser.add_argument("--compress-only", action="store_true", help="compress, report, and time no peers")
    options = parser.parse_args(arguments)
    if not 0 < options.keep <= 1:
        parser.error(f"--keep is {options.keep}, expected a share in (0, 1]")
    if options.calls < 1:
        parser.error(f"--calls is {options.calls}, expected at least 1")
    if options.quick:
        options.repeats, options.calls = min(options.repeats, 2), min(options.calls, 2)
    return options


def main(arguments=None) -> None:
    options = parse_options(arguments)
    machine = harness.describe_machine(options.threads)
    harness.print_machine(machine)
    rows = []
    for name in options.model:
        try:
            row = measure_model(name, options, machine)
        except MissingPackageError as problem:
            harness.console.print(f"{name} is left out: {problem}", highlight=False, markup=False)
            continue
        if row is not None:
            rows.append(row)
            harness.write_json(options.json, rows)  # after each model: an interruption keeps those before
    if rows:
        print_report(rows, GOALS)


if __name__ == "__main__":
    main()
