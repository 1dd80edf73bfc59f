"""``torch_sluice.compress`` on one small model with random weights of every architecture.

``python -m benchmarks.compress_zoo --json FILE``: the models are those of benchmarks/zoo.py, each in a process of its
own with a limit of time and memory. A row: ``model``, ``family``, ``status``, ``reason``, ``seconds`` (of compress),
``class`` and ``parameters`` of the model, ``inputs`` (shapes), ``copy_error`` (of the copy that compress works on, to
the original, relative to the largest output), ``kept`` and ``kept_low`` (as reported), ``kept_fresh`` (on batches that
compress has not seen, computed here), ``bytes`` (share of the original's, counted here), ``pruned``, ``quantized``,
``stayed`` (names; those that stayed with their reasons), ``notes``.

Statuses: ``compressed``; ``unchanged``, a copy of the model, and why; ``refused``, compress raised ValueError or
TypeError with a sentence of its own; ``error``, anything else: another exception, a result that gives other shapes, a
copy or a model that gives other outputs than before, other bytes than reported, fidelity on fresh batches that is more
than a point below what was reported. ``unbuilt`` says why an architecture can't be built small or run at all (it needs
another package, or inputs that no rule draws; its forward is random); it counts for nothing.
"""

import copy
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torch_sluice
from benchmarks import zoo, zoo_run

KEEP = 0.97
EQUAL = 1e-5  # relative; a few models sum in an order that differs from call to call
SLACK = 0.01  # by which fresh data may miss what was reported
BATCHES, ROWS, ROWS_OF_IMAGES = 8, 16, 8
_PACKAGE = str(Path(torch_sluice.__file__).parent)


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return [out.clone() for out in zoo.outputs_of(zoo.call(model, inputs))]


def fidelity(expected: list[list[Tensor]], found: list[list[Tensor]]) -> float:
    """1 - squared error / squared distance from the mean over rows, over all elements of all outputs of all batches but
    those that the model masks with the largest number there is."""
    error = spread = magnitude = 0.0
    for wanted, given in zip(expected, found, strict=True):
        for a, b in zip(wanted, given, strict=True):
            shown = a.abs() < torch.finfo(a.dtype).max / 2
            a, b = a.double() * shown, torch.where(~shown & (a == b), 0, b.double())
            error += float((a - b).square().sum())
            magnitude += float(a.square().sum())
            if a.dim() and a.shape[0] > 1:
                spread += float((a - a.mean(0)).square().sum())
    scale = spread if spread > 1e-12 * magnitude else magnitude
    return 1.0 if error == 0 else 1.0 - error / scale if scale else float("-inf")


def relative_error(expected: list[Tensor], found: list[Tensor]) -> float:
    largest = max((float(a.abs().max()) for a in expected if a.numel()), default=0.0)
    error = max((float((a - b).abs().max()) for a, b in zip(expected, found, strict=True) if a.numel()), default=0.0)
    return error / largest if largest else error


def held_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once; of a tensor that is made of others, of those."""
    held: dict[int, int] = {}
    waiting = [*model.parameters(), *model.buffers()]
    while waiting:
        tensor = waiting.pop()
        if hasattr(tensor, "__tensor_flatten__"):
            waiting += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        elif tensor.numel():
            held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(held.values())


def is_own_sentence(error: BaseException) -> bool:
    """Whether compress itself raised it, and not torch or the model below."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, (TypeError, ValueError)) and frames[-1].filename.startswith(_PACKAGE)


def examine(entry: zoo.Entry, note: Callable[[dict], None]) -> dict:
    """The row of an entry; ``note`` keeps what is known of it so far."""
    model, example = entry.build()
    tensors = example.values() if isinstance(example, dict) else [example]
    rows = ROWS_OF_IMAGES if any(x.dim() >= 4 or x.numel() > 4000 for x in tensors) else ROWS
    data, fresh = (entry.batches(BATCHES, rows, seed=seed) for seed in (1, 2))
    note(
        {
            "stage": "comparing its copy",
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "inputs": {name: list(x.shape) for name, x in example.items()} if isinstance(example, dict) else None,
        }
    )
    before = outputs(model, example)
    try:
        copied = relative_error(before, outputs(copy.deepcopy(model), example))
    except Exception:  # what can't be copied is compress's to say
        copied = None
    note({"copy_error": copied, "stage": "compressing it"})
    begin = time.monotonic()
    try:
        small = torch_sluice.compress(model, example, data, keep=KEEP, progress=False)
    except Exception as error:
        own = is_own_sentence(error)
        reason = " ".join(str(error).split())[:300] if own else zoo_run.describe(error)
        return {"status": "refused" if own else "error", "reason": reason, "seconds": time.monotonic() - begin}
    note({"seconds": time.monotonic() - begin, "stage": "running the result"})
    row = describe_report(small.compression_report)
    bytes_after = held_bytes(small)
    row["bytes"] = bytes_after / max(1, held_bytes(model))
    if row["status"] == "compressed" and row["bytes"] >= 1:
        row |= {"status": "unchanged", "reason": "it takes as many bytes as before"}
    note(row)
    expected = [outputs(model, inputs) for inputs, _ in fresh]
    found = [outputs(small, inputs) for inputs, _ in fresh]
    row["kept_fresh"] = kept = fidelity(expected, found) if _shapes(expected) == _shapes(found) else None
    promised = row["kept"] if row["kept_low"] is None else row["kept_low"]
    wrong = None
    if kept is None:
        wrong = "the result's outputs have other shapes than the model's"
    elif not kept >= KEEP - SLACK:  # what is promised; some of the models hardly vary, so that samples differ by more
        wrong = f"keeps {kept:.4f} on fresh batches, where {KEEP} was asked for, and {promised:.4f} reported"
    elif not promised >= KEEP - SLACK:
        wrong = f"{promised:.4f} was reported to be kept, where {KEEP} was asked for"
    elif abs(small.compression_report.bytes_after - bytes_after) > SLACK * bytes_after:
        wrong = f"reports {small.compression_report.bytes_after} bytes, where its tensors hold {bytes_after}"
    elif copied and copied > EQUAL:
        wrong = f"its copy, which compress works on, gives outputs that differ by {copied:.2g}"
    elif relative_error(before, outputs(model, example)) > EQUAL:
        wrong = "the model that was handed in gives other outputs than before"
    return {**row, **({"status": "error", "reason": wrong} if wrong else {})}


def _shapes(batches: list[list[Tensor]]) -> list[list[torch.Size]]:
    return [[out.shape for out in batch] for batch in batches]


def describe_report(report: Any) -> dict:
    """What a row says of a report, as if all of it were right."""
    by = {action: [d for d in report.layers if d.action == action] for action in ("pruned", "quantized")}
    stayed = [f"{d.name}: {d.reason}" for d in report.layers if d.action in ("kept", "float")]
    compressed = any(by.values())
    reason = "" if compressed else "; ".join([*report.notes, *stayed])[:300]
    return {
        "status": "compressed" if compressed else "unchanged",
        "reason": reason,
        "kept": report.kept,
        "kept_low": getattr(report, "kept_low", None),
        "pruned": [f"{d.name}: {d.before} -> {d.after}" for d in by["pruned"]],
        "quantized": [d.name for d in by["quantized"]],
        "stayed": stayed[:40],
        "notes": report.notes,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = zoo_run.make_parser(__doc__.split("\n\n")[0], seconds=120)
    options = parser.parse_args(arguments)
    rows = zoo_run.run(examine, options)
    if not rows:
        sys.exit(f"no model matches {options.only!r}")
    goals = {"compressed": "at least 80 %", "unchanged": "", "refused": "", "error": "none"}
    zoo_run.print_summary("torch_sluice.compress on every architecture", rows, goals)


if __name__ == "__main__":
    main()
