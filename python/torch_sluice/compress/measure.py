"""What compression must keep: the user's metric, or how close the outputs stay to the original's.

A candidate of which a part is fitted to data is several models, each fitted to all folds of the data but one, and
measured on that one.
"""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torch_sluice.compress.blocks import Blocks, Metric, noised, run_metric
from torch_sluice.compress.calling import call_model, describe_error, evaluating, float_outputs, seeded
from torch_sluice.compress.estimate import Score, failed, largest_jump, ratio_error, score_losses, with_jump
from torch_sluice.compress.outputs import Agreement, Fidelity, run_original
from torch_sluice.compress.remember import MOST_BYTES, Calls, remembering
from torch_sluice.compress.report import count_bytes
from torch_sluice.compress.samples import (
    Piece,
    count_rows,
    cut_pieces,
    fold_numbers,
    has_independent_rows,
    merge_folds,
    read_batches,
    tensors_of,
    without_empty,
)

_COMPARED = 8  # pieces on which outputs are compared
_MOST_ELEMENTS = 1 << 24  # of outputs that are compared
_PIECES = {True: 8, False: 20}  # that few batches are cut into: to divide them; to see a metric's spread
_ACCURACY = 0.25  # relative standard error with which a loss is known well enough,
_FEWEST, _FEWEST_LARGE = 16, 4  # and samples; fewer where outputs of a sample have
_LARGE = 1 << 16  # elements, such as the logits of a sentence
_EARLY = 4  # values after which a candidate may be given up
_PATIENCE = 3  # times the distance to its lower bound, above which it would have to rise
_DOUBT = 0.5  # times that, about a standard error, by which one in a hurry wants to be sure
_REMEMBERED = 1 << 26  # bytes of the original's outputs that are kept while it is measured, or an eighth of its own
_LOOKED_AT = 32  # samples, at least, on which it is seen what noise does to the metric
_LOSS = 1.5  # a metric that rises by this factor under noise is a loss,
_MORE = 1.01  # and one that rises by this may be

METRICS = {"fidelity": Fidelity, "agreement": Agreement}
Maker = Callable[[int], AbstractContextManager[nn.Module]]  # fold -> the model to be measured on it, fitted to others


class Measure:
    """The metric of the original and of candidates, on data that stays the same.

    Attributes:
        original: the metric of the original model.
        samples: how many different ones there are.
        folds: numbers of the folds that data could be divided into; one: not at all.
        notes: sentences about the data and the metric.
        seconds: that measuring the original on all data took; predicted_seconds: before it has been done.
        jump: what a sample lost at most with a candidate that left most others as they are (estimate.largest_jump).
        remembers: whether what the original returns is small enough to be kept, so that it need run but once.
    """

    def __init__(
        self,
        original: nn.Module,
        data: Iterable,
        metric: Metric | Agreement | None,
        first: "Callable[[Measure, Calls], None]" = lambda measure, calls: None,
    ):
        """The model stays as it is.

        Args:
            first: called when data is divided into pieces, before the metric is. What it runs of the model on pieces,
                ``remembering`` these calls, is not run again. It may merge the folds.

        Raises:
            TypeError, ValueError: of data, of the model on some batch of it, or of the metric, of the original model.
        """
        self.notes: list[str] = []
        batches = read_batches(data)
        self._batches, numbers = without_empty(batches)
        if metric is None or isinstance(metric, Agreement):  # which read no target
            self._batches = [(inputs, None) for inputs, _ in self._batches]
        if len(numbers) < len(batches):
            self.notes.append(f"{len(batches) - len(numbers)} of {len(batches)} batches hold no sample: left out")
        self.fidelity = metric is None
        self._comparison = Fidelity() if metric is None else None
        if isinstance(metric, Agreement):
            self._comparison = Agreement(metric.dim)
        self.name = "metric" if self._comparison is None else self._comparison.name
        self._blocks = self._closeness = None
        self.jump = 0.0
        self.predicted_seconds = 0.0  # of a run over all data
        self._output_bytes = math.inf  # of all data
        ready = self._comparison is not None
        with evaluating(original):
            apart = self._look_at_rows(original, numbers, only_tell=not ready)
        self.pieces = cut_pieces(self._batches, numbers, apart, _PIECES[ready])
        self.samples = sum(piece.samples for piece in self.pieces)
        most = min(MOST_BYTES, max(_REMEMBERED, count_bytes(original) // 8))
        calls, self.remembers = Calls(self.pieces, most), self._output_bytes <= most
        first(self, calls)
        earlier, begin = calls.seconds, time.monotonic()
        with evaluating(original), remembering(original, calls):
            if ready:
                self._comparison.begin(self.pieces, [self._output(original, piece) for piece in self.pieces])
                self.original = 1.0
            else:
                self._blocks = self._read_metric(metric, original, numbers, calls)
                self.original = self._blocks.before
                if not self._blocks.parts:
                    for piece in self.pieces:
                        piece.fold = 0
            self.seconds = earlier + time.monotonic() - begin
            self._closeness = self._compare_outputs(original)
        if self._blocks is not None:
            with evaluating(original):
                self._check_direction(original, calls)

    @property
    def folds(self) -> list[int]:
        return fold_numbers(self.pieces)

    def merge_folds(self) -> None:
        """Makes two folds of all. What a candidate is measured on stays the same."""
        merge_folds(self.pieces)
        if self._blocks is not None:
            self._blocks.merge_folds()
        if self._closeness is not None:  # of the last fold's pieces, which are among those of the last of two
            comparison, chosen = self._closeness
            self._closeness = comparison, [n for n in chosen if self.pieces[n].fold == 1]

    @property
    def known(self) -> bool:
        """Whether the uncertainty of what is kept is known."""
        return self.samples > 1 if self._blocks is None else self._blocks.known

    @property
    def compared_share(self) -> float:
        """Of the samples, those on which outputs are compared."""
        if self._closeness is None:
            return 1.0
        return sum(self.pieces[n].samples for n in self._closeness[1]) / self.samples

    @property
    def inputs(self) -> list[Any]:
        return [piece.inputs for piece in self.pieces]

    def _output(self, original: nn.Module, piece: Piece) -> Any:
        return self._run(original, piece.inputs, piece.batch)

    def _run(self, original: nn.Module, inputs: Any, number: int) -> Any:
        try:
            return run_original(original, inputs)
        except Exception as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"the original model fails on batch {number} of data: {describe_error(error)}") from error

    def _look_at_rows(self, original: nn.Module, numbers: list[int], only_tell: bool) -> bool:
        """Whether the rows of batches are samples. Notes it if the forward is not the same each time."""
        rows = [count_rows(inputs) or 0 for inputs, _ in self._batches]
        largest = rows.index(max(rows))
        inputs = self._batches[largest][0]
        try:
            outputs = float_outputs(self._run(original, inputs, numbers[largest]))
        except (TypeError, ValueError):
            if only_tell:  # the metric may call the model in its own way
                return False
            raise
        begin = time.monotonic()
        self._look_for_chance(original, inputs, outputs)
        whole = sum(rows) / rows[largest] if rows[largest] else len(rows)
        self.predicted_seconds = whole * (time.monotonic() - begin)
        self._output_bytes = whole * sum(out.nbytes for out in outputs)
        apart = bool(outputs) and has_independent_rows(original, inputs, outputs)
        return apart and all(_share_rows(inputs, target) for inputs, target in self._batches)

    def _look_for_chance(self, original: nn.Module, inputs: Any, outputs: list) -> None:
        with torch.no_grad(), seeded(1):
            again = float_outputs(call_model(original, inputs))
        pairs = list(zip(outputs, again, strict=True))
        if not all(a.shape == b.shape and torch.allclose(a, b, 1e-3, 1e-5, equal_nan=True) for a, b in pairs):
            self.notes.append(
                "the model's outputs differ from run to run in eval mode: all candidates are measured with the same "
                "seed, and figures hold for that"
            )

    def _read_metric(self, metric: Metric, original: nn.Module, numbers: list[int], calls: Calls) -> Blocks:
        try:
            blocks = Blocks(metric, original, self._batches, self.pieces, calls)
        except ValueError as error:
            if str(error).startswith("metric returned"):
                raise
            self._blame(original, numbers, error)
        except Exception as error:
            self._blame(original, numbers, error)
        if blocks.before <= 0:
            raise ValueError(
                f"metric returned {blocks.before} for the original model, expected a number above 0 of which a share "
                "can be kept: return an accuracy or a correlation, not a loss (exp(-loss) does)"
            )
        if not blocks.known:
            self.notes.append(
                "the metric's uncertainty is not known, since it cannot be had on parts of the data: what is kept is "
                "taken as measured"
            )
        return blocks

    def _blame(self, original: nn.Module, numbers: list[int], error: Exception) -> None:
        """Raises what says whether the model or the metric failed."""
        kind = TypeError if isinstance(error, TypeError) else ValueError
        text = f"metric fails for the original model: {describe_error(error)}"
        for (inputs, _), number in zip(self._batches, numbers, strict=True):
            try:
                run_original(original, inputs)
            except Exception as other:
                if describe_error(other) == describe_error(error):
                    text = f"the original model fails on batch {number} of data: {describe_error(error)}"
                    break
        raise kind(text) from error

    def _check_direction(self, original: nn.Module, calls: Calls) -> None:
        """A copy full of noise must not be better than the model."""
        metric, batches = self._blocks.metric, self._blocks.first_batches(_LOOKED_AT)
        try:
            with remembering(original, calls):
                before, noisy = run_metric(metric, original, batches), []
            for seed in (0, 1):
                with noised(original, seed):
                    noisy.append(run_metric(metric, original, batches))
        except Exception:
            return
        counts = [value * sum(count_rows(inputs) or 1 for inputs, _ in batches) for value in (before, *noisy)]
        if all(abs(count - round(count)) < 1e-6 for count in counts):
            return  # a share of samples, which is no loss, and by chance may be more
        if 0 < _LOSS * before < min(noisy):
            raise ValueError(
                f"metric returned {before:.4g} for the original model and {noisy[0]:.4g} for one with noise on its "
                "weights, expected higher for the better: return an accuracy or a correlation, not a loss (exp(-loss) "
                "does)"
            )
        if 0 < _MORE * before < min(noisy):
            self.notes.append(
                f"the metric is {min(noisy) / before - 1:.1%} higher for a model with noise on its weights: if lower "
                "is better, it is a loss, of which exp(-loss) can be kept"
            )

    def score(self, candidate: nn.Module, floor: float | None = None, hurry: bool = False) -> Score:
        """Of a candidate of which nothing is fitted to the data. Given up early if ``floor`` is out of reach.

        Args:
            hurry: it is enough to know whether it most likely keeps ``floor``; ``low`` is then what all data would
                most likely show.
        """
        taken = self._begin(hurry)
        try:
            self._measure(candidate, None, taken, floor)
            return self._finish(taken)
        except Exception as error:
            return failed(describe_error(error))

    def glance(self, candidate: nn.Module) -> Score:
        """As ``score``, on one fold alone."""
        taken = self._begin()
        try:
            self._measure(candidate, self.folds[-1], taken, None)
            return self._finish(taken)
        except Exception as error:
            return failed(describe_error(error))

    def score_folds(self, make: Maker, floor: float | None = None, hurry: bool = False) -> Score:
        """As ``score``, of a candidate that ``make`` gives for each fold, fitted to the others."""
        taken = self._begin(hurry)
        try:
            for fold in self.folds:
                with make(fold) as candidate:
                    if self._measure(candidate, fold, taken, floor):
                        break
            return self._finish(taken)
        except Exception as error:
            return failed(describe_error(error))

    def share(self, candidate: nn.Module) -> float:
        """What the candidate keeps at least; -inf for one that fails."""
        return self.score(candidate).low

    def _begin(self, hurry: bool = False) -> dict:
        return {"numbers": [], "values": [], "whole": {}, "hurry": hurry}

    def _measure(self, model: nn.Module, fold: int | None, taken: dict, floor: float | None) -> bool:
        """Adds what the model gives on a fold, or on all data. Returns whether no more is needed."""
        with evaluating(model), torch.no_grad():
            if self._blocks is not None and not self._blocks.additive:
                taken["whole"][fold] = self._blocks.measure_whole(model, fold)
                return floor is not None and self.known and self._is_decided(taken, floor)
            for number in self._numbers(fold):
                if self._blocks is None:
                    piece = self.pieces[number]
                    with seeded():
                        losses, scales = self._comparison.losses(model, number, piece)
                    value = losses * piece.copies, scales * piece.copies
                    if not torch.isfinite(losses).all():
                        raise ValueError("its outputs are not finite")
                else:
                    value = self._blocks.value(model, number)
                    if not math.isfinite(value):
                        raise ValueError(f"its metric is {value}")
                taken["numbers"].append(number)
                taken["values"].append(value)
                if floor is None or not self.known or len(taken["values"]) < _EARLY:
                    continue
                if self._is_decided(taken, floor):
                    return True
        return False

    def _numbers(self, fold: int | None) -> list[int]:
        if self._blocks is not None:
            return self._blocks.numbers(fold)
        return [n for n, piece in enumerate(self.pieces) if fold is None or piece.fold == fold]

    def _is_decided(self, taken: dict, floor: float) -> bool:
        """Whether the floor is out of reach, or in a hurry which side of it the bound will most likely be on."""
        score = self._end(taken)
        distance = score.kept - score.low
        if not taken["hurry"]:
            return score.kept + _PATIENCE * distance < floor
        doubt = _DOUBT * math.sqrt(1 - self._seen(score)) * distance
        return abs(self._foresee(score).low - floor) >= doubt

    def _seen(self, score: Score) -> float:
        return min(1.0, score.samples / self.samples)

    def _foresee(self, score: Score) -> Score:
        """With the bound that all data would give, if the rest is as what was seen."""
        return replace(score, low=score.kept - math.sqrt(self._seen(score)) * (score.kept - score.low))

    def _finish(self, taken: dict) -> Score:
        score = self._end(taken)
        return self._foresee(score) if taken["hurry"] and math.isfinite(score.kept) else score

    def _end(self, taken: dict) -> Score:
        if taken["whole"]:
            score = self._blocks.score_whole(taken["whole"])
            return score if math.isfinite(score.kept) else failed(f"its metric is {score.kept}")
        if self._blocks is not None:
            return self._blocks.score(taken["numbers"], taken["values"])
        losses, scales = (torch.cat(parts) for parts in zip(*taken["values"], strict=True))
        if float(scales.sum()) == 0:
            return Score(1.0, 1.0, len(losses)) if float(losses.sum()) == 0 else failed("its outputs are not 0")
        self._look_for_jump(self._comparison, losses, scales)
        score = score_losses(losses, scales, self._comparison.unit * self.samples / len(losses))
        return with_jump(score, self.jump)

    def _look_for_jump(self, comparison: Any, losses: torch.Tensor, scales: torch.Tensor) -> None:
        if isinstance(comparison, Fidelity) and self.fidelity:
            self.jump = max(self.jump, largest_jump(losses, scales))

    def _compare_outputs(self, original: nn.Module) -> "tuple[Fidelity, list[int]] | None":
        """How the outputs of a few pieces are compared: of the last fold, so that what is compared may be fitted to
        others. None where the metric calls the model otherwise than ``model(inputs)``, or outputs are infinite."""
        left_out = self.folds[-1]
        chosen = [n for n, piece in enumerate(self.pieces) if piece.fold == left_out][:_COMPARED]
        if isinstance(self._comparison, Fidelity):
            return self._comparison, chosen
        outputs, elements = [], 0
        try:
            for number in chosen:
                outputs.append(run_original(original, self.pieces[number].inputs))
                elements += sum(out.numel() for out in float_outputs(outputs[-1]))
                if elements > _MOST_ELEMENTS:
                    break
            fidelity = Fidelity()
            fidelity.begin([self.pieces[n] for n in chosen[: len(outputs)]], outputs)
        except Exception:
            return None
        return fidelity, chosen[: len(outputs)]

    def loss(self, candidate: nn.Module) -> tuple[float, str | None]:
        """What the candidate, fitted to nothing or to all folds but the last, costs in comparison; and why it fails.

        1 - fidelity on a few pieces: smoother than a metric such as an accuracy, which moves by whole samples that
        drown what one small cut costs. Where outputs cannot be compared, 1 - ``share()``. Infinity for one that fails.
        """
        if self._closeness is None:
            score = self.score(candidate)
            return 1 - score.kept, score.reason
        comparison, chosen = self._closeness
        try:
            with evaluating(candidate), torch.no_grad():
                losses = scales = torch.zeros(0, dtype=torch.float64)
                for place, number in enumerate(chosen):
                    place = number if comparison is self._comparison else place
                    with seeded():
                        more = comparison.losses(candidate, place, self.pieces[number])
                    losses, scales = torch.cat([losses, more[0]]), torch.cat([scales, more[1]])
                    if _is_enough(losses, scales, comparison.elements(place)):
                        break
        except Exception as error:
            return math.inf, describe_error(error)
        self._look_for_jump(comparison, losses, scales)
        lost, whole = float(losses.sum()), float(scales.sum())
        value = lost / whole if whole else (0.0 if lost == 0 else math.inf)
        return (value, None) if math.isfinite(value) else (math.inf, "its outputs are not finite")


def _is_enough(losses: torch.Tensor, scales: torch.Tensor, elements: int) -> bool:
    """Whether a loss is known well enough to compare candidates by it, which meet the same samples."""
    if len(losses) < (_FEWEST if elements < _LARGE else _FEWEST_LARGE) or not float(scales.sum()) > 0:
        return False
    return ratio_error(losses, scales) <= _ACCURACY * float(losses.sum() / scales.sum())


def _share_rows(inputs: Any, target: Any) -> bool:
    """Whether the target is divided as the inputs are."""
    rows = count_rows(inputs)
    if rows is None:
        return False
    return target is None or (bool(tensors_of(target)) and count_rows(target) == rows)
