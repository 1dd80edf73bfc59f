"""SmolLM2-135M through ``torch_sluice.compress``: time and memory that this takes, what is kept, and latency.

``python -m benchmarks.compress_language --json FILE``. The model and its text are those of benchmarks/models/smollm.py.
``compress()`` chooses by the mean probability of the next token on one part of the text; what counts is next-token
accuracy on another, which it has not seen. Prefill is one call of 128 tokens, decoding one call of one token with the
keys and values of 128 in a cache; the model, its compressed self and ``torch.ao``'s ``quantize_dynamic`` take turns.

The row of ``--json``: ``model``; ``seconds`` and ``cpu_seconds`` of compressing; ``memory``, the model itself and the
most that the process held meanwhile beyond what it held before, as a multiple of the model's float32 bytes;
``accuracy``, of each candidate on held-out text; ``kept``; ``bytes`` of the saved file, and ``bytes_before``,
``share``; ``prefill_ms``, ``prefill_p95_ms``, ``decode_ms``, ``decode_p95_ms`` of each candidate;
``ratios`` (another / Sluice, median over rounds) of both; ``report``, the layers and notes of the compression's;
``goals`` (met or not).
"""

import copy
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import torch_sluice
from benchmarks import harness
from benchmarks.compress_peers import stored_bytes
from benchmarks.compress_timing import measure_latencies, median_ratio
from benchmarks.memory import forget_peak, held_bytes, peak_bytes
from benchmarks.models import smollm
from benchmarks.models.smollm import NextToken, next_token_accuracy, next_token_probability
from benchmarks.models.task import MissingPackageError

METRICS = {"probability": next_token_probability, "accuracy": next_token_accuracy}
GOALS = {"kept": 0.99, "share": 0.3, "seconds": 600.0, "memory": 3.0}
OURS, EAGER, PEER = "sluice", "eager", "torch.ao"
QUICK_LAYERS, QUICK_FILES = 2, 40


class Decode:
    """One token after those of a prompt int64 [1, N], whose keys and values stay in a cache of N positions."""

    def __init__(self, model: NextToken, prompt: Tensor):
        from transformers import DynamicCache

        self.model, self.token, self.cache = model.model, prompt[:, -1:], DynamicCache()
        with torch.no_grad():
            self.model(input_ids=prompt, past_key_values=self.cache, use_cache=True)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        logits = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits
        self.cache.crop(-1)  # takes the last position away again
        return logits


@torch.no_grad()
def prefill(model: nn.Module, prompt: Tensor) -> Tensor:
    return model(prompt)


def quantize_by_torch(model: nn.Module) -> nn.Module:
    """``quantize_dynamic`` of all linear layers, the head among them, which thereby parts from the embedding."""
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def load(quick: bool) -> tuple[NextToken, object]:
    """The model and its tokenizer; ``quick``: the first layers only."""
    model, tokenizer = smollm.load_model(QUICK_LAYERS if quick else None)
    return NextToken(model).eval(), tokenizer


def compress(model: nn.Module, batches: list, options) -> tuple[nn.Module, dict]:
    """The compressed model, and what that took."""
    forget_peak()
    held = held_bytes()
    begin, cpu = time.perf_counter(), time.process_time()
    compressed = torch_sluice.compress(
        model, batches[0][0][:1], batches, options.keep, metric=METRICS[options.metric], threads=options.threads
    )
    return compressed, {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
        "added_bytes": peak_bytes() - held,
    }


def time_all(models: dict[str, nn.Module], prompt: Tensor, options) -> dict:
    """Prefill and decoding of all models, in turn."""
    figures: dict = {"ratios": {}}
    kinds: dict[str, Callable] = {"prefill": lambda model: partial(prefill, model, prompt)}
    kinds["decode"] = lambda model: Decode(model, prompt)
    for kind, make in kinds.items():
        latencies = measure_latencies(
            {name: make(model) for name, model in models.items()}, options.repeats, options.calls
        )
        figures[f"{kind}_ms"] = {name: latency.median * 1e3 for name, latency in latencies.items()}
        figures[f"{kind}_p95_ms"] = {name: latency.p95 * 1e3 for name, latency in latencies.items()}
        figures["ratios"][kind] = {
            name: median_ratio(latency, latencies[OURS]) for name, latency in latencies.items() if name != OURS
        }
    return figures


def measure(options, machine: dict) -> dict:
    model, tokenizer = load(options.quick)
    size = sum(p.numel() * 4 for p in model.parameters())
    files = QUICK_FILES if options.quick else None
    batches = smollm.load_windows(tokenizer, "selection", options.windows, options.length, files)
    heldout = smollm.load_windows(tokenizer, "heldout", options.heldout, most_files=files)
    compressed, cost = compress(model, batches, options)
    report = compressed.compression_report
    with tempfile.TemporaryDirectory(prefix="compress_language_") as folder:
        path = Path(folder) / "compressed.pt"
        torch_sluice.compress.save(compressed, path)
        stored = path.stat().st_size
    models = {OURS: compressed, EAGER: model, PEER: quantize_by_torch(model)}
    accuracy = {
        name: next_token_accuracy(models[name], heldout)
        for name in harness.track(list(models), lambda name: f"accuracy of {name}")
    }
    row = {
        "model": "smollm2-135m",
        "metric": "next-token accuracy",
        "seconds": cost["seconds"],
        "cpu_seconds": cost["cpu_seconds"],
        "memory": 1 + cost["added_bytes"] / size,
        "accuracy": accuracy,
        "kept": accuracy[OURS] / accuracy[EAGER],
        "bytes": stored,
        "bytes_before": stored_bytes(model),
        **time_all(models, heldout[0][0][:1], options),
        "asked": report.keep,
        "kept_reported": [report.kept, report.kept_low],
        "evaluations": report.evaluations,
        "report": {
            "layers": [[layer.name, layer.action, layer.before, layer.after, layer.reason] for layer in report.layers],
            "notes": report.notes,
        },
        **machine,
    }
    row["share"] = row["bytes"] / row["bytes_before"]
    row["goals"] = {
        "kept": row["kept"] >= GOALS["kept"],
        **{name: row[name] <= GOALS[name] for name in ("share", "seconds", "memory")},
    }
    return row


def print_row(row: dict) -> None:
    rows = [
        {"name": name, **{key: row[key][name] for key in ("accuracy", "prefill_ms", "decode_ms")}}
        for name in row["accuracy"]
    ]
    harness.print_rows(
        "SmolLM2-135M: next-token accuracy on held-out text, and milliseconds of a call",
        rows,
        {
            "": lambda r: r["name"],
            "accuracy": lambda r: f"{r['accuracy']:.4f}",
            "prefill of 128": lambda r: f"{r['prefill_ms']:.4g}",
            "decoding 1": lambda r: f"{r['decode_ms']:.4g}",
        },
    )
    met = {name: "met" if reached else "MISSED" for name, reached in row["goals"].items()}
    for line in (
        f"{met['kept']}: {row['kept']:.2%} of the accuracy kept, goal {GOALS['kept']:.0%}",
        f"{met['share']}: {row['share']:.1%} of the bytes, goal {GOALS['share']:.0%}",
        f"{met['seconds']}: {row['seconds']:.0f} s of compressing, goal {GOALS['seconds']:.0f}",
        f"{met['memory']}: {row['memory']:.2f} times the model's memory, goal {GOALS['memory']:g}",
    ):
        harness.console.print(line, highlight=False, markup=False)


def parse_options(arguments=None):
    parser = harness.make_parser(__doc__.splitlines()[0], repeats=8)
    parser.add_argument("--keep", type=float, default=0.99, help="share of the metric that compress() is to keep")
    parser.add_argument("--metric", choices=METRICS, default="probability", help="of the next token, to choose by")
    parser.add_argument("--windows", type=int, default=32, help="windows of text that compress() sees")
    parser.add_argument("--length", type=int, default=64, help="tokens of such a window")
    parser.add_argument("--heldout", type=int, default=64, help="windows of 128 tokens to judge by")
    parser.add_argument("--calls", type=int, default=5, help="calls that are timed in a round, after two that aren't")
    options = parser.parse_args(arguments)
    if not 0 < options.keep <= 1:
        parser.error(f"--keep is {options.keep}, expected a share in (0, 1]")
    for name in ("windows", "length", "heldout", "calls"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, expected at least 1")
    if options.quick:
        options.repeats, options.calls = min(options.repeats, 2), min(options.calls, 2)
        options.windows, options.length, options.heldout = 8, 16, 2
    return options


def main(arguments=None) -> None:
    options = parse_options(arguments)
    machine = harness.describe_machine(options.threads)
    harness.print_machine(machine)
    try:
        row = measure(options, machine)
    except MissingPackageError as problem:
        harness.console.print(f"smollm is left out: {problem}", highlight=False, markup=False)
        return
    harness.write_json(options.json, [row])
    print_row(row)


if __name__ == "__main__":
    main()
