"""The stages of a compression: measure, find channels, prune, quantise, report."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from torch_sluice._memory import release_memory
from torch_sluice.compress.calling import (
    check_example,
    copy_model,
    describe_error,
    evaluating,
    give_copies,
    give_inputs,
    writes_into_inputs,
)
from torch_sluice.compress.candidates import Layers, Stage, Workshop
from torch_sluice.compress.changes import describe_changes
from torch_sluice.compress.compensation import reading_layers
from torch_sluice.compress.estimate import Score, failed, with_jump
from torch_sluice.compress.first_pass import PLENTY, FirstPass, moment_seconds, run_first
from torch_sluice.compress.graph import ChannelGroup, find_groups
from torch_sluice.compress.latency import compare_latency, measure_latency
from torch_sluice.compress.measure import Measure
from torch_sluice.compress.moments import count_moment_bytes, join
from torch_sluice.compress.norm_scale import norms_of
from torch_sluice.compress.progress import Progress
from torch_sluice.compress.pruning import Pruner
from torch_sluice.compress.quantising import find_layers, quantise
from torch_sluice.compress.remember import Calls
from torch_sluice.compress.report import CompressionReport, LayerDecision, count_bytes
from torch_sluice.compress.stages import SLACK, describe_pruning, find_stages

_PROVED, _ROWS_PROVED = 2, 2  # pieces of data on which groups are proved, beside the example, and samples of each
_COMPARED = 0.1  # of a run over data, that it takes to see what a group costs, before that is known
_SCORES = 2.0  # times that all data runs while channels are chosen, or layers, on average
_MOST_KEPT = 1 << 26  # bytes of quantised weights that are kept while channels are cut, and not found again
_MOST_MOMENTS = 1 << 26  # bytes for which data is divided into more than two folds
_QUICK = 0.7  # of the original's time, in which a quantised model has to run data to be measured in place of it
_RISE = 1.2  # a metric that a candidate raises by this is looked at twice


@dataclass
class Settings:
    """What ``compress`` was asked for, checked."""

    keep: float
    policy: str
    budget: float | None
    prune: bool
    quantize: bool
    finetune: Callable[[nn.Module, int], None] | None
    finetune_steps: int
    round_to: int
    compensate: bool
    quantize_options: dict[str, Any]
    may_relax: bool  # whether activations may take fewer bits than the options say


class Run:
    """One compression: what was measured so far, and what was found."""

    def __init__(self, model: nn.Module, example_inputs: Any, data, metric, settings: Settings, progress: Progress):
        self.begin, self.settings, self.progress = time.monotonic(), settings, progress
        self.original = copy_model(model, share=True)
        self.example = example_inputs
        if writes_into_inputs(self.original, example_inputs):
            give_copies(self.original)
        with evaluating(self.original):
            check_example(self.original, example_inputs)
        self.notes: list[str] = []
        self.layers: list[LayerDecision] = []
        self.groups: list[ChannelGroup] = []
        self.pruner: Pruner | None = None
        self.first: FirstPass | None = None
        self.beside: Layers | None = None  # with which pruned models are measured
        self.score_seconds = 0.0  # that measuring one of them on all data takes
        self.of_original: tuple[Layers, list[LayerDecision]] | None = None  # once they were looked for
        self.evaluations = 0
        self.failures: Counter[str] = Counter()
        progress.start("looking at data")
        progress.step()
        self.call_seconds = measure_latency(self.original, example_inputs, 7, 0.3).median
        self.measure = Measure(self.original, data, metric, self._look_first)
        release_memory()
        if not self.measure.remembers:  # moments beside what a metric makes of large outputs would be too much
            self._record(self.measure, Calls(most_bytes=0))
        self.notes = self.measure.notes + self.notes
        self.score_seconds = self.measure.seconds
        self._foresee_rest(self.measure.seconds, len(self.groups) * self.measure.compared_share)

    def _look_first(self, measure: Measure, calls: Calls) -> None:
        """Finds channels, and runs the original over data, before the metric looks at what it returns."""
        self._foresee_first(measure.predicted_seconds)
        if self.settings.prune:
            self._find_channels(measure)
            release_memory()
        if measure.remembers:
            self._record(measure, calls)
        self.progress.start("measuring the model")
        self.progress.step()

    def finish(self) -> nn.Module:
        """The result, with its report."""
        settings, score = self.settings, Score(1.0, 1.0, self.measure.samples)
        stages, curves = [Stage({})], []
        if self.pruner is not None:
            self._settle_moments()
            self.pruner.time_layers(self.example)
        self.workshop = Workshop(self.original, self.pruner)
        if self.pruner is not None:
            floor = self._floor_of_pruning()
            release_memory()
            stages, curves, score = find_stages(self, floor)
            if len(stages) == 1:  # nothing is cut: what would make up for it is as large as the model may be
                self.pruner.forget_data()
        stage, result = stages[-1], None
        if settings.quantize:
            stage, result, score = quantise(self, stages, score)
        if result is None:
            stage, score = self._confirm(stages[: stages.index(stage) + 1], score)
        if result is not None or stage is not stages[0]:
            score = with_jump(score, self.measure.jump)  # candidates that came after it may have shown more
            if score.low < settings.keep - SLACK:
                stage, result = stages[0], None
        if self.pruner is not None:
            describe_pruning(self, stage.kept, {curve.group: curve for curve in curves})
        return self._report(stage, result, score)

    def _confirm(self, stages: list[Stage], score: Score) -> tuple[Stage, Score]:
        """The last stage that keeps enough on all data: stages are found in a hurry."""
        while len(stages) > 1:
            if score.samples < self.measure.samples:
                score = self.score(stages[-1], None, self.settings.keep - SLACK)
            if score.low >= self.settings.keep - SLACK:
                return stages[-1], score
            stages, score = stages[:-1], Score(0.0, 0.0)  # of no sample
        return stages[0], Score(1.0, 1.0, self.measure.samples)

    def _foresee_first(self, seconds: float) -> None:
        """What phases before the metric is read will take, as far as that can be told from the time of a call and of
        a run over data."""
        layers = sum(isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) for m in self.original.modules())
        if self.settings.prune:
            self.progress.foresee("finding channels", 4 * layers * self.call_seconds)
            if self.settings.compensate:
                self.progress.foresee("measuring", 1.5 * seconds)
        self._foresee_rest(seconds, layers / 2 * _COMPARED if self.settings.prune else 0)

    def _foresee_rest(self, seconds: float, compared: float) -> None:
        """The phases behind that. ``compared``: how often the data runs to see what groups cost, where all of it that
        is looked at is needed."""
        if compared:
            if self.settings.policy == "sensitivity":
                self.progress.foresee("sensitivity of", compared * seconds / 2)
            self.progress.foresee("pruning", 0.7 * seconds)  # as candidates are smaller, and not all data is needed
        if self.settings.quantize:
            self.progress.foresee("timing", 2 * 3 * 6 * self.call_seconds)
            self.progress.foresee("quantising", 0.8 * seconds)
        self.progress.foresee("measuring the result", 0.3 * seconds + min(2.0, 60 * self.call_seconds))

    @property
    def loss_seconds(self) -> float:
        """That comparing the outputs of a candidate takes."""
        return self.measure.seconds * self.measure.compared_share

    def _find_channels(self, measure: Measure) -> None:
        leaves = sum(isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) for m in self.original.modules())
        self.progress.start("finding channels", max(1, leaves))
        few = [piece.head(_ROWS_PROVED) for piece in measure.pieces[:_PROVED]]
        self.groups, notes = find_groups(self.original, self.example, self.progress.step, few)
        self.notes += notes
        if self.groups:
            self.pruner = Pruner.with_scores(self.original, self.groups, self.settings.policy)

    def _record(self, measure: Measure, calls: Calls) -> None:
        """What compensation is fitted to."""
        if self.pruner is None or not self.settings.compensate:
            return
        readers, norms = reading_layers(self.original, self.groups), norms_of(self.original, self.groups)
        if len(measure.folds) > 2 and count_moment_bytes(self.original, readers) * len(measure.folds) > max(
            _MOST_MOMENTS, count_bytes(self.original)
        ):
            measure.merge_folds()
        if len(measure.folds) < 2:
            readers = []
        self.progress.foresee("measuring", measure.predicted_seconds + moment_seconds(self.original, readers))
        self.progress.start("measuring", len(measure.pieces))
        try:
            self.first = run_first(self.original, measure.pieces, readers, norms, calls, self.progress.step)
        except Exception as error:  # a metric that calls the model otherwise than model(inputs)
            why = f"the model does not run on data: {describe_error(error)}"
            self.notes += [f"channels are not compensated: {why}"] * bool(readers)
            self.notes += [f"norms keep their weights: {why}"] * bool(norms)

    def _settle_moments(self) -> None:
        """Moments by the folds that the metric can be had on."""
        first, measure, pruner = self.first, self.measure, self.pruner
        if first is None:
            return
        pruner.norms = first.norms
        if len(measure.folds) < 2:
            self.notes.append(
                "channels are not compensated: data cannot be divided into parts to fit to and to measure on"
            )
            return
        moments = join(list(first.folds.values()))
        if len(measure.folds) > 2 and moments.rows_for_unknown() > PLENTY:
            measure.merge_folds()
        folds = first.by_folds(len(measure.folds))
        self.first = None
        for fold in folds.values():
            fold.forget_products(moments.refused)
        pruner.moments, pruner.folds = moments, folds
        if moments.refused:
            few = ", ".join(sorted(moments.refused))
            self.notes.append(f"compensated by means alone, because data has too few independent rows: {few}")

    def score(
        self, stage: Stage, layers: Layers | None = None, floor: float | None = None, hurry: bool = False
    ) -> Score:
        """What a candidate keeps: where data shaped it, of data that did not. In a hurry of part of the data, where
        that shows that it keeps the floor."""
        self.evaluations += 1
        if self.workshop.is_fitted(stage):
            score = self.measure.score_folds(lambda fold: self.workshop.made(stage, fold, layers), floor, hurry)
        else:
            try:
                with self.workshop.made(stage, None, layers) as candidate:
                    score = self.measure.score(candidate, floor, hurry)
            except Exception as error:
                score = failed(describe_error(error))
        if score.reason is not None:
            self.failures[score.reason] += 1
        return score

    def loss(self, stage: Stage, layers: Layers | None) -> tuple[float, str | None]:
        self.evaluations += 1
        left_out = self.measure.folds[-1] if self.workshop.is_fitted(stage) else None
        try:
            with self.workshop.made(stage, left_out, layers) as candidate:
                return self.measure.loss(candidate)
        except Exception as error:
            return float("inf"), describe_error(error)

    def _floor_of_pruning(self) -> float:
        """What pruned models have to keep. Where layers that are quantised cost little and run data faster, models
        are measured with these; else what quantising costs by itself is left over for it."""
        keep = self.settings.keep
        if not self.settings.quantize:
            return keep
        begin = time.monotonic()
        layers, stay = find_layers(self, Stage({}))
        if sum(c.weight.nbytes for whole in layers.chosen for c in whole.all()) <= _MOST_KEPT:
            self.of_original = layers, stay
        looked = time.monotonic()
        self.progress.foresee("timing", looked - begin)  # of the pruned model
        if not layers.chosen:
            return keep
        self.evaluations += 1
        try:
            with self.workshop.made(Stage({}), None, layers) as candidate:
                score = self.measure.glance(candidate)
        except Exception as error:
            score = failed(describe_error(error))
        if score.reason is not None:
            self.failures[score.reason] += 1
        seconds, lost = time.monotonic() - looked, max(0.0, 1 - score.kept)
        whole = seconds * self.measure.samples / max(1, score.samples)
        self.progress.foresee("quantising", _SCORES * whole)
        self.progress.foresee("measuring the result", 0.6 * whole + min(2.0, 60 * self.call_seconds))
        quick = whole < _QUICK * self.measure.seconds
        if self.of_original is not None and quick and lost <= (1 - keep) / 2 and self.settings.finetune is None:
            self.beside, self.score_seconds = replace(layers, packed=False), whole
            return keep
        return min(1.0, keep + min(lost, (1 - keep) / 2))

    def _report(self, stage: Stage, result: nn.Module | None, score: Score) -> nn.Module:
        self.progress.start("measuring the result")
        self.progress.step()
        changed = result is not None or stage.kept or stage.trained is not None
        reason, before, after = None, None, None
        if changed:
            try:
                result = self.workshop.build(stage) if result is None else result
                # It was fitted to all data, and its parts to halves: that it runs on all is seen, not inferred.
                if self.workshop.is_fitted(stage):
                    reason = self.measure.score(result.eval()).reason
                before, after = compare_latency(self.original, result.eval(), self.example)
            except Exception as error:
                reason = describe_error(error)
            if reason is not None:
                self.failures[reason] += 1
        if not changed or reason is not None:
            self.notes.append(self._why_nothing())
            result, score = copy_model(self.original), Score(1.0, 1.0, self.measure.samples)
            before = after = measure_latency(self.original, self.example)
            for layer in self.layers:
                if layer.action in ("pruned", "quantized", "folded"):
                    layer.action, layer.after = ("kept" if layer.action == "pruned" else "float"), None
        elif after.median >= before.median:
            self.notes.append("the result is smaller, but was not measured to be faster on this machine")
        if score.kept > _RISE:
            self.notes.append(
                f"the metric rose to {score.kept:.0%} of the original's: if lower is better, it is a loss, of which "
                "exp(-loss) can be kept"
            )
        if self.measure.jump:
            self.notes.append(
                "some candidates changed the outputs of a sample altogether and of most others not at all, as where a "
                "model ranks: that this is not seen is only sure with more data"
            )
        for text, count in self.failures.most_common(5):
            self.notes.append(f"{count} candidate{'s' if count > 1 else ''} left out, which failed: {text}")
        give_inputs(result.eval())
        result.compression_report = CompressionReport(
            keep=self.settings.keep, policy=self.settings.policy, metric_name=self.measure.name,
            metric_before=self.measure.original, metric_after=score.kept * self.measure.original,
            latency_before=before.median, latency_after=after.median, latency_p95_before=before.p95,
            latency_p95_after=after.p95, bytes_before=count_bytes(self.original), bytes_after=count_bytes(result),
            threads=torch.get_num_threads(), kept=score.kept, kept_low=score.low, samples=self.measure.samples,
            uncertainty_known=score.known, layers=self.layers, notes=list(dict.fromkeys(self.notes)),
            seconds=time.monotonic() - self.begin, evaluations=self.evaluations,
            changes=describe_changes(self.original, result),
        )  # fmt: skip
        return result

    def _why_nothing(self) -> str:
        text = f"nothing was found that keeps {self.settings.keep:.1%} of the metric"
        if self.pruner is None and not any(layer.action == "float" for layer in self.layers):
            text = "the model has no layer that could be pruned or quantised"
        return f"{text}: this is a copy of the original model"
