"""How well a share of a metric is known: a ratio of sums over samples or blocks, and what it is at least."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CONFIDENCE = 0.95  # one-sided
_NORMAL = 1.6449  # the quantile of a normal distribution at CONFIDENCE
_MOST_TIMES = 50.0  # exponent
_JUMP, _STILL = 0.1, 1e-3  # of the mean scale, that a sample that jumps loses at least; of that, the others at most
_NORMAL_SPREAD = 3.0  # the mean square of squares of a normal variable, by the square of their mean
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
    jump: float = 0.0  # what `low` takes a sample to lose that was not seen (largest_jump)


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


def skewed_error(losses: Tensor, scales: Tensor) -> float:
    """By how much more than sum(losses) / sum(scales), float64 [n] of samples that lose nothing or more, may be lost.

    Such losses are skewed: most samples lose little, a few much, and without these few both the mean and its error come
    out too small. So the bound is that of the mean's logarithm, which has the error error / mean, with the quantile of
    Cornish and Fisher for the skewness that is seen.
    """
    count, lost = len(losses), float(losses.sum() / scales.sum())
    residuals = losses - lost * scales
    variance = float(residuals.square().mean())
    if not lost > 0 or variance == 0:
        return 0.0
    skewness = max(0.0, float(residuals.pow(3).mean()) / variance**1.5)
    quantile = student_quantile(count - 1)
    quantile += skewness / (6 * math.sqrt(count)) * (1 + 2 * quantile**2)
    return lost * math.expm1(min(_MOST_TIMES, quantile * ratio_error(losses, scales) / lost))


def rare_share(scales: Tensor) -> float:
    """What one sample counts of all, float64 [n], beyond what it would if they varied as squares of a normal variable
    do: 0 for nearly all models.

    Where a few samples make up most of the scale (outputs that are all but constant and sometimes jump), n samples are
    as good as these few: that none of them differs does not show that the next does not.
    """
    total = float(scales.sum())
    return max(0.0, float(scales.square().sum()) / total**2 - _NORMAL_SPREAD / len(scales)) if total > 0 else 0.0


def largest_jump(losses: Tensor, scales: Tensor) -> float:
    """What a sample lost, by the mean scale, while most others lost next to nothing; 0 where none did. float64 [n].

    A model that ranks, as detectors take the best of their queries, gives other outputs altogether where it takes
    another. Where a candidate is seen to do so, that none of n samples did with the next is no certainty.
    """
    mean = float(scales.mean())
    if len(losses) < 2 or not mean > 0:
        return 0.0
    most, middle = float(losses.max()) / mean, float(losses.median()) / mean
    return most if most >= _JUMP and middle <= _STILL * most else 0.0


def with_jump(score: Score, jump: float) -> Score:
    """The score, its bound with a sample that lost so much and was not seen."""
    if not score.known or score.samples < 2 or not jump > score.jump or not math.isfinite(score.low):
        return score
    share = (jump - score.jump) / score.samples
    return replace(score, low=score.low - share * (1 + student_quantile(score.samples - 1)), jump=jump)


def score_losses(losses: Tensor, scales: Tensor, unit: float = 0.0, samples: int | None = None) -> Score:
    """Of 1 - sum(losses) / sum(scales), both float64 [n] of independent samples; of one sample nothing is known about
    its uncertainty. ``unit``: as for ``lower_bound``; without one, losses are as small as they like."""
    count = len(losses)
    samples = count if samples is None else samples
    kept = 1 - float(losses.sum() / scales.sum())
    if not math.isfinite(kept):
        return failed("its outputs are not finite")
    if count < 2:
        return Score(kept, kept, samples, known=False)
    if unit > 0:
        return Score(kept, lower_bound(kept, ratio_error(losses, scales), count - 1, unit), samples)
    low = lower_bound(kept, 0.0, count - 1, rare_share(scales)) - skewed_error(losses, scales)
    return Score(kept, low, samples)


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
