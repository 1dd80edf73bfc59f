"""``torch_sluice.compress``: prune, quantise, measure; never below the share of the metric that was asked for."""

import copy
import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from torch_sluice.compress import quantization
from torch_sluice.compress.calling import check_example, evaluating
from torch_sluice.compress.changes import describe_changes
from torch_sluice.compress.compensation import measure_moments, reading_layers
from torch_sluice.compress.embedding import QuantizedEmbedding
from torch_sluice.compress.folding import fold_batch_norms
from torch_sluice.compress.graph import ChannelGroup, find_groups
from torch_sluice.compress.latency import compare_latency, measure_latency
from torch_sluice.compress.measure import Measure, Metric
from torch_sluice.compress.progress import Progress
from torch_sluice.compress.pruning import (
    Pruner,
    Sensitivity,
    choose_by_quantile,
    choose_by_sensitivity,
    measure_sensitivity,
    order_moves,
)
from torch_sluice.compress.quantized import check_options
from torch_sluice.compress.report import CompressionReport, LayerDecision, count_bytes
from torch_sluice.quantize import DEFAULT_TARGET_SQNR

POLICIES = ("sensitivity", "quantile")
_SLACK = 1e-9  # of shares, for rounding


def compress(
    model: nn.Module,
    example_inputs: Any,
    data: Iterable[tuple[Any, Any]],
    keep: float = 0.97,
    *,
    metric: Metric | None = None,
    policy: str = "sensitivity",
    budget: float | None = None,
    prune: bool = True,
    quantize: bool = True,
    finetune: Callable[[nn.Module, int], None] | None = None,
    finetune_steps: int = 100,
    round_to: int = 16,
    compensate: bool = True,
    quantize_policy: str = "sqnr",
    target_sqnr: float | None = None,
    weight_bits: int = 8,
    group_size: int = 0,
    threads: int | None = None,
    progress: bool = True,
) -> nn.Module:
    """A smaller and faster copy of a model that keeps at least ``keep`` of its metric, measured on ``data``.

    ::

        small = torch_sluice.compress(model, x, loader, keep=0.97, metric=accuracy)
        print(small.compression_report)
        torch_sluice.compress.save(small, "small.pt")

    Channels and heads are pruned where that wins most time for the metric it costs, then the layers that are faster in
    integers are quantised. docs/infer.md says what each rule promises. ``model`` itself is never changed, whatever
    happens; where nothing can be had within ``keep``, the result is a copy of it, and its report says so.

    Args:
        model: on the CPU. It is compressed for inference, as ``model.eval()`` behaves.
        example_inputs: the inputs of one call, of the size whose latency counts: a tensor, a tuple of positional
            inputs, or a dict of keyword inputs.
        data: batches (inputs, target), inputs as above. They are read once and kept, so that all candidates meet the
            same; take as many as the metric needs to be trusted.
        keep: share of the metric to keep, in (0, 1].
        metric: ``metric(model, batches) -> float`` over the list of batches, higher is better, above 0 for the model.
            None: closeness to the model's own outputs, 1 - (squared error / variance), for which target is not read.
        policy: "sensitivity" measures what each group of channels costs at several sizes; "quantile" is one global
            quantile of L1 norms.
        budget: latency in seconds of one call at which pruning may stop; None: prune as far as ``keep`` allows.
        prune, quantize: which of the two to do.
        finetune: ``finetune(model, step)``, one step of the user's training on a pruned model that is in training mode,
            called for step = 0 .. finetune_steps - 1 after each round of pruning; at step 0 the parameters are new, and
            an optimizer has to be made.
        finetune_steps: steps in a round, at least 1.
        round_to: channel counts become multiples of this where a layer has four times as many, of 8, 4, .. else.
        compensate: fold what pruned channels would have brought, as far as others tell it, into the layers that read
            them (compensation.py).
        target_sqnr: signal-to-noise ratio in dB by which activations take their widths. None: 30, or 24 for all layers
            where the model is faster for it and the metric is kept.
        quantize_policy, weight_bits, group_size: of the quantised layers, see ``QuantizedLinear``.
        threads: that torch uses while measuring; None: as it is set.
        progress: a bar on standard error once two seconds have passed.

    Returns:
        An ordinary ``nn.Module`` in eval mode with a ``compression_report``. Unless layers were quantised it can be
        trained further.

    Raises:
        TypeError, ValueError: an argument is not allowed, the example does not match, data yields nothing, the metric
            is not a number above 0, or there is nothing to prune or quantise; the message says what to do.
    """
    _check(model, keep, policy, budget, finetune, finetune_steps, round_to, prune, quantize, threads)
    may_relax = target_sqnr is None
    target_sqnr = DEFAULT_TARGET_SQNR if may_relax else target_sqnr
    check_options(quantize_policy, weight_bits, group_size, target_sqnr)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with Progress(progress) as bar:
            options = {
                "policy": quantize_policy, "target_sqnr": target_sqnr, "weight_bits": weight_bits,
                "group_size": group_size,
            }  # fmt: skip
            run = _Run(model, example_inputs, data, keep, metric, bar, may_relax)
            if prune:
                run.find_channels(compensate)
            return run.finish(policy, budget, prune, options if quantize else None, finetune, finetune_steps, round_to)
    finally:
        torch.set_num_threads(before)


def _check(model, keep, policy, budget, finetune, finetune_steps, round_to, prune, quantize, threads) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise ValueError(f"keep is {keep!r}, expected a share in (0, 1]: 0.97 keeps 97 % of the metric")
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}, expected one of {', '.join(map(repr, POLICIES))}")
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(f"budget is {budget!r}, expected seconds above 0, or None")
    if finetune is not None and not callable(finetune):
        raise TypeError(f"finetune is a {type(finetune).__name__}, expected a function (model, step)")
    for name, value in (("finetune_steps", finetune_steps), ("round_to", round_to), ("threads", threads)):
        if name == "threads" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
    if not prune and not quantize:
        raise ValueError("prune and quantize are both False, expected at least one of them")


class Stage(NamedTuple):
    """A pruned model that keeps enough: units kept by group, and what makes it."""

    kept: dict[int, int]
    build: Callable[[], nn.Module]


class _Run:
    """One compression: what was measured so far, and what was found."""

    def __init__(self, model, example_inputs, data, keep, metric, progress, may_relax):
        self.begin, self.keep, self.progress = time.monotonic(), keep, progress
        try:
            self.original = copy.deepcopy(model).eval()
        except RuntimeError as error:
            raise ValueError(f"model cannot be copied, expected one that copy.deepcopy takes: {error}") from error
        self.example, self.metric_name = example_inputs, "fidelity" if metric is None else "metric"
        with evaluating(self.original):
            check_example(self.original, example_inputs)
        progress.start("measuring the model")
        progress.step()
        self.measure = Measure(self.original, data, metric)
        self.notes: list[str] = []
        self.layers: list[LayerDecision] = []
        self.groups: list[ChannelGroup] = []
        self.moments = None
        self.evaluations = 0
        self.may_relax = may_relax  # whether activations may take fewer bits than the options say

    def find_channels(self, compensate: bool) -> None:
        self.progress.start("finding channels")
        self.groups, notes = find_groups(self.original, self.example, self.progress.step)
        self.notes += notes
        if compensate and self.groups:
            paths = reading_layers(self.original, self.groups)
            self.progress.start("measuring", len(self.measure.inputs))
            self.moments = measure_moments(self.original, self.measure.inputs, paths, self.progress.step)

    def finish(self, policy, budget, prune, quantize_options, finetune, finetune_steps, round_to) -> nn.Module:
        if prune and not self.groups and quantize_options is None:
            raise ValueError(
                "model has no layer that can be pruned, expected convolutions or linear layers whose channels are "
                f"used within the model: {'; '.join(self.notes) or 'it has none of either'}. Use quantize=True"
            )
        margin = self._margin_of_quantisation(quantize_options) if prune and self.groups else 0.0
        floor = min(1.0, self.keep + margin)
        stages: list[Stage] = [Stage({}, lambda: self.original)]
        if prune and self.groups:
            pruner = Pruner.with_scores(self.original, self.groups, policy)
            pruner.moments = self.moments
            pruner.time_layers(self.example)
            stages, curves = self._prune(pruner, policy, floor, budget, finetune, finetune_steps, round_to)
        stage, result, quantized = stages[-1], None, []
        if quantize_options is not None:
            stage, result, quantized = self._quantise(stages, quantize_options)
        if prune and self.groups:
            self._describe_pruning(pruner, stage.kept, {curve.group: curve for curve in curves})
        elif prune and not quantized:
            raise ValueError(
                "model has no layer that can be pruned, and none that is faster quantised: expected convolutions or "
                f"linear layers. {'; '.join(self.notes + [f'{d.name}: {d.reason}' for d in self.layers])}"
            )
        return self._report(stage.build() if result is None else result, policy)

    def _share(self, candidate: nn.Module) -> float:
        self.evaluations += 1
        return self.measure.share(candidate)

    def _margin_of_quantisation(self, options) -> float:
        """What quantising costs by itself, which pruning has to leave over."""
        if options is None:
            return 0.0
        folded = copy.deepcopy(self.original)
        fold_batch_norms(folded, self.example)
        candidates, _ = quantization.find_candidates(folded, self.example, options, self.progress)
        if not candidates:
            return 0.0
        cost = 1 - self._share(quantization.apply(folded, candidates))
        return min(max(0.0, cost), (1 - self.keep) / 2)

    def _prune(self, pruner, policy, floor, budget, finetune, finetune_steps, round_to):
        """The stages of pruning, each within ``floor``, the first being the original; and what sensitivity showed."""
        accepted: list[dict[int, int]] = []

        def accept(kept: dict[int, int]) -> bool:
            self.progress.step(f"{len(kept)} groups")
            if self._share(pruner.build(kept)) < floor - _SLACK:
                return False
            accepted.append(kept)
            return True

        now = measure_latency(self.original, self.example).median
        total = pruner.predict_seconds({})

        def enough(kept: dict[int, int]) -> bool:
            return budget is not None and now - total + pruner.predict_seconds(kept) <= budget

        curves: list[Sensitivity] = []
        if budget is not None and now <= budget:
            self.notes.append(f"the model meets the budget of {budget * 1e3:.2f} ms unpruned")
            chosen = {}
        elif policy == "quantile":
            self.progress.start("pruning", 5)
            chosen = choose_by_quantile(pruner, accept, round_to)
        else:
            # Where closeness is the metric, what is far below the floor is of no use; a metric of the user's may not
            # mind that outputs move.
            most = 3 * (1 - floor) + _SLACK if self.measure.fidelity and finetune is None else 1.0
            curves = measure_sensitivity(pruner, self.measure, most, round_to, self.progress)
            self.evaluations += sum(len(curve.kept) for curve in curves)
            chosen = choose_by_sensitivity(pruner, curves, accept, enough, self.progress)
        plans = [kept for kept in accepted if _within(kept, chosen, pruner.groups)]
        plans.sort(key=lambda kept: -pruner.predict_seconds(kept))
        stages = [Stage({}, lambda: self.original)]
        stages += [Stage(kept, functools.partial(pruner.build, kept)) for kept in plans]
        if finetune is not None and curves:
            stages += self._finetune(pruner, curves, stages[-1], floor, enough, finetune, finetune_steps)
        return stages, curves

    def _finetune(self, pruner, curves, start, floor, enough, finetune, steps):
        """Rounds that each prune about a sixth of the predicted time further and train; one that stays below ``floor``
        is undone and tried at half the size."""
        plans = [plan for plan in order_moves(pruner, curves) if _within(start.kept, plan, pruner.groups)]
        total, stages, stage, part = pruner.predict_seconds({}), [], start, 1 / 6
        self.progress.start("fine-tuning", None)
        while not enough(stage.kept) and part > 0.05:
            goal = pruner.predict_seconds(stage.kept) - part * total
            following = [plan for plan in plans if _within(stage.kept, plan, pruner.groups) and plan != stage.kept]
            if not following:
                break
            plan = next((plan for plan in following if pruner.predict_seconds(plan) <= goal), following[-1])
            candidate = pruner.build_further(stage.build(), stage.kept, plan).train()
            for step in range(steps):
                self.progress.step(f"{len(plan)} groups, step {step + 1}")
                finetune(candidate, step)
            candidate.eval()
            if self._share(candidate) >= floor - _SLACK:
                stage = Stage(plan, functools.partial(copy.deepcopy, candidate))
                stages.append(stage)
            else:
                part /= 2
        return stages

    def _describe_pruning(self, pruner, chosen, curves) -> None:
        base = pruner.predict_seconds({})
        for g, group in enumerate(pruner.groups):
            kept = chosen.get(g)
            size = group.channels if group.kind == "channels" else 1
            curve = curves.get(g)
            if kept is not None:
                cost = curve.losses[curve.kept.index(kept)] if curve and kept in curve.kept else None
                saved = base - pruner.predict_seconds({g: kept})
                reason = f"predicted to save {saved * 1e3:.2f} ms"
                if cost is not None:
                    reason += f", alone moves the outputs by {cost:.2%}"
                decision = LayerDecision(group.name, "pruned", reason, group.width * size, kept * size, saved, cost)
            else:
                reason = "not worth what it would cost"
                if curve is not None and not curve.kept:
                    reason = "its smallest cut alone moves the outputs too far"
                decision = LayerDecision(group.name, "kept", reason, group.width * size)
            self.layers.append(decision)

    def _quantise(self, stages: list[Stage], options) -> tuple[Stage, nn.Module | None, list]:
        """The last stage that keeps enough when quantised; layers stay in floating point where it takes that."""
        floor = self.keep - _SLACK
        for stage in reversed(stages[-3:]):
            folded = copy.deepcopy(stage.build())
            names = fold_batch_norms(folded, self.example)
            candidates, stay = quantization.find_candidates(folded, self.example, options, self.progress)
            chosen, costly = quantization.choose(folded, candidates, self.measure, floor, self.progress)
            self.evaluations += 1 + len(candidates) * (len(costly) > 0)
            lost = sum(c.before - c.after for c in candidates) - sum(c.before - c.after for c in chosen)
            won = sum(c.before - c.after for c in candidates)
            if stage is not stages[0] and won > 0 and lost > 0.5 * won:
                continue  # pruning took what quantising needs: try with less of it
            break
        self.layers += [LayerDecision(name, "folded", "into the layer before it") for name in names]
        self.layers += stay + costly
        for c in chosen:
            reason = "for its bytes"
            if not isinstance(c.quantized, QuantizedEmbedding):
                reason = f"measured {c.before * 1e6:.0f} -> {c.after * 1e6:.0f} µs"
            self.layers.append(LayerDecision(c.name, "quantized", reason, None, None, c.before - c.after))
        result = quantization.apply(folded, chosen)
        if self._share(result) < floor:  # folding alone moves the last bits of a metric at its limit
            self.notes.append(f"not quantised: less than {self.keep:.1%} of the metric would be left")
            self.layers = [layer for layer in self.layers if layer.action not in ("folded", "quantized")]
            return stages[-1], None, []
        return stage, self._relax(result, floor) if self.may_relax else result, chosen

    def _relax(self, result: nn.Module, floor: float) -> nn.Module:
        self.progress.start("quantising")
        self.progress.step("fewer bits")
        relaxed = quantization.relax(result, self.example)
        if relaxed is None or self._share(relaxed[0]) < floor:
            return result
        self.notes.append(f"activations take fewer bits than by default: {relaxed[1]:.2f} times as fast")
        return relaxed[0]

    def _report(self, result: nn.Module, policy: str) -> nn.Module:
        self.progress.start("measuring the result")
        self.progress.step()
        if result is self.original:
            result = copy.deepcopy(result)
        result.eval()
        share = self._share(result)
        before, after = compare_latency(self.original, result, self.example)
        if share < self.keep - _SLACK or not any(d.action in ("pruned", "quantized", "folded") for d in self.layers):
            self.notes.append(
                f"nothing was found that keeps {self.keep:.1%} of the metric: this is a copy of the original model"
            )
            result, after, share = copy.deepcopy(self.original), before, 1.0
        elif after.median >= before.median:
            self.notes.append("the result is smaller, but was not measured to be faster on this machine")
        result.compression_report = CompressionReport(
            keep=self.keep, policy=policy, metric_name=self.metric_name, metric_before=self.measure.original,
            metric_after=share * self.measure.original, latency_before=before.median, latency_after=after.median,
            latency_p95_before=before.p95, latency_p95_after=after.p95, bytes_before=count_bytes(self.original),
            bytes_after=count_bytes(result), threads=torch.get_num_threads(), layers=self.layers, notes=self.notes,
            seconds=time.monotonic() - self.begin, evaluations=self.evaluations,
            changes=describe_changes(self.original, result),
        )  # fmt: skip
        return result


def _within(smaller: dict[int, int], larger: dict[int, int], groups: list[ChannelGroup]) -> bool:
    """Whether the plan ``larger`` prunes each group at least as far."""
    return all(larger.get(g, groups[g].width) <= kept for g, kept in smaller.items())
