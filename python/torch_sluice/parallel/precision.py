"""Which format a bucket of gradients travels in: a rule over numbers that every rank has.

Each rank measures its own bucket and gathers everybody's measurements, and all apply the same function to the same
rows. So ranks cannot disagree, whatever their gradients are: what one of them alone knows has no part in it.
"""

import math
from dataclasses import asdict, dataclass, fields

import torch

from torch_sluice.accumulate.operators import BLOCK, measure_gradient

LEVELS = ("int8", "float16", "bfloat16", "float32")  # from few bytes to many, and from coarse to fine range
_INT8, _FLOAT16, _BFLOAT16, _FLOAT32 = range(len(LEVELS))

# Squared relative error of rounding to nearest: ulp^2 / 12 on average, with ulp / |x| between 2^-11 and 2^-10 for
# float16, 2^-8 and 2^-7 for bfloat16: half of what stochastic rounding costs in accumulate/policy.py.
_ROUNDING = {_FLOAT16: 2.0**-20 / 24, _BFLOAT16: 2.0**-14 / 24}

_LARGEST_SUM = 1e38

UNDERFLOW_SHARE = 0.01  # as in accumulate: so many elements may lose bits to float16's range


@dataclass
class Record:
    """What is remembered about a bucket. The same on every rank after each decision."""

    level: int = _INT8
    calm: int = 0  # decisions in a row for which a format of fewer bytes would have done
    patience: int = 2  # calm decisions that it takes to return to it

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        for field in fields(self):
            setattr(self, field.name, int(state[field.name]))


def measure(values: torch.Tensor, record: Record, underflow: int, ranks: int) -> list[float]:
    """What this rank says of its bucket, float32 of a multiple of BLOCK elements.

    The squared norm, the number of elements that are not finite, the squared error that int8 would make (a step of
    amax / 127 in each block, rounded: step^2 / 12 an element, hence relative to the norm (crest factor / 440)^2), how
    many elements underflowed when float16 was last used, and the record. Elements of which the ranks' sum may exceed
    float32's range count as not finite.
    """
    sumsq, largest, nonfinite = measure_gradient(values)[:3].tolist()
    nonfinite += largest * ranks > _LARGEST_SUM
    amax = torch.linalg.vector_norm(values.view(-1, BLOCK), ord=math.inf, dim=1, dtype=torch.float32)
    int8_error = (amax.double() / 127).square().sum().item() * BLOCK / 12
    return [sumsq, nonfinite, int8_error, underflow, record.level, record.calm, record.patience]


class FixedPrecision:
    """Always the same format, as long as gradients are finite."""

    def __init__(self, name: str):
        self.level = LEVELS.index(name)

    def choose(self, record: Record, rows: list[list[float]], elements: int, roundings: int) -> int:
        return self.level


class AutoPrecision:
    """The format of the fewest bytes whose predicted relative error is within the tolerance.

    The error of the sum, for independent errors of the ranks, is sqrt(sum of squared errors / sum of squared norms)
    times sqrt(roundings). Float16 is passed over where more than one element in a hundred has just lost bits to its
    range. A bucket goes to more bytes at once, and to fewer after ``patience`` decisions in a row at which half the
    tolerance would have allowed them; every promotion doubles its patience, up to 64.
    """

    def __init__(self, tolerance: float):
        self.tolerance = tolerance

    def choose(self, record: Record, rows: list[list[float]], elements: int, roundings: int) -> int:
        sumsq, _, int8_error, underflow, levels, calms, patiences = map(list, zip(*rows, strict=True))
        # Records differ only where ranks resumed from different checkpoints: then all take the most careful one.
        record.level, record.calm, record.patience = int(max(levels)), int(min(calms)), int(max(patiences))
        signal = math.fsum(sumsq)
        int8 = math.fsum(int8_error) / signal if signal > 0 else 0.0
        squared = {_INT8: roundings * int8, **{level: roundings * error for level, error in _ROUNDING.items()}}
        wide = sum(underflow) > UNDERFLOW_SHARE * elements * len(rows)

        def cheapest(tolerance: float) -> int:
            for level, error in squared.items():
                if error <= tolerance**2 and not (wide and level == _FLOAT16):
                    return level
            return _FLOAT32

        needed = cheapest(self.tolerance)
        if needed > record.level:
            record.level, record.calm, record.patience = needed, 0, min(2 * record.patience, 64)
            return record.level
        calmer = cheapest(self.tolerance / 2)
        record.calm = record.calm + 1 if calmer < record.level else 0
        if record.calm >= record.patience:
            record.level, record.calm = calmer, 0
        return record.level


def choose_format(policy, record: Record, rows: list[list[float]], elements: int, roundings: int) -> str:
    """The name of the format. Float32 for a bucket that is not finite on some rank, so that it arrives as it is; such a
    bucket teaches nothing about the next."""
    if any(row[1] > 0 for row in rows):
        return LEVELS[_FLOAT32]
    return LEVELS[policy.choose(record, rows, elements, roundings)]
