"""How many bits the activations of quantised layers take: more for layers that would cost the metric too much, fewer
for all of them where that is as good."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from torch_sluice.compress.latency import compare_latency
from torch_sluice.compress.layers import quantized_weights
from torch_sluice.compress.progress import Progress
from torch_sluice.compress.quantization import TURNS, Candidate, time_turn

RELAXED_SQNR = 24.0  # dB: noise of a row is 1/16 of it
FINER_SQNR = 42.0  # for layers that would have to stay in floating point
_RELAXED_GAIN = 1.02  # the model must become so many times faster


@contextlib.contextmanager
def with_sqnr(candidates: Sequence[Candidate], new: Callable[[float], float]) -> Iterator[None]:
    """Within it, the activations of these candidates take bits for another ratio of signal to noise, in dB."""
    weights = [member.weight for whole in candidates for member in whole.all()]
    before = [weight.options.target_sqnr for weight in weights]
    try:
        for weight, decibels in zip(weights, before, strict=True):
            weight.set_target_sqnr(new(decibels))
        yield
    finally:
        for weight, decibels in zip(weights, before, strict=True):
            weight.set_target_sqnr(decibels)


def find_finer(
    model: nn.Module, candidates: list[Candidate], example_inputs: Any, progress: Progress
) -> list[Candidate]:
    """Those whose activations can take more bits than they do and that are still faster than in floating point."""
    able = [
        c
        for c in candidates
        if c.weight.options.policy == "sqnr" and not c.is_looked_up and c.weight.options.target_sqnr < FINER_SQNR
    ]
    if not able:
        return []
    progress.start("timing", TURNS)
    seconds: dict[str, float] = {}
    with with_sqnr(able, lambda width: FINER_SQNR):
        for _ in range(TURNS):
            progress.step("with more bits")
            time_turn(model, able, able, example_inputs, seconds)
    for candidate in able:
        candidate.finer = seconds[candidate.places[0]]
    return [candidate for candidate in able if candidate.finer < candidate.before]


def relax(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, float] | None:
    """A copy of a quantised model whose activations may take fewer bits, and how many times as fast it is; None where
    that wins nothing, as where the processor multiplies 7 and 8 bits at the same speed. Its quantised weights lie in
    the memory of the model's."""
    memo = {id(weight): nn.Parameter(weight.twin(), requires_grad=False) for _, weight in quantized_weights(model)}
    relaxed, changed = copy.deepcopy(model, memo), False
    for _, weight in quantized_weights(relaxed):
        if weight.options.policy == "sqnr" and weight.kind != "rows":
            changed = changed or weight.options.target_sqnr > RELAXED_SQNR
            weight.set_target_sqnr(min(weight.options.target_sqnr, RELAXED_SQNR))
    if not changed:
        return None
    before, after = compare_latency(model, relaxed, example_inputs)
    gain = before.median / after.median
    return (relaxed, gain) if gain >= _RELAXED_GAIN else None
