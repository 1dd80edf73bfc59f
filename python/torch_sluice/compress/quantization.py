"""Which layers are quantised: those that become faster on this machine, as far as the metric allows."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_sluice.compress.calling import call_model, evaluating
from torch_sluice.compress.embedding import QuantizedEmbedding
from torch_sluice.compress.latency import time_call
from torch_sluice.compress.measure import Measure
from torch_sluice.compress.progress import Progress
from torch_sluice.compress.quantized import QuantizedConv2d, QuantizedLinear
from torch_sluice.compress.report import LayerDecision
from torch_sluice.compress.slicing import is_depthwise

_LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding)
_GAIN = 1.1  # a layer must become so many times faster


@dataclass
class Candidate:
    """A layer, what it would become, and what that wins."""

    name: str
    quantized: nn.Module
    before: float  # seconds of a call, measured on the example
    after: float


def find_candidates(
    model: nn.Module, example_inputs: Any, options: dict, progress: Progress
) -> tuple[list[Candidate], list[LayerDecision]]:
    """The layers that are faster quantised, each timed on the input that the example gives it; and why others stay."""
    inputs, uses = _record_inputs(model, example_inputs)
    shared = _shared_weights(model)
    candidates, stay = [], []
    progress.start("timing", len(inputs))
    for name, module in model.named_modules():
        if type(module) not in _LAYERS:
            continue
        progress.step(name)
        reason = _why_not(name, module, inputs, shared, model)
        if reason is None:
            if isinstance(module, nn.Embedding):  # for its bytes: the lookup is a share of the time that nobody notices
                candidates.append(Candidate(name, QuantizedEmbedding.from_float(module), 1e-9, 0.0))
                continue
            try:
                layer = _quantize(module, options)
                before, after = _time_both(module, layer, inputs[name])
            except (ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0][:200]
            else:
                if before > _GAIN * after:
                    count = uses[name]
                    candidates.append(Candidate(name, layer, before * count, after * count))
                    continue
                reason = f"it is not {_GAIN:g} times faster quantised: {before * 1e6:.0f} -> {after * 1e6:.0f} µs"
        stay.append(LayerDecision(name, "float", reason))
    return candidates, stay


def _why_not(name: str, module: nn.Module, inputs, shared: set[str], model: nn.Module) -> str | None:
    if name not in inputs:
        return "it is not called for example_inputs by itself"
    if name in shared:
        return "its weight is shared with another layer"
    if module.weight.device.type != "cpu":
        return f"its weight is on {module.weight.device}: the integer kernels are for the CPU"
    if not module.weight.isfinite().all():
        return "its weight has NaN or infinity"
    if module.weight.dtype == torch.float64:
        return "its weight is float64"
    if isinstance(module, nn.Embedding):
        return QuantizedEmbedding.why_not(module)
    if isinstance(module, nn.Conv2d):
        if is_depthwise(module):
            return "it is depth-wise: a product of few numbers each"
        return QuantizedConv2d.why_not(module)
    return None


def _quantize(module: nn.Module, options: dict) -> nn.Module:
    options = dict(options)
    if isinstance(module, nn.Linear):
        return QuantizedLinear.from_float(module, **options)
    options.pop("outlier_ratio", None)
    return QuantizedConv2d.from_float(module, **options)


def _record_inputs(model: nn.Module, example_inputs: Any) -> tuple[dict[str, Tensor], dict[str, int]]:
    inputs: dict[str, Tensor] = {}
    uses: dict[str, int] = {}
    hooks = []

    def record(name):
        def hook(module, args):
            if len(args) == 1:
                inputs.setdefault(name, args[0].detach().clone(memory_format=torch.preserve_format))
                uses[name] = uses.get(name, 0) + 1

        return hook

    try:
        for name, module in model.named_modules():
            if type(module) in _LAYERS:
                hooks.append(module.register_forward_pre_hook(record(name)))
        with evaluating(model), torch.no_grad():
            call_model(model, example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, uses


def _shared_weights(model: nn.Module) -> set[str]:
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            names.setdefault(id(weight), []).append(name)
    return {name for shared in names.values() if len(shared) > 1 for name in shared}


def _time_both(module: nn.Module, layer: nn.Module, x: Tensor) -> tuple[float, float]:
    with torch.inference_mode():
        times = ([], [])
        for _ in range(2):  # in turn, the best of both rounds: what another process does in between meets one of them
            for target, own in ((module, times[0]), (layer, times[1])):
                own.append(min(time_call(lambda target=target: target(x), rounds=7, budget=0.1)))
    return min(times[0]), min(times[1])


def apply(model: nn.Module, candidates: list[Candidate]) -> nn.Module:
    """A copy of the model with these layers quantised, none of whose parameters asks for a gradient."""
    quantized = copy.deepcopy(model)
    for candidate in candidates:
        quantized.set_submodule(candidate.name, copy.deepcopy(candidate.quantized))
    if candidates:
        quantized.requires_grad_(False)
        forgo_fast_paths(quantized)
    return quantized


def forgo_fast_paths(model: nn.Module) -> None:
    """nn.TransformerEncoderLayer's fused path reads the weights of its linear layers itself: it must call them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(child, QuantizedLinear) for child in (module.linear1, module.linear2)
        ):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def choose(
    model: nn.Module, candidates: list[Candidate], measure: Measure, floor: float, progress: Progress
) -> tuple[list[Candidate], list[LayerDecision]]:
    """As many of the candidates as leave ``floor`` of the metric. If all together cost too much, each is measured
    alone, and those that cost most per second won stay in floating point."""
    progress.start("quantising", None)
    progress.step("all layers")
    if not candidates or measure.share(apply(model, candidates)) >= floor:
        return candidates, []
    start = measure.share(model)
    costs = {}
    progress.start("quantising", len(candidates))
    for candidate in candidates:
        progress.step(candidate.name)
        costs[candidate.name] = start - measure.share(apply(model, [candidate]))
    order = sorted(candidates, key=lambda c: max(costs[c.name], 1e-6) / (c.before - c.after))
    low, high = 0, len(order) - 1  # the longest prefix that keeps the floor
    while low < high:
        middle = (low + high + 1) // 2
        progress.step(f"{middle} layers")
        if measure.share(apply(model, order[:middle])) >= floor:
            low = middle
        else:
            high = middle - 1
    stay = [
        LayerDecision(
            c.name, "float", f"quantised alone it costs {costs[c.name]:.2%} of the metric", None, None,
            c.before - c.after, costs[c.name],
        )
        for c in order[low:]
    ]  # fmt: skip
    return order[:low], stay
