"""Latency on this machine: of a model as a whole, and the share that each layer has in it."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from torch_sluice.compress.calling import call_model, evaluating


class Latency(NamedTuple):
    """Seconds of one call: the median, and what 95 % of the calls stay below."""

    median: float
    p95: float


def time_call(function: Callable[[], Any], rounds: int = 7, budget: float = 0.3) -> list[float]:
    """Seconds of each of up to ``rounds`` calls after one that warms up; fewer once ``budget`` seconds have passed, but
    at least three."""
    function()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < rounds and (len(times) < 3 or time.perf_counter() - begin < budget):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def measure_latency(model: nn.Module, example_inputs: Any, rounds: int = 30, budget: float = 1.0) -> Latency:
    """Of a call on the example, in eval mode without gradients, with torch's current threads."""
    with evaluating(model), torch.inference_mode():
        times = sorted(time_call(lambda: call_model(model, example_inputs), rounds, budget))
    return Latency(statistics.median(times), times[min(len(times) - 1, int(len(times) * 0.95))])


def compare_latency(first: nn.Module, second: nn.Module, example_inputs: Any, rounds: int = 30, budget: float = 2.0):
    """Both latencies, measured in turn so that a change of the machine's speed meets both."""
    models, times = (first, second), ([], [])
    with evaluating(first), evaluating(second), torch.inference_mode():
        for model in models:
            call_model(model, example_inputs)
        begin = time.perf_counter()
        while len(times[0]) < rounds and (len(times[0]) < 3 or time.perf_counter() - begin < budget):
            for model, own in zip(models, times, strict=True):
                start = time.perf_counter()
                call_model(model, example_inputs)
                own.append(time.perf_counter() - start)
    return tuple(Latency(statistics.median(own), sorted(own)[min(len(own) - 1, int(len(own) * 0.95))]) for own in times)


def measure_layers(model: nn.Module, example_inputs: Any, paths: set[str], rounds: int = 5) -> dict[str, float]:
    """Seconds that each of these modules takes within a call, the median of several; several uses add up."""
    started: dict[str, float] = {}
    spent: dict[str, list[float]] = {}
    hooks = []

    def before(name):
        return lambda module, args: started.__setitem__(name, time.perf_counter())

    def after(name):
        def hook(module, args, output):
            spent.setdefault(name, [0.0])[-1] += time.perf_counter() - started[name]

        return hook

    try:
        for name, module in model.named_modules():
            if name in paths:
                hooks.append(module.register_forward_pre_hook(before(name)))
                hooks.append(module.register_forward_hook(after(name)))
        with evaluating(model), torch.inference_mode():
            call_model(model, example_inputs)
            spent.clear()
            for _ in range(rounds):
                for times in spent.values():
                    times.append(0.0)
                call_model(model, example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: statistics.median(times) for name, times in spent.items()}
