"""Which format each parameter's sum has: the rules, and what they remember about a parameter.

A policy is asked twice: for the format of a window's sum before its first gradient, and before each gradient whether a
float16 sum goes on in float32. What it may know are the statistics of the gradients that were added so far.
"""

import math
from dataclasses import asdict, dataclass, fields

import torch

from torch_sluice.accumulate.operators import BLOCK, measure_gradient

# Squared relative error of one stochastic rounding to float16: ulp^2 / 6 on average, with ulp / |x| between 2^-11 and
# 2^-10. So it lies between half and twice this, and for gradients that are spread like a normal variable within 15 %.
ROUNDING = 2.0**-20 / 12


@dataclass
class Record:
    """What is known about one parameter. Sums run over the gradients of the current window."""

    elements: int
    windows: int = 0  # that have ended
    folds: int = 0  # gradients added in this window
    error_sumsq: float = 0.0  # squared error that rounding to float16 has made
    sums_sumsq: float = 0.0  # the squared norms of the sum after each gradient, added up
    sum_sumsq: float = 0.0  # squared norm of the sum after the last gradient
    underflow: float = 0.0  # elements below float16's normal range, at the last gradient
    grad_norm: float = 0.0  # of the last gradient, as autograd gave it
    grad_amax: float = 0.0
    step_norm: float = 0.0  # of the averaged gradient at the last step
    last_error: float = 0.0  # relative error of the last window's sum
    promotions: int = 0  # times that a float16 sum went on in float32
    prefers_fp32: bool = True  # where "auto" starts the next window
    others_want_fp32: bool = False  # whether another rank does
    answer: int = -1  # what the ranks have said since: 0 none does, 1 one does; -1 nothing
    heard: bool = False  # whether they ever have
    calm_windows: int = 0  # windows in a row in which float16 would have done
    patience: int = 1  # calm windows that it takes to go to float16

    def start_window(self) -> None:
        """Forgets the sums, and keeps what describes the parameter."""
        self.last_error = self.error if self.folds else self.last_error
        self.windows += 1
        self.folds = 0
        self.error_sumsq = self.sums_sumsq = self.sum_sumsq = 0.0

    def note(self, stats: list[float], is_sum: bool = False) -> None:
        """Takes in the six statistics of one added gradient; ``is_sum``: that is all there is of the sum."""
        grad_sumsq, self.grad_amax, nonfinite, self.sum_sumsq, error, self.underflow = stats
        if is_sum:  # the gradient was not added to anything, and only it was measured
            self.sum_sumsq = math.inf if nonfinite > 0 else grad_sumsq
        self.grad_norm = math.sqrt(grad_sumsq)
        self.sums_sumsq += self.sum_sumsq
        self.error_sumsq += error

    def rounding_error(self, sumsq: float) -> float:
        """Relative error of the sum, for this much squared error."""
        return math.sqrt(sumsq / self.sum_sumsq) if 0 < self.sum_sumsq < math.inf else 0.0

    @property
    def error(self) -> float:
        """Relative error that rounding to float16 has made in this window's sum."""
        return self.rounding_error(self.error_sumsq)

    def state_dict(self) -> dict:
        return asdict(self)

    def check_state_dict(self, state: dict) -> None:
        """Raises KeyError, ValueError or TypeError for a state that load_state_dict() can't take."""
        for field in fields(self):
            type(getattr(self, field.name))(state[field.name])
        if int(state["elements"]) != self.elements:
            raise ValueError(f"its record is of {state['elements']} elements, expected {self.elements}")

    def load_state_dict(self, state: dict) -> None:
        for field in fields(self):
            setattr(self, field.name, type(getattr(self, field.name))(state[field.name]))


class Policy:
    """What all policies answer."""

    is_measured = False  # whether what was measured decides, so that ranks have something to agree on
    allowed_error = math.inf  # relative error of a sum, above which the user is told

    def choose(self, record: Record) -> str:
        """The format in which a window's sum begins."""
        raise NotImplementedError

    def wants_fp32(self, record: Record, grad: torch.Tensor | None) -> bool:
        """Whether a float16 sum goes on in float32, before this gradient is added."""
        return False

    def end_window(self, record: Record) -> None:
        """Learns from a window that has ended."""


class FixedPolicy(Policy):
    """Every sum in one format."""

    def __init__(self, format: str):
        self.format = format

    def choose(self, record: Record) -> str:
        return self.format


class SeedPolicy(Policy):
    """The seed's rule to the letter: a gradient whose norm is above 1e-3 is added in float32, others in float16 (here:
    scaled). The norm must be known before the cast, so this reads each gradient of a float16 sum twice."""

    threshold = 1e-3

    def choose(self, record: Record) -> str:
        return "fp16"

    def wants_fp32(self, record: Record, grad: torch.Tensor | None) -> bool:
        if grad.layout != torch.strided:
            return False
        sumsq, _, nonfinite = measure_gradient(grad)[:3].tolist()
        return nonfinite > 0 or math.sqrt(sumsq) > self.threshold


class AutoPolicy(Policy):
    """Float16 where its error is small, measured and not guessed from a norm.

    A parameter's first window is summed in float32, and what float16 would have cost is predicted from what the kernel
    measured: a gradient that cancels almost all of a sum leaves the rounding of what it cancelled, and nothing can mend
    that afterwards. Float16 follows once it would have stayed below half the ``tolerance``. From then on the kernel
    reports the squared error of every rounding; a sum goes on in float32 once the error of this window, as a share of
    the sum's norm, exceeds ``tolerance``, or once more than ``underflow_share`` of its elements are so small beside the
    largest of their block that float16 keeps fewer than eleven bits of them. It returns to float16 after ``patience``
    calm windows; every promotion doubles the patience of that parameter, up to 64, so that none flips at each step.

    Parameters of fewer than 1024 elements are summed in float32, for there is nothing to save, and so are windows of
    one gradient: they are the gradient.
    """

    underflow_share = 0.01
    is_measured = True

    def __init__(self, tolerance: float, every: int | None):
        if not 0 < tolerance < math.inf:
            raise ValueError(f"tolerance is {tolerance}, expected a number above 0")
        self.allowed_error = tolerance
        self.every = every

    def choose(self, record: Record) -> str:
        stays = record.prefers_fp32 or record.others_want_fp32 or record.elements < BLOCK or self.every == 1
        return "fp32" if stays else "fp16"

    def wants_fp32(self, record: Record, grad: torch.Tensor | None) -> bool:
        if record.error <= self.allowed_error and record.underflow <= self.underflow_share * record.elements:
            return False
        record.prefers_fp32 = True
        record.calm_windows = 0
        record.patience = min(2 * record.patience, 64)
        return True

    def end_window(self, record: Record) -> None:
        if record.folds == 0:
            return
        if record.folds == 1:
            record.prefers_fp32, record.calm_windows = True, 0  # nothing was added up
        elif not record.prefers_fp32:
            self.wants_fp32(record, None)  # what the last gradient did decides about the next window
        else:
            predicted = record.rounding_error(ROUNDING * record.sums_sumsq)
            calm = predicted < self.allowed_error / 2
            record.calm_windows = record.calm_windows + 1 if calm else 0
            if record.calm_windows >= record.patience:
                record.prefers_fp32 = False


def make_policy(name: str, tolerance: float, every: int | None) -> Policy:
    """The policy of this name. Raises ValueError for another."""
    if name in ("fp16", "fp32"):
        return FixedPolicy(name)
    if name == "seed":
        return SeedPolicy()
    if name == "auto":
        return AutoPolicy(tolerance, every)
    raise ValueError(f"policy is {name!r}, expected 'auto', 'fp16', 'fp32' or 'seed'")
