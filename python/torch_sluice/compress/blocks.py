"""A metric of the user's, on blocks of the data: what it is, what a candidate keeps of it, and how well that is known.

Where the metric is a mean over samples, its values on blocks tell all. Else (a correlation, an area under a curve, a
rank among all) it is asked about everything, and about everything but one block at a time (the jackknife).
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_sluice.compress.calling import seeded
from torch_sluice.compress.estimate import Score, lower_bound, score_blocks
from torch_sluice.compress.remember import Calls, remembering
from torch_sluice.compress.samples import Piece, fold_numbers, tensors_of

Metric = Callable[[nn.Module, list], float]
Parts = list[tuple[int, list[Piece]]]  # blocks, with the folds that they belong to
# Folds, and blocks in each, that are tried: for a mean over samples, and for what must be measured on a whole fold.
_MEANS = ((4, 5), (2, 10), (2, 5), (2, 3))
_OTHERS = ((2, 10), (2, 5), (2, 3), (2, 1), (1, 10), (1, 5), (1, 3))
_SAME = 1e-6  # relative difference below which blocks make up the whole


def run_metric(metric: Metric, model: nn.Module, batches: list[tuple[Any, Any]]) -> float:
    """The metric as a number, with the same random numbers each time; ValueError for something else. The model is in
    eval mode."""
    with torch.no_grad(), seeded():
        value = metric(model, list(batches))  # a metric that empties its list takes no data away
    if isinstance(value, (str, bytes)):
        raise ValueError(f"metric returned a {type(value).__name__}, expected one number: {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric returned a {type(value).__name__}, expected one number: {error}") from None


class Blocks:
    """The metric on parts of the data, and the original's values there. The original is in eval mode, and ``calls``
    remembers what it returns.

    Attributes:
        parts: (fold, pieces) of each block. Pieces are dealt out to fewer folds where the metric cannot be had on so
            many.
        known: whether there are enough of them to tell how well the metric is known.
    """

    def __init__(
        self,
        metric: Metric,
        original: nn.Module,
        whole: list[tuple[Any, Any]],
        pieces: list[Piece],
        calls: Calls,
    ):
        self.metric, self.samples = metric, sum(piece.samples for piece in pieces)
        self.parts: Parts = []
        self.additive, self.known = False, False
        self._values: list[float] = []
        self._weights: list[float] = []
        self._whole = whole
        self.before = run_metric(metric, original, whole)
        if not math.isfinite(self.before):
            raise ValueError(
                f"metric returned {self.before} for the original model, expected a finite number: check it on the "
                "uncompressed model first"
            )
        self._divide(original, pieces, calls)

    def _divide(self, original: nn.Module, pieces: list[Piece], calls: Calls) -> None:
        """Finds blocks that tell how well the metric is known, and takes the original's values."""
        most = len(fold_numbers(pieces))
        if not any(
            self._take_mean(original, _deal_out(pieces, folds, count)) for folds, count in _MEANS if folds <= most
        ):
            self.unit = 1 / self.samples
            if not any(
                self._take_whole(original, _deal_out(pieces, folds, count), calls)
                for folds, count in _OTHERS
                if folds <= most
            ):
                self.parts, self.known, self._whole_before = [], False, {None: [self.before]}
        for fold, part in self.parts:
            for piece in part:
                piece.fold = fold

    def _take_mean(self, original: nn.Module, parts: Parts) -> bool:
        """Sets the blocks if the metric is a mean over them."""
        if len(parts) < 3:
            return False
        try:
            values = [run_metric(self.metric, original, as_batches(part)) for _, part in parts]
        except Exception:
            return False
        for weigh in (_count_samples, _count_answers, _count_batches):
            weights = [weigh(part) for _, part in parts]
            mean = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
            if abs(mean - self.before) <= _SAME * abs(self.before):  # false for NaN
                self.additive = self.known = True
                self.parts, self._values, self._weights = parts, values, weights
                # What one sample is worth, or one answer where a sample has several.
                self.unit = 1 / max(self.samples, sum(_count_answers(part) for _, part in parts))
                return True
        return False

    def _take_whole(self, original: nn.Module, parts: Parts, calls: Calls) -> bool:
        """Sets the blocks if the metric can be had on each fold; known if also without any of its blocks, where the
        model need not run again for that."""
        if len(parts) < 2:
            return False
        self.parts = parts
        try:
            self.known = len(parts) > 2 and self._is_remembered(original, calls)
            self._whole_before = {
                fold: self._leave_out(original, fold) if self.known else [self._on(original, fold)]
                for fold in (None, *sorted({fold for fold, _ in parts}))
            }
        except Exception:
            return False
        return all(math.isfinite(value) for values in self._whole_before.values() for value in values)

    def _is_remembered(self, original: nn.Module, calls: Calls) -> bool:
        """Whether the metric asks for ``model(inputs)``, so that the model need not run again for another question."""
        self._on(original, None)
        ran, repeated = calls.run, calls.repeated
        self._on(original, None)
        return calls.run == ran and calls.repeated > repeated

    def merge_folds(self) -> None:
        """Makes two folds of four."""
        self.parts = [(fold % 2, part) for fold, part in self.parts]

    def value(self, model: nn.Module, number: int) -> float:
        return run_metric(self.metric, model, as_batches(self.parts[number][1]))

    def numbers(self, fold: int | None) -> list[int]:
        return [n for n, (of, _) in enumerate(self.parts) if fold is None or of == fold]

    def score(self, numbers: list[int], values: list[float]) -> Score:
        """Of the metric's values on these blocks: of a mean over samples."""
        unchanged = sum(v == self._values[n] for n, v in zip(numbers, values, strict=True)) / len(numbers)
        weights = [self._weights[n] for n in numbers]
        seen = sum(weights) / sum(self._weights)
        # Where many blocks show no difference at all, their spread says nothing about rare ones.
        unit = self.unit * unchanged / seen
        return score_blocks(values, [self._values[n] for n in numbers], weights, unit, round(seen * self.samples))

    def first_batches(self, samples: int) -> list[tuple[Any, Any]]:
        """The batches of the first blocks, of which there are as many as hold so many samples; all where there are no
        blocks."""
        pieces: list[Piece] = []
        for _, part in self.parts:
            if sum(piece.samples for piece in pieces) >= samples:
                break
            pieces += part
        return as_batches(pieces) or self._whole

    def _pieces(self, fold: int | None, without: int | None = None) -> list[Piece]:
        return [piece for n in self.numbers(fold) if n != without for piece in self.parts[n][1]]

    def _on(self, model: nn.Module, fold: int | None) -> float:
        if not self.parts:
            return run_metric(self.metric, model, self._whole)
        return run_metric(self.metric, model, as_batches(self._pieces(fold)))

    def _leave_out(self, model: nn.Module, fold: int | None) -> list[float]:
        """On everything of the fold, and without each of its blocks in turn."""
        values = [self._on(model, fold)]
        for number in self.numbers(fold):
            values.append(run_metric(self.metric, model, as_batches(self._pieces(fold, number))))
        return values

    def measure_whole(self, model: nn.Module, fold: int | None) -> list[float]:
        """Of a metric that is no mean over samples: on everything, and without each block where that tells its
        uncertainty."""
        if not self.known:
            return [self._on(model, fold)]
        with remembering(model):
            return self._leave_out(model, fold)

    def score_whole(self, values: dict[int | None, list[float]]) -> Score:
        """Of what ``measure_whole`` gave, by fold: None, or all of them."""
        weights = {fold: float(sum(p.samples for p in self._pieces(fold))) or 1.0 for fold in values}
        after = {fold: weights[fold] * torch.tensor(v, dtype=torch.float64) for fold, v in values.items()}
        before = {fold: weights[fold] * torch.tensor(self._whole_before[fold], dtype=torch.float64) for fold in values}
        total, original = (sum(float(v[0]) for v in of.values()) for of in (after, before))
        samples = sum(piece.samples for fold in values for piece in self._pieces(fold)) or self.samples
        kept, variance, degrees, unchanged = total / original, 0.0, 0, 0
        if not self.known or not math.isfinite(kept):
            return Score(kept, kept, samples, known=False)
        for fold, now in after.items():
            then, count = before[fold], len(now) - 1
            shares = (total - now[0] + now[1:]) / (original - then[0] + then[1:])
            variance += (count - 1) / count * float((shares - shares.mean()).square().sum())
            degrees += count - 1
            unchanged += int((now[1:] == then[1:]).sum())
        unit = self.unit * unchanged / (degrees + len(after)) * self.samples / samples
        return Score(kept, lower_bound(kept, math.sqrt(variance), degrees, unit), samples)


def as_batches(pieces: list[Piece]) -> list[tuple[Any, Any]]:
    return [(piece.inputs, piece.target) for piece in pieces for _ in range(piece.copies)]


def _deal_out(pieces: list[Piece], folds: int, count: int) -> Parts:
    """The pieces of each fold, of so many, in up to ``count`` runs of about as many samples."""
    parts: Parts = []
    for fold in range(folds):
        own = [piece for piece in pieces if piece.fold % folds == fold]
        total, runs, filled = sum(piece.samples for piece in own), [], 0
        for piece in own:
            if not runs or min(count - 1, filled * count // total) >= len(runs):
                runs.append([])
            runs[-1].append(piece)
            filled += piece.samples
        parts += [(fold, run) for run in runs]
    return parts


def _count_samples(pieces: list[Piece]) -> int:
    return sum(piece.samples * piece.copies for piece in pieces)


def _count_batches(pieces: list[Piece]) -> int:
    return sum(piece.copies for piece in pieces)


def _count_answers(pieces: list[Piece]) -> int:
    """Elements of the targets that are classes."""
    targets = [(tensors_of(piece.target), piece.copies) for piece in pieces]
    return sum(_answers(tensors) * copies for tensors, copies in targets) or 1


def _answers(tensors: list[Tensor]) -> int:
    return sum(t.numel() for t in tensors if not t.is_floating_point() and not t.is_complex())


@contextlib.contextmanager
def noised(model: nn.Module, seed: int):
    """Within it, the model's weights carry noise as large as their own spread. Their memory is not written to."""
    before = [(p, p.data) for p in model.parameters() if p.is_floating_point() and type(p.data) is Tensor]
    try:
        with torch.no_grad(), seeded(seed):
            for parameter, value in before:
                spread = value.float().std(correction=0) if value.numel() > 1 else value.float().abs()
                noisy = torch.randn(value.shape).to(value)
                parameter.data = noisy.mul_(spread.to(value)).add_(value)
        yield model
    finally:
        for parameter, value in before:
            parameter.data = value
