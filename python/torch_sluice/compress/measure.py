"""What compression must keep: the user's metric, or how close the outputs stay to the original's."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torch_sluice.compress.calling import call_model, evaluating, float_outputs

Metric = Callable[[nn.Module, list], float]
_COMPARED = 8  # batches on which outputs are compared
_FAILURES = (RuntimeError, ValueError, IndexError, TypeError)  # of shapes that only other data leads to


def read_batches(data: Iterable) -> list[tuple[Any, Any]]:
    """All batches of data, read once.

    Raises:
        TypeError: data is not iterable.
        ValueError: it yields nothing, or something else than (inputs, target).
    """
    if not isinstance(data, Iterable) or isinstance(data, (Tensor, str, dict)):
        raise TypeError(f"data is a {type(data).__name__}, expected an iterable of (inputs, target) batches")
    batches = list(data)
    if not batches:
        raise ValueError("data yields no batch, expected at least one (inputs, target): an iterator that was used up?")
    for number, batch in enumerate(batches):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(
                f"batch {number} of data is a {type(batch).__name__}"
                + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
                + ", expected a pair (inputs, target); target may be None without a metric"
            )
    return [tuple(batch) for batch in batches]


class Fidelity:
    """The metric where the user has none: 1 for the original's outputs, less by their relative squared error.

    1 - sum |y' - y|^2 / sum |y - mean(y)|^2 over all elements of all floating-point outputs y of the original and y' of
    the candidate, with the mean over the samples of a batch; where outputs do not vary, the mean is left out.
    """

    def __init__(self, original: nn.Module, batches: list[tuple[Any, Any]]):
        self._expected: list[list[Tensor]] = []
        spread = magnitude = 0.0
        with evaluating(original), torch.no_grad():
            for inputs, _ in batches:
                outputs = [out.detach().clone() for out in float_outputs(call_model(original, inputs))]
                self._expected.append(outputs)
                for out in outputs:
                    out = out.double()
                    magnitude += float(out.square().sum())
                    if out.dim() > 0 and out.shape[0] > 1:
                        spread += float((out - out.mean(0)).square().sum())
        self._scale = spread if spread > 1e-12 * magnitude else magnitude
        if not math.isfinite(self._scale):
            raise ValueError(
                "the model's outputs on data are not finite, expected finite numbers to compare with: look for inf or "
                "NaN in data and in the model's weights"
            )

    def __call__(self, model: nn.Module, batches: list[tuple[Any, Any]]) -> float:
        error = 0.0
        with evaluating(model), torch.no_grad():
            for (inputs, _), expected in zip(batches, self._expected, strict=True):
                for out, wanted in zip(float_outputs(call_model(model, inputs)), expected, strict=True):
                    error += float((out.double() - wanted.double()).square().sum())
        if self._scale == 0:
            return 1.0 if error == 0 else 0.0
        return 1.0 - error / self._scale


class Measure:
    """The metric of the original and of candidates, on batches that stay the same.

    ``loss()`` is smoother: a metric such as an accuracy moves by whole samples, which drown what one small cut costs.
    """

    def __init__(self, original: nn.Module, data: Iterable, metric: Metric | None):
        self.batches = read_batches(data)
        self.fidelity = metric is None
        self._metric = metric or Fidelity(original, self.batches)
        self._compared = self.batches[:_COMPARED]
        self._closeness = self._compare_outputs(original)
        self.original = self._run(original)
        if not math.isfinite(self.original):
            raise ValueError(
                f"metric returned {self.original} for the original model, expected a finite number: check it on "
                "the uncompressed model first"
            )
        if self.original <= 0:
            raise ValueError(
                f"metric returned {self.original} for the original model, expected a number above 0 of which a share "
                "can be kept: return an accuracy or a correlation, not a loss (exp(-loss) does)"
            )

    @property
    def inputs(self) -> list[Any]:
        return [inputs for inputs, _ in self.batches]

    def _run(self, model: nn.Module) -> float:
        with evaluating(model), torch.no_grad():
            value = self._metric(model, self.batches)
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metric returned a {type(value).__name__}, expected one number: {error}") from None

    def share(self, candidate: nn.Module) -> float:
        """The candidate's metric as a share of the original's; -inf for NaN and for a candidate that does not run."""
        try:
            value = self._run(candidate)
        except _FAILURES:
            return -math.inf
        return value / self.original if math.isfinite(value) else -math.inf

    def _compare_outputs(self, original: nn.Module) -> Fidelity | None:
        """None where the metric calls the model otherwise than ``model(inputs)``, or outputs are infinite."""
        if self.fidelity and len(self._compared) == len(self.batches):
            return self._metric
        try:
            return Fidelity(original, self._compared)
        except _FAILURES:
            return None

    def loss(self, candidate: nn.Module) -> float:
        """What the candidate costs, for comparing candidates: 1 - fidelity on the first batches; where outputs cannot
        be compared, 1 - ``share()``. Infinity for a candidate that does not run."""
        if self._closeness is None:
            return 1 - self.share(candidate)
        try:
            value = 1 - self._closeness(candidate, self._compared)
        except _FAILURES:
            return math.inf
        return value if math.isfinite(value) else math.inf
