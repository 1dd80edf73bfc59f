"""Swaps the attention of one small model with random weights of every architecture, and compares it with the original.

``python -m benchmarks.swap_zoo --json FILE``: the models are those of benchmarks/zoo.py, each in a process of its own
with a limit of time and memory. A row: ``model``, ``family``, ``status``, ``reason``, ``seconds``, ``swapped`` (kind ->
class -> how many layers), ``calls`` (of attention that ran on the operator), ``difference`` (the largest of any answer,
relative to its largest number, float32), ``asked`` (what was compared), ``unasked`` (what the original does not answer,
and why), ``gates`` (see below).

Asked are: outputs, also for rows that are padded on the left, at the padding too; gradients of all parameters; tokens
and scores of greedy generation with a cache, from whole and padded prompts; attention weights. Statuses:

- ``exact``: all answers of the model with open gates are within 1e-5 of the original's (gradients: 1e-4), and after
  ``restore`` every bit is what it was. Where an answer is farther because the model magnifies rounding, the two must
  agree within 1e-10 in float64, and the swapped model's float32 answer be at most four times as far from that as the
  original's; where a model knows no float64, at most four times as far from "sdpa" as "eager" is. The reason then gives
  the figures.
- ``refused``: ``swap_attention`` raised ValueError, and the model answers as before.
- ``error``: anything else. ``unbuilt``: no small model could be made; it counts for nothing.

``gates`` says the same of gates whose window spans all tokens, so that nothing is gated and the answers must stay,
within ten times that: ``exact``, ``refused: ...`` at the swap, ``refused at the call: ...``, or ``error: ...``.
"""

import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks import zoo, zoo_run
from torch_sluice import gate_parameters, restore, swap_attention
from torch_sluice.swap import call

TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
ROUNDING, FARTHER = 1e-10, 4
COARSER = 10  # for gates that gate nothing: by how much
EVERYTHING_NEAR = 10**6  # window of gates that gate nothing
NEW_TOKENS = 4


def tolerance(question: str) -> float:
    return GRADIENT_TOLERANCE if question == "gradients" else TOLERANCE


@torch.no_grad()
def _outputs(model: nn.Module, inputs, **more) -> list[Tensor]:
    torch.manual_seed(0)
    if more:
        inputs = {**inputs, **more}
    return [x.clone() for x in zoo.outputs_of(zoo.call(model, inputs))]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of any two tensors relative to the largest number; inf where shapes or NaNs differ."""
    if len(ours) != len(theirs):
        return float("inf")
    worst = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        if mine.shape != other.shape:
            return float("inf")
        finite = other.isfinite()
        if not torch.equal(mine[~finite].nan_to_num(7.0), other[~finite].nan_to_num(7.0)):
            return float("inf")
        if finite.any():
            scale = other[finite].abs().max().clamp(min=1e-12)
            worst = max(worst, float((mine[finite] - other[finite]).abs().max() / scale))
    return worst if worst == worst else float("inf")


def _gradients(model: nn.Module, inputs) -> list[Tensor]:
    """Of the outputs' mean squares by all parameters, as one tensor: some are nothing but rounding (keys' biases)."""
    torch.manual_seed(0)
    outputs = [out for out in zoo.outputs_of(zoo.call(model, inputs)) if out.requires_grad]
    gates = {id(p) for p in gate_parameters(model)}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in gates]
    found = torch.autograd.grad(sum(out.square().mean() for out in outputs), parameters, allow_unused=True)
    return [torch.cat([g.flatten() for g in found if g is not None])]


@torch.no_grad()
def _generate(model: nn.Module, inputs: dict) -> list[Tensor]:
    """Tokens that follow greedily, and the scores by which they were chosen."""
    torch.manual_seed(0)
    if model.config.is_encoder_decoder and model.generation_config.decoder_start_token_id is None:
        inputs = {**inputs, "decoder_start_token_id": 0}
    out = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    return [out.sequences.double(), *out.scores]


def _questions(entry: zoo.Entry, model: nn.Module, example, dtype: torch.dtype = torch.float32) -> dict:
    """name -> function of the model that gives tensors."""

    def fresh(inputs):  # some models write into them
        return pytree.tree_map_only(
            Tensor, lambda x: x.to(dtype if x.dtype == torch.float32 else x.dtype, copy=True), inputs
        )

    batches = [inputs for inputs, _ in entry.batches(2)]
    questions = {"outputs": lambda m: _outputs(m, fresh(example))}
    for number, inputs in enumerate(batches):
        questions[f"outputs of batch {number}"] = lambda m, inputs=inputs: _outputs(m, fresh(inputs))
    questions["gradients"] = lambda m: _gradients(m, fresh(example))
    if isinstance(example, dict):
        questions["attention weights"] = lambda m: _outputs(m, fresh(example), output_attentions=True)
        if entry.can_generate:
            for number, inputs in enumerate(batches):
                inputs = {name: x for name, x in inputs.items() if not name.startswith(("decoder_", "labels"))}
                questions[f"generation of batch {number}"] = lambda m, inputs=inputs: _generate(m, fresh(inputs))
    return questions


def _answers(model: nn.Module, questions: dict) -> tuple[dict, dict]:
    """The answers of the unswapped model, and why there is none to a question: then it isn't asked of the swapped."""
    answers, failed = {}, {}
    for name, ask in questions.items():
        try:
            answers[name] = ask(model)
            again = ask(model)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        if distance(again, answers[name]) > 0:
            del answers[name]
            failed[name] = "the unswapped model answers differently each time"
    return answers, failed


class _Counted:
    """Counts the calls that run on the operator."""

    def __enter__(self):
        self.calls, self.original = 0, call.gated_attention
        call.gated_attention = self
        return self

    def __call__(self, *arguments, **options):
        self.calls += 1
        return self.original(*arguments, **options)

    def __exit__(self, *_):
        call.gated_attention = self.original


def examine(entry: zoo.Entry, note: Callable[[dict], None] = lambda more: None) -> dict:
    """The row of one architecture, without what zoo_run adds."""
    model, example = entry.build()
    questions = _questions(entry, model, example)
    note({"stage": "asking the original"})
    answers, unasked = _answers(model, questions)
    row = {"swapped": {}, "calls": 0, "difference": None, "asked": list(answers), "unasked": unasked, "gates": ""}
    note({**row, "stage": "swapping"})
    try:
        swap_attention(model)
    except ValueError as error:
        wrong = _differences(model, questions, answers, 0.0)
        return row | _status("refused", str(error), [f"{name} after a swap that was refused" for name in wrong])
    swap = model._sluice_swap
    kinds = {"transformers": swap.layers, "multihead": [m for m, *_ in swap.multiheads], "sdpa": swap.owners}
    row["swapped"] = {kind: dict(Counter(type(m).__name__ for m in found)) for kind, found in kinds.items() if found}
    with _Counted() as counted:
        found = {name: distance(questions[name](model), right) for name, right in answers.items()}
    row |= {"calls": counted.calls, "difference": max(found.values(), default=None)}
    rounding = _rounding(entry, [name for name, off in found.items() if off > tolerance(name)])
    wrong = [f"{name}: {off:.2g}" for name, off in found.items() if off > tolerance(name) and name not in rounding]
    note({**row, "stage": "restoring"})
    restore(model)
    wrong += [f"{name} after restore" for name in _differences(model, questions, answers, 0.0)]
    row["gates"] = _gates(model, questions, answers)
    reason = "; ".join(rounding.values()) if counted.calls else "no call ran on the operator"
    return row | _status("exact", reason, wrong)


def _rounding(entry: zoo.Entry, names: list[str]) -> dict[str, str]:
    """Those answers that differ by rounding alone, and the figures that say so."""
    if not names:
        return {}
    model, example = entry.build()
    questions = _questions(entry, model, example)
    single = {name: questions[name](model) for name in names}
    swap_attention(model)
    swapped = {name: questions[name](model) for name in names}
    restore(model)
    questions = _questions(entry, model.double(), example, torch.float64)
    try:
        double = {name: questions[name](model) for name in names}
        swap_attention(model)
        apart = {name: distance(questions[name](model), double[name]) for name in names}
    except RuntimeError:  # it has operators that know no float64
        return _rounding_of_its_own(entry, single, swapped)
    found = {}
    for name in names:
        before, after = (distance([x.double() for x in xs], double[name]) for xs in (single[name], swapped[name]))
        if apart[name] <= ROUNDING and after <= FARTHER * before:
            found[name] = (
                f"{name}: in float32 the original is {before:.2g} from its float64 self, the swapped {after:.2g}; in "
                f"float64 they differ by {apart[name]:.2g}"
            )
    return found


def _rounding_of_its_own(entry: zoo.Entry, single: dict, swapped: dict) -> dict[str, str]:
    """The same by what lies between "sdpa" and "eager", two ways that transformers has to compute one thing."""
    model, example = entry.build()
    questions = _questions(entry, model, example)
    model.set_attn_implementation("eager")
    found = {}
    for name, right in single.items():
        own, ours = distance(questions[name](model), right), distance(swapped[name], right)
        if ours <= FARTHER * own:
            found[name] = f"{name}: the swapped model is {ours:.2g} from the original, its own 'eager' {own:.2g}"
    return found


def _status(status: str, reason: str, wrong: list[str]) -> dict:
    return (
        {"status": "error", "reason": f"differs: {', '.join(wrong)}"} if wrong else {"status": status, "reason": reason}
    )


def _differences(model: nn.Module, questions: dict, answers: dict, tolerance: float) -> list[str]:
    return [name for name, right in answers.items() if distance(questions[name](model), right) > tolerance]


def _gates(model: nn.Module, questions: dict, answers: dict) -> str:
    try:
        swap_attention(model, target_density=0.5, window=EVERYTHING_NEAR)
    except ValueError as error:
        return f"refused: {error}"
    wrong, refused = [], []
    for name, right in answers.items():
        try:
            off = distance(questions[name](model), right)
        except ValueError as error:
            refused.append(f"{name}: {error}")
        except Exception as error:
            wrong.append(f"{name}: {zoo_run.describe(error)}")
        else:
            wrong += [f"{name} differ by {off:.2g}"] if off > COARSER * tolerance(name) else []
    restore(model)
    if wrong:
        return f"error: {'; '.join(wrong)}"
    return f"refused at the call: {refused[0]}" if refused else "exact"


def main() -> int:
    options = zoo_run.make_parser(__doc__.splitlines()[0], seconds=120).parse_args()
    rows = zoo_run.run(examine, options)
    goals = {"exact": "", "refused": "with a sentence, at the swap", "error": "never"}
    zoo_run.print_summary("swap_attention with open gates", rows, goals)
    gates = Counter(row["gates"].partition(":")[0] for row in rows if row.get("gates"))
    print("gates that gate nothing:", ", ".join(f"{count} {status}" for status, count in gates.most_common()))
    return int(any(row["status"] == "error" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
