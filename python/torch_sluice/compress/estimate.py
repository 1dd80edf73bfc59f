"""How well a share of a metric is known: a ratio of sums over samples or blocks, and what it is at least."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CONFIDENCE = 0.95  # one-sided
_NORMAL = 1.6449  # the quantile of a normal distribution at CONFIDENCE
# Of Student's t with 1, 2, .. degrees of freedom.
_STUDENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753)


@dataclass(frozen=True)
class Score:
    """What a candidate keeps of the metric, and at least, with a confidence of 95 %."""

    kept: float  # share of the original's; -inf for a candidate that fails
    low: float  # lower bound; `kept` where nothing is known about its uncertainty
    samples: int = 0  # behind both
    reason: str | None = None  # why it fails
    known: bool = True  # whether `low` is a bound


def failed(reason: str) -> Score:
    return Score(-math.inf, -math.inf, 0, reason)


def student_quantile(degrees: int) -> float:
    """Of Student's t at 95 %, one-sided, for at least one degree of freedom; within .001."""
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def ratio_error(values: Tensor, scales: Tensor) -> float:
    """The standard error of sum(values) / sum(scales), both float64 [n], n at least 2: that of the ratio estimator."""
    total = float(scales.sum())
    residuals = values - values.sum() / total * scales
    count = len(values)
    return math.sqrt(count / (count - 1) * float(residuals.square().sum())) / total


def lower_bound(kept: float, error: float, degrees: int, unit: float = 0.0) -> float:
    """What is kept at least, with its standard error and the degrees of freedom behind that.

    ``unit``: the share that one sample is worth, for a metric that moves by whole samples. One that was lost and not
    seen is added: that no sample of n differs shows no more than that about 3 of n may. A metric that is above the
    original's counts as the same: most often it is luck of the samples, which other data does not share.
    """
    return min(kept, 1.0) - unit - student_quantile(degrees) * math.hypot(error, unit)


def score_losses(losses: Tensor, scales: Tensor, unit: float = 0.0, samples: int | None = None) -> Score:
    """Of 1 - sum(losses) / sum(scales), both float64 [n] of independent samples; of one sample nothing is known about
    its uncertainty."""
    count = len(losses)
    samples = count if samples is None else samples
    kept = 1 - float(losses.sum() / scales.sum())
    if not math.isfinite(kept):
        return failed("its outputs are not finite")
    if count < 2:
        return Score(kept, kept, samples, known=False)
    if float(losses.abs().sum()) == 0:
        return Score(kept, kept if unit == 0 else lower_bound(kept, 0.0, count - 1, unit), samples)
    return Score(kept, lower_bound(kept, ratio_error(losses, scales), count - 1, unit), samples)


def score_blocks(values: list[float], before: list[float], weights: list[float], unit: float, samples: int) -> Score:
    """Of a metric's values on blocks of data and the original's, weighted by the samples of a block."""
    weight = torch.tensor(weights, dtype=torch.float64)
    after, original = (torch.tensor(v, dtype=torch.float64) * weight for v in (values, before))
    kept = float(after.sum() / original.sum())
    if not math.isfinite(kept):
        return failed("its metric is not finite")
    if len(values) < 2:
        return Score(kept, kept, samples, known=False)
    return Score(kept, lower_bound(kept, ratio_error(after, original), len(values) - 1, unit), samples)
