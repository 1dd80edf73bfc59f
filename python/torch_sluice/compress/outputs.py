"""How far a candidate's outputs are from the original's, sample by sample: what ready-made metrics are made of."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_sluice.compress.calling import call_model, float_outputs, seeded
from torch_sluice.compress.samples import Piece, count_rows, tensors_of

_NOT_FINITE = (
    "the model's outputs on data are not finite, expected finite numbers to compare with: look for inf or NaN in data "
    "and in the model's weights"
)
_AT_ONCE = 1 << 20  # elements that are compared at once: logits of a large vocabulary are as large as some models
_FILL = 0.5  # of the largest number of a dtype: what is beyond it stands for a masked element
Losses = tuple[Tensor, Tensor]  # of some samples: what each lost, and what it counts, float64 [n] each


class Fidelity:
    """1 for the original's outputs, less by their relative squared error:

    1 - sum |y' - y|^2 / sum |y - mean(y)|^2 over all elements of all floating-point outputs y of the original and y' of
    the candidate, with the mean over all samples whose outputs have that shape; where there is one, over its positions.
    Where outputs do not vary, the mean is left out. How samples are cut into batches makes no difference. Elements that
    the original masks, with the largest number of their dtype or its negative, count for nothing, and must stay masked.
    """

    name = "fidelity"
    unit = 0.0  # a sample's error may be as small as it likes

    def __init__(self) -> None:
        self._expected: list[list[Tensor]] = []
        self._scales: list[Tensor] = []

    def begin(self, pieces: list[Piece], outputs: list[Any]) -> None:
        """The original's outputs for the pieces."""
        if not all(out.isfinite().all() for output in outputs for out in float_outputs(output)):
            raise ValueError(_NOT_FINITE)
        self._expected = [[_without_masked(out.detach()) for out in float_outputs(output)] for output in outputs]
        rows = [self._rows(piece, expected) for piece, expected in zip(pieces, self._expected, strict=True)]
        means = _means(rows, pieces)
        spread = [_squares(each, means) for each in rows]
        magnitude = [_squares(each, None) for each in rows]
        total = float(sum(s.sum() for s in magnitude))
        if not math.isfinite(total):
            raise ValueError(_NOT_FINITE)
        varied = float(sum(s.sum() for s in spread)) > 1e-12 * total
        self._scales = spread if varied else magnitude
        self.constant = total == 0  # all outputs are 0: only the same is as good

    def _rows(self, piece: Piece, outputs: list[Tensor]) -> list[Tensor]:
        """Outputs whose first dimension counts the piece's samples."""
        return [out if _counts(piece, out) else out[None] for out in outputs]

    def elements(self, number: int) -> int:
        """Of the outputs of each of a piece's samples."""
        return sum(out.numel() for out in self._expected[number]) // max(1, len(self._scales[number]))

    def losses(self, model: nn.Module, number: int, piece: Piece) -> Losses:
        """Of the piece's samples.

        Raises:
            ValueError: outputs have other shapes than the original's.
        """
        outputs, expected = float_outputs(call_model(model, piece.inputs)), self._expected[number]
        if [out.shape for out in outputs] != [out.shape for out in expected]:
            raise ValueError("its outputs have other shapes than the model's")
        rows = self._rows(piece, outputs), self._rows(piece, expected)
        error = _square_errors(*rows, lambda out, wanted: (out.float(), wanted.float()))
        if not error.isfinite().all():  # too large for float32, or masked
            error = _square_errors(*rows, lambda out, wanted: (_without_masked(out).double(), wanted.double()))
        if self.constant:
            return (error > 0).double(), torch.ones_like(error)
        return error, self._scales[number]


def is_masked(out: Tensor) -> Tensor:
    """Which elements stand for masked ones: as large as their dtype allows, or nearly."""
    largest = torch.finfo(out.dtype).max
    size = out.abs()
    return (size >= _FILL * largest) & (size <= largest)


def _without_masked(out: Tensor) -> Tensor:
    """A copy with NaN for elements that are masked."""
    masked = is_masked(out)
    return out.masked_fill(masked, math.nan) if bool(masked.any()) else out.clone()


def _square_error(out: Tensor, expected: Tensor) -> Tensor:
    """0 where both are masked."""
    return (out - expected).square_().masked_fill_(out.isnan() & expected.isnan(), 0)


def _square_errors(outputs: list[Tensor], expected: list[Tensor], prepare: Callable) -> Tensor:
    """[samples] Sums, in float64, over all else; ``prepare``: gives what is subtracted."""
    total = torch.zeros(len(outputs[0]), dtype=torch.float64)
    for pair in zip(outputs, expected, strict=True):
        step = max(1, _AT_ONCE // max(1, math.prod(pair[0].shape[1:])))
        parts = zip(*(rows.split(step) for rows in pair), strict=True)
        total = total + torch.cat([_sum_rows(_square_error(*prepare(*part))) for part in parts])
    return total


def _counts(piece: Piece, out: Tensor) -> bool:
    return out.dim() > 0 and out.shape[0] == piece.samples == count_rows(piece.inputs)


def _means(rows: list[list[Tensor]], pieces: list[Piece]) -> dict[tuple, tuple[Tensor, int]]:
    """Mean over samples, and how many different ones there are, by place in the output and shape."""
    sums: dict[tuple, list] = {}
    for outputs, piece in zip(rows, pieces, strict=True):
        for place, out in enumerate(outputs):
            entry = sums.setdefault((place, out.shape[1:]), [0.0, 0, 0])
            entry[0] = entry[0] + piece.copies * out.nansum(0, dtype=torch.float64)
            entry[1] = entry[1] + piece.copies * _count_known(out)
            entry[2] += len(out)
    return {key: (total / weight, count) for key, (total, weight, count) in sums.items()}


def _count_known(out: Tensor) -> "Tensor | int":
    """How many rows are not masked, by element."""
    masked = out.isnan()
    return (~masked).sum(0).clamp_min(1) if bool(masked.any()) else len(out)


def _squares(outputs: list[Tensor], means: dict[tuple, tuple[Tensor, int]] | None) -> Tensor:
    """[samples] Sums of squares, in float64, of all outputs, less means if given."""
    squares = []
    for place, out in enumerate(outputs):
        if means is not None:
            mean, count = means[place, out.shape[1:]]
            if count == 1:
                mean = out.double().flatten(1, -2).nanmean(1) if out.dim() > 2 else torch.zeros((), dtype=torch.float64)
            out = out.double() - mean
        squares.append(out.double().square().nan_to_num_(0.0, math.inf))
    return _sums(squares)


def _sums(outputs: list[Tensor]) -> Tensor:
    """[samples] Sums, in float64, over all else."""
    total = torch.zeros(len(outputs[0]), dtype=torch.float64)
    for out in outputs:
        total = total + _sum_rows(out)
    return total


def _sum_rows(out: Tensor) -> Tensor:
    return (out.flatten(1).sum(1, dtype=torch.float64) if out.dim() > 1 else out.double()).cpu()


class Agreement:
    """The share of samples, or of positions of them, of which a classifier says the same class as the original did.

    Args:
        dim: of the output that counts classes; None: the last for outputs [N, C], 1 for [N, C, H, W]; what other
            outputs mean is not guessed, except where inputs tell it.
    """

    name = "agreement"

    def __init__(self, dim: int | None = None):
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
            raise TypeError(f"dim is {dim!r}, expected the dimension of the output that counts classes, or None")
        self.dim = dim
        self._expected: list[Tensor] = []
        self.unit = 0.0  # what one answer counts

    def begin(self, pieces: list[Piece], outputs: list[Any]) -> None:
        logits = [_logits(output) for output in outputs]
        dim = _class_dim(self.dim, logits, pieces)
        if not all(out.isfinite().all() for out in logits):
            raise ValueError("the model's outputs on data are not finite, expected finite numbers to compare with")
        self._dim, self._expected = dim, [out.argmax(dim) for out in logits]
        self.unit = 1 / max(1, sum(answer.numel() for answer in self._expected))

    def losses(self, model: nn.Module, number: int, piece: Piece) -> Losses:
        out, expected = _logits(call_model(model, piece.inputs)), self._expected[number]
        answers = out.argmax(self._dim)
        if answers.shape != expected.shape:
            raise ValueError("its outputs have other shapes than the model's")
        wrong = (answers != expected).double().cpu()
        if not out.isfinite().all():
            wrong = torch.full_like(wrong, math.nan)
        wrong = wrong.reshape(piece.samples, -1) if _counts(piece, out) else wrong.reshape(1, -1)
        # A position counts as much as any other, wherever samples have different numbers of them.
        return wrong.sum(1), torch.full((len(wrong),), float(wrong.shape[1]), dtype=torch.float64)


def _logits(output: Any) -> Tensor:
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"]
    outputs = float_outputs(output)
    if len(outputs) != 1:
        raise ValueError(
            f"metric is 'agreement', and the model returns {len(outputs)} floating-point tensors, expected one, or a "
            "mapping with 'logits': give a metric of your own"
        )
    return outputs[0]


def _class_dim(dim: int | None, logits: list[Tensor], pieces: list[Piece]) -> int:
    shape, rank = list(logits[0].shape), logits[0].dim()
    if dim is None:
        first = next(iter(tensors_of(pieces[0].inputs)), None)
        if rank in (1, 2):
            dim = -1
        elif rank == 4 or rank == 5:
            dim = 1
        elif rank == 3 and first is not None and first.dim() == 2 and list(first.shape) == shape[:2]:
            dim = -1  # a class for each token
    if dim is None or not -rank <= dim < rank:
        raise ValueError(
            f"metric is 'agreement', and which dimension of the output {shape} counts classes is not clear: give "
            f"metric=torch_sluice.compress.Agreement(dim=...)" + (f"; dim is {dim}" if dim is not None else "")
        )
    if shape[dim] < 2:
        raise ValueError(
            f"metric is 'agreement', and the output {shape} has {shape[dim]} class in dimension {dim}, expected at "
            "least 2: give a metric of your own, which knows the threshold"
        )
    return dim


def run_original(model: nn.Module, inputs: Any) -> Any:
    """The model's output, with the same random numbers each time. The model is in eval mode."""
    with torch.no_grad(), seeded():
        return call_model(model, inputs)
