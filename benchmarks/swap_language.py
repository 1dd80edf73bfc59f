"""SmolLM2-135M through ``torch_sluice.swap_attention``, with every cache that takes it: what a swap changes.

``python -m benchmarks.swap_language --json FILE``. The model and its text are those of benchmarks/models/smollm.py.
With open gates the swapped model is compared with the model as it was: its logits, and what it generates token by
token, greedily, with a cache of the same class. With gates that are closed to a density (drawn and not trained, so
that what is generated says nothing) generating with a cache is compared with the uncached forward of the same gated
model over the same tokens. Where a cache rounds what it keeps, an uncached forward is another thing: there the
reference is that model by transformers alone, with a cache of the same class and the dense formula
(benchmarks/models/gates.py).

A row of ``--json``: ``question`` ("logits" or "generate"), ``cache``, ``gates`` ("open", or the share of pairs that
they keep), ``tokens`` of the prompt, ``padding`` on the left of each row of the batch, ``new`` tokens, ``reference``,
``difference`` (of logits, the largest, relative to the largest logit), ``same_tokens``, ``rounding``, ``status`` and
the facts of the machine. The status is "same" (the same tokens, and logits within 1e-5), "rounds", "differs",
"refused: ..." (by the swapped model alone), or "not run: ..." (the model takes no such cache here: some need
``pip install optimum-quanto hqq``, some a GPU). In a cache that rounds, a last bit decides between two of its steps:
``rounding`` is how far the reference is from itself if it computes scores in one other order, and "rounds" is at most
four times that. It is a rough measure: which values fall on another step is chance, and other orders move others.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.models import smollm
from benchmarks.models.caches import (
    CACHES,
    CacheKind,
    Prompt,
    cut_prompt,
    difference,
    generate,
    logits_of,
    replay,
    uncached,
)
from benchmarks.models.gates import SINKS, WINDOW, ByTransformers, close_gates, compute_backwards, gates_of
from benchmarks.models.task import MissingPackageError
from torch_sluice import restore, swap_attention

TOLERANCE = 1e-5
FARTHER = 4  # times as far as the reference is from itself in another order of additions
QUICK_LAYERS, QUICK_FILES = 2, 40
BEFORE, UNCACHED, ROUNDED = "before the swap", "uncached, same gates", "transformers alone, same gates and cache"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def judge(off: float, same: bool, rounding: float | None) -> str:
    """The status of a row whose logits differ by off, with the same tokens or not."""
    if same and off <= TOLERANCE:
        return "same"
    return "rounds" if rounding is not None and off <= FARTHER * rounding else "differs"


class Comparison:
    """The model as it was, the same weights swapped, and, for gates that are closed, the same by transformers alone."""

    def __init__(self, model: nn.Module, new: int, note: Callable[[dict], None]):
        self.model, self.new, self.note = model, new, note
        self.swapped = self._twin()

    def _twin(self) -> nn.Module:
        """Another model of the same tensors."""
        return copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})

    def compare_logits(self, prompt: Prompt) -> None:
        swap_attention(self.swapped)
        ours, theirs = (logits_of(model, prompt) for model in (self.swapped, self.model))
        restore(self.swapped)
        off = difference(ours, theirs)
        self._note("logits", "none", "open", prompt, BEFORE, off, same=True, new=0)

    def compare_open(self, kinds: list[CacheKind], prompt: Prompt) -> None:
        swap_attention(self.swapped)
        other = compute_backwards(self._twin())
        for kind in kinds:
            self._compare(kind, "open", prompt, BEFORE, self._replay(self.model), self._replay(other))
        restore(self.swapped)

    def compare_closed(self, kinds: list[CacheKind], prompt: Prompt, density: float) -> None:
        swap_attention(self.swapped, target_density=density, window=WINDOW, sinks=SINKS)
        kept = round(close_gates(self.swapped, prompt.tokens[:1], density), 4)
        gates = gates_of(self.swapped)
        plain, other = (ByTransformers(self._twin(), gates, backwards) for backwards in (False, True))

        def by_itself(_, prompt: Prompt, tokens: Tensor) -> tuple[Tensor, Tensor]:
            return uncached(self.swapped, prompt, tokens)

        for kind in kinds:
            if kind.rounds:
                self._compare(kind, kept, prompt, ROUNDED, self._replay(plain), self._replay(other))
            else:
                self._compare(kind, kept, prompt, UNCACHED, by_itself)
        restore(self.swapped)

    def _make_cache(self, kind: CacheKind, prompt: Prompt):
        import transformers

        return kind.make(transformers, self.model.config, len(prompt.tokens), prompt.tokens.shape[1] + self.new)

    def _replay(self, model: nn.Module | ByTransformers) -> Callable:
        def compute(kind: CacheKind, prompt: Prompt, tokens: Tensor) -> tuple[Tensor, Tensor]:
            inner = model
            if isinstance(model, ByTransformers):
                model.forget()
                inner = model.model
            return replay(inner, prompt, tokens, self._make_cache(kind, prompt))

        return compute

    def _compare(self, kind: CacheKind, gates, prompt: Prompt, reference: str, compute, compute_otherwise=None) -> None:
        """compute(kind, prompt, tokens) gives what is right; compute_otherwise the same in another order of additions,
        for caches that round: there a last bit decides between two steps of the cache."""
        off, same, rounding, status = None, False, None, ""
        try:
            tokens, logits = generate(self.swapped, prompt, self.new, self._make_cache(kind, prompt))
        except Exception as error:
            status = f"refused: {_reason(error)}"
            try:
                generate(self.model, prompt, self.new, self._make_cache(kind, prompt))
            except Exception as reason:  # whatever it is that keeps this cache from the model
                status = f"not run: {_reason(reason)}"
        else:
            wanted, expected = compute(kind, prompt, tokens)
            off, same = difference(logits, expected), torch.equal(tokens, wanted)
            if kind.rounds:
                rounding = difference(compute_otherwise(kind, prompt, tokens)[1], expected)
        self._note("generate", kind.name, gates, prompt, reference, off, same, self.new, status, rounding)

    def _note(self, question, cache, gates, prompt, reference, off, same, new, status="", rounding=None) -> None:
        status = status or judge(off, same, rounding)
        self.note(
            {
                "question": question, "cache": cache, "gates": gates, "tokens": prompt.tokens.shape[1],
                "padding": prompt.padding, "new": new, "reference": reference, "status": status, "difference": off,
                "same_tokens": same, "rounding": rounding,
            }
        )  # fmt: skip


def measure(options, machine: dict) -> list[dict]:
    import transformers

    transformers.logging.set_verbosity_error()
    model, tokenizer = smollm.load_model(QUICK_LAYERS if options.quick else None)
    longest = max(options.tokens)
    files = QUICK_FILES if options.quick else None
    window = smollm.load_windows(tokenizer, "heldout", 1, longest + 7, files)[0][0][0]
    rows: list[dict] = []

    def note(row: dict) -> None:
        rows.append({**row, **machine})
        off = "" if row["difference"] is None else f" {row['difference']:.2g}"
        off += "" if row["rounding"] is None else f" (rounding {row['rounding']:.2g})"
        print(
            f"{row['question']}, cache {row['cache']}, gates {row['gates']}, {len(row['padding'])} x {row['tokens']} "
            f"tokens: {row['status']}{off}",
            file=sys.stderr,
            flush=True,
        )

    comparison = Comparison(model, options.new, note)
    kinds = [kind for kind in CACHES if options.cache is None or kind.name in options.cache]
    try:
        for tokens in options.tokens:
            prompt = cut_prompt(window, tokens, [0] if tokens > options.longest_batch else [0, tokens // 5])
            comparison.compare_logits(prompt)
            comparison.compare_open(kinds, prompt)
            comparison.compare_closed(kinds, prompt, options.density)
    finally:
        harness.write_json(options.json, rows)
    return rows


def print_rows(rows: list[dict]) -> None:
    harness.print_rows(
        "SmolLM2-135M after swap_attention: the largest difference of logits, relative",
        rows,
        {
            "": lambda r: r["question"],
            "cache": lambda r: r["cache"],
            "gates": lambda r: str(r["gates"]),
            "tokens": lambda r: f"{len(r['padding'])} x {r['tokens']}",
            "difference": lambda r: "-" if r["difference"] is None else f"{r['difference']:.2g}",
            "rounding": lambda r: "-" if r["rounding"] is None else f"{r['rounding']:.2g}",
            "status": lambda r: r["status"].partition(":")[0],
        },
    )


def parse_options(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file, one a line")
    parser.add_argument("--threads", type=harness._positive, default=2, help="threads of torch")
    parser.add_argument("--quick", action="store_true", help="two layers and short prompts: a look, not a measurement")
    parser.add_argument("--tokens", type=harness._positive, nargs="+", default=[512, 4096], help="of the prompts")
    parser.add_argument(
        "--longest-batch", type=int, default=1024, help="tokens up to which there are two rows, one of them padded"
    )
    parser.add_argument("--new", type=harness._positive, default=16, help="tokens that are generated")
    parser.add_argument("--density", type=float, default=0.2, help="share of the far pairs that closed gates keep")
    parser.add_argument("--cache", nargs="+", choices=[kind.name for kind in CACHES], help="only these")
    options = parser.parse_args(arguments)
    if not 0 < options.density <= 1:
        parser.error(f"--density is {options.density}, expected a share in (0, 1]")
    if options.quick:
        options.tokens, options.new = [48, 160], min(options.new, 4)
        options.longest_batch = 100
    return options


def main(arguments=None) -> int:
    options = parse_options(arguments)
    machine = harness.describe_machine(options.threads)
    harness.print_machine(machine)
    try:
        rows = measure(options, machine)
    except MissingPackageError as problem:
        harness.console.print(f"smollm is left out: {problem}", highlight=False, markup=False)
        return 0
    print_rows(rows)
    return int(any(row["status"].partition(":")[0] in ("differs", "refused") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
