"""The stages of a compression: measure, find channels, prune, quantise, report."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
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
from torch_sluice.compress.estimate import Score, failed
from torch_sluice.compress.graph import ChannelGroup, find_groups
from torch_sluice.compress.latency import compare_latency, measure_latency
from torch_sluice.compress.measure import Measure
from torch_sluice.compress.moments import count_moment_bytes, join, measure_moments
from torch_sluice.compress.norm_scale import measure_norms, norms_of
from torch_sluice.compress.progress import Progress
from torch_sluice.compress.pruning import Pruner
from torch_sluice.compress.quantising import find_layers, quantise
from torch_sluice.compress.report import CompressionReport, LayerDecision, count_bytes
from torch_sluice.compress.stages import describe_pruning, find_stages

_PROVED = 2  # pieces of data on which groups are proved, beside the example
_SCALED = 16  # pieces of data that say how large a norm's channels are: one number for each norm
_ENOUGH = 32  # rows for each unknown, in all, beyond which more are not worth their time
_PLENTY = 16  # rows for each unknown, of which half are as good
_MOST_KEPT = 1 << 26  # bytes of quantised weights that are kept while channels are cut, and not found again
_MOST_MOMENTS = 1 << 26  # bytes for which data is divided into more than two folds
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
        progress.start("measuring the model")
        progress.step()
        self.measure = Measure(self.original, data, metric)
        self.notes: list[str] = list(self.measure.notes)
        self.layers: list[LayerDecision] = []
        self.groups: list[ChannelGroup] = []
        self.pruner: Pruner | None = None
        self.of_original: tuple[Layers, list[LayerDecision]] | None = None  # once they were looked for
        self.evaluations = 0
        self.failures: Counter[str] = Counter()
        release_memory()
        self.call_seconds = measure_latency(self.original, example_inputs, 7, 0.3).median
        self._foresee_all()

    def finish(self) -> nn.Module:
        """The result, with its report."""
        settings, score = self.settings, Score(1.0, 1.0, self.measure.samples)
        stages, curves = [Stage({})], []
        if settings.prune:
            self._find_channels()
            release_memory()
        self.workshop = Workshop(self.original, self.pruner)
        if self.pruner is not None:
            floor = min(1.0, settings.keep + self._margin_of_quantisation())
            release_memory()
            stages, curves, score = find_stages(self, floor)
            if len(stages) == 1:  # nothing is cut: what would make up for it is as large as the model may be
                self.pruner.forget_data()
        stage, result = stages[-1], None
        if settings.quantize:
            stage, result, score = quantise(self, stages, score)
        if self.pruner is not None:
            describe_pruning(self, stage.kept, {curve.group: curve for curve in curves})
        return self._report(stage, result, score)

    def _foresee_all(self) -> None:
        """What phases will take, as far as that can be told from the time of a call and of measuring the original."""
        settings, measured, call = self.settings, self.measure.seconds, self.call_seconds
        layers = sum(isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) for m in self.original.modules())
        if settings.prune:
            self.progress.foresee("finding channels", 4 * layers * call)
            if settings.compensate:
                self.progress.foresee("measuring", 1.2 * measured)
            if settings.policy == "sensitivity":
                self.progress.foresee("sensitivity of", 4 * layers * self.loss_seconds)
            self.progress.foresee("pruning", 4 * measured)
        if settings.quantize:
            self.progress.foresee("timing", 2 * 3 * 6 * call)
            self.progress.foresee("quantising", 2 * measured)
        self.progress.foresee("measuring the result", measured + min(2.0, 60 * call))

    @property
    def loss_seconds(self) -> float:
        """That comparing the outputs of a candidate takes."""
        return self.measure.seconds * self.measure.compared_share

    def _find_channels(self) -> None:
        leaves = sum(isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) for m in self.original.modules())
        self.progress.start("finding channels", max(1, leaves))
        inputs = [piece.inputs for piece in self.measure.pieces]
        self.groups, notes = find_groups(self.original, self.example, self.progress.step, inputs[:_PROVED])
        release_memory()
        self.notes += notes
        if not self.groups:
            return
        settings = self.settings
        self.pruner = Pruner.with_scores(self.original, self.groups, settings.policy)
        if settings.compensate:
            self._take_moments()
            self._take_scales(inputs[:_SCALED])
        self.pruner.time_layers(self.example)

    def _take_moments(self) -> None:
        measure, paths = self.measure, reading_layers(self.original, self.groups)
        if len(measure.folds) > 2 and count_moment_bytes(self.original, paths) * len(measure.folds) > max(
            _MOST_MOMENTS, count_bytes(self.original)
        ):
            measure.merge_folds()
        if len(measure.folds) < 2:
            self.notes.append(
                "channels are not compensated: data cannot be divided into parts to fit to and to measure on"
            )
            return
        self.progress.start("measuring", len(measure.pieces))
        try:
            folds = [
                measure_moments(
                    self.original,
                    [p.inputs for p in measure.pieces if p.fold == fold],
                    paths,
                    self.progress.step,
                    _ENOUGH / len(measure.folds),
                )
                for fold in measure.folds
            ]
        except Exception as error:  # a metric that calls the model otherwise than model(inputs)
            self.notes.append(f"channels are not compensated: the model does not run on data: {describe_error(error)}")
            return
        moments = join(folds)
        if len(folds) > 2 and moments.rows_for_unknown() > _PLENTY:
            folds = [join(folds[half::2]) for half in (0, 1)]  # half of the data tells as much as most of it
            measure.merge_folds()
        for fold in folds:
            fold.forget_products(moments.refused)
        self.pruner.moments, self.pruner.folds = moments, dict(zip(measure.folds, folds, strict=True))
        if moments.refused:
            few = ", ".join(sorted(moments.refused))
            self.notes.append(f"compensated by means alone, because data has too few independent rows: {few}")

    def _take_scales(self, inputs: list[Any]) -> None:
        try:
            self.pruner.norms = measure_norms(self.original, inputs, norms_of(self.original, self.groups))
        except Exception as error:
            self.notes.append(f"norms keep their weights: the model does not run on data: {describe_error(error)}")

    def score(self, stage: Stage, layers: Layers | None = None, floor: float | None = None) -> Score:
        """What a candidate keeps: where data shaped it, of data that did not."""
        self.evaluations += 1
        if self.workshop.is_fitted(stage):
            score = self.measure.score_folds(lambda fold: self.workshop.made(stage, fold, layers), floor)
        else:
            try:
                with self.workshop.made(stage, None, layers) as candidate:
                    score = self.measure.score(candidate, floor)
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

    def _margin_of_quantisation(self) -> float:
        """What quantising costs by itself, which pruning has to leave over."""
        if not self.settings.quantize:
            return 0.0
        begin = time.monotonic()
        layers, stay = find_layers(self, Stage({}))
        if sum(c.weight.nbytes for whole in layers.chosen for c in whole.all()) <= _MOST_KEPT:
            self.of_original = layers, stay
        self.progress.foresee("timing", time.monotonic() - begin)  # of the pruned model
        if not layers.chosen:
            return 0.0
        kept = self.score(Stage({}), layers).kept
        return min(max(0.0, 1 - kept), (1 - self.settings.keep) / 2)

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
