"""The part of a compression that quantises: finds which layers win by it, chooses as many as the metric allows, and
takes fewer bits for all of them where that is as good."""

from typing import TYPE_CHECKING

from torch import nn

from torch_sluice.compress import quantization, widths
from torch_sluice.compress.calling import describe_error
from torch_sluice.compress.candidates import Layers, Stage
from torch_sluice.compress.choice import choose_layers
from torch_sluice.compress.estimate import Score
from torch_sluice.compress.folding import find_pairs
from torch_sluice.compress.report import LayerDecision
from torch_sluice.compress.stages import SLACK

if TYPE_CHECKING:
    from torch_sluice.compress.run import Run


def find_layers(run: "Run", stage: Stage) -> tuple[Layers, list[LayerDecision]]:
    """What could be done to a stage's layers, and why others stay. No copy is made."""
    if not stage.kept and stage.trained is None and run.of_original is not None:
        return run.of_original
    layers, stay = Layers(), []
    try:
        with run.workshop.made(stage, None) as model:
            pairs = find_pairs(model, run.example)
        layers = Layers(pairs)
        options = run.settings.quantize_options
        with run.workshop.made(stage, None, layers) as folded:
            candidates, stay = quantization.find_candidates(folded, run.example, options, run.progress)
        layers = Layers(pairs, candidates, options)
    except Exception as error:  # code in the model that looks into its layers
        run.notes.append(f"not quantised: the model fails with quantised layers: {describe_error(error)}")
    return layers, stay


def quantise(run: "Run", stages: list[Stage], score: Score) -> tuple[Stage, nn.Module | None, Score]:
    """The last stage that keeps enough when quantised; layers stay in floating point where it takes that."""
    floor = run.settings.keep - SLACK
    for stage in reversed(stages[-3:]):
        found, stay = find_layers(run, stage)

        def layers(chosen, finer=(), found=found):
            return Layers(found.pairs, chosen, found.options, finer=frozenset(c.name for c in finer))

        def choose(hurry, stage=stage, found=found, layers=layers):
            return choose_layers(
                found.chosen,
                lambda some, finer: run.score(stage, layers(some, finer), floor, hurry),
                lambda some: run.loss(stage, layers(some)),
                floor,
                run.progress,
                lambda some: _find_finer(run, stage, layers(some)),
            )

        choice = choose(hurry=True)
        if choice.chosen and choice.score.samples < run.measure.samples:
            choice.score = run.score(stage, layers(choice.chosen, choice.finer), floor)
            if choice.score.low < floor:
                choice = choose(hurry=False)
        chosen, best = choice.chosen, choice.score
        lost = sum(c.before - c.after for c in found.chosen) - sum(c.before - c.after for c in chosen)
        won = sum(c.before - c.after for c in found.chosen)
        if stage is not stages[0] and won > 0 and lost > 0.5 * won:
            continue  # pruning took what quantising needs: try with less of it
        break
    run.layers += stay + choice.stay
    if best is None and found.pairs:  # folded alone
        best = run.score(stage, Layers(found.pairs), floor)
    if best is None or best.low < floor:  # folding alone moves the last bits of a metric at its limit
        if found.chosen:
            run.notes.append(f"not quantised: {run.settings.keep:.1%} of the metric would not be sure")
        return (stage, None, score) if stage is stages[-1] else (stages[-1], None, score)
    try:
        with run.workshop.made(stage, None, Layers(found.pairs)) as folded:
            with widths.with_sqnr(choice.finer, lambda width: widths.FINER_SQNR):
                result = quantization.apply(folded, chosen)
    except Exception as error:
        run.failures[describe_error(error)] += 1
        return stages[-1], None, score
    run.layers += [LayerDecision(norm, "folded", "into the layer before it") for _, norm in found.pairs]
    finer = layers(chosen, choice.finer).finer
    for c in chosen:
        reason, after = "for its bytes", c.after
        if not c.is_looked_up:
            after = c.finer if c.name in finer else c.after
            reason = f"measured {c.before * 1e6:.0f} -> {after * 1e6:.0f} µs"
            reason = reason if c.is_faster else f"for its bytes, {reason}"
            if c.name in finer:
                reason += ", with finer activations for the metric's sake"
        run.layers.append(LayerDecision(c.name, "quantized", reason, None, None, c.before - after))
    if run.settings.may_relax and chosen and not choice.finer:
        result, best = _relax(run, result, stage, layers(chosen), best, floor)
    return stage, result, best


def _find_finer(run: "Run", stage: Stage, layers: Layers) -> list[quantization.Candidate]:
    """Those of the layers that finer activations may help."""
    if not run.settings.may_relax:  # the user said how fine
        return []
    try:
        with run.workshop.made(stage, None, Layers(layers.pairs)) as folded:
            return widths.find_finer(folded, list(layers.chosen), run.example, run.progress)
    except Exception as error:
        run.failures[describe_error(error)] += 1
        return []


def _relax(run: "Run", result: nn.Module, stage: Stage, layers: Layers, score: Score, floor: float):
    run.progress.start("relaxing")
    run.progress.step("fewer bits")
    try:
        relaxed = widths.relax(result, run.example)
    except Exception as error:
        run.failures[describe_error(error)] += 1
        return result, score
    if relaxed is None:
        return result, score
    layers.target_sqnr = widths.RELAXED_SQNR
    found = run.score(stage, layers, floor)
    if found.low < floor:
        return result, score
    run.notes.append(f"activations take fewer bits than by default: {relaxed[1]:.2f} times as fast")
    return relaxed[0], found
