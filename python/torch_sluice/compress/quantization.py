"""Which layers are quantised: those that become faster on this machine, or as fast and smaller, as far as the metric
allows."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_sluice.compress.calling import call_model, evaluating
from torch_sluice.compress.embedding import SMALLEST, QuantizedEmbedding
from torch_sluice.compress.latency import compare_latency, measure_layers
from torch_sluice.compress.measure import Measure
from torch_sluice.compress.progress import Progress
from torch_sluice.compress.quantized import QuantizedConv2d, QuantizedLinear
from torch_sluice.compress.report import LayerDecision, count_bytes
from torch_sluice.compress.slicing import is_depthwise

_LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding)
_GAIN = 1.1  # a layer must become so many times faster, or just faster if it has SMALLEST weights
_TURNS = 3  # of timing
_RELAXED_SQNR = 24.0  # dB: noise of a row is 1/16 of it
_RELAXED_GAIN = 1.02  # the model must become so many times faster
_BYTES_WORTH = 0.1  # what all the bytes that quantising wins count for, all the time counting 1


@dataclass
class Candidate:
    """A layer, what it would become, and what that wins."""

    name: str
    quantized: nn.Module
    before: float  # seconds in a call of the model on the example
    after: float
    bytes: int = 0  # won


def find_candidates(
    model: nn.Module, example_inputs: Any, options: dict, progress: Progress
) -> tuple[list[Candidate], list[LayerDecision]]:
    """The layers that are better quantised, timed within calls of the whole model; and why others stay."""
    inputs = _record_inputs(model, example_inputs)
    shared = _shared_weights(model)
    possible, stay = [], []
    progress.start("packing", len(inputs))
    for name, module in model.named_modules():
        if type(module) not in _LAYERS:
            continue
        progress.step(name)
        reason = _why_not(name, module, inputs, shared, model)
        if reason is None:
            try:
                layer = _quantize(module, options)
                with torch.inference_mode():
                    layer(inputs[name])
            except (ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0][:200]
            else:
                won = count_bytes(module) - count_bytes(layer)
                possible.append(Candidate(name, layer, 0.0, 0.0, won))
                continue
        stay.append(LayerDecision(name, "float", reason))
    timed = [candidate for candidate in possible if not isinstance(candidate.quantized, QuantizedEmbedding)]
    _time_in_place(model, timed, example_inputs, progress)
    chosen = []
    for candidate in possible:
        before, after = candidate.before, candidate.after
        small = model.get_submodule(candidate.name).weight.numel() < SMALLEST
        # An embedding's lookup is a share of the time that nobody notices: it is quantised for its bytes.
        if isinstance(candidate.quantized, QuantizedEmbedding) or before > (_GAIN if small else 1.0) * after:
            chosen.append(candidate)
        else:
            reason = f"it is not {f'{_GAIN:g} times ' if small else ''}faster quantised"
            stay.append(LayerDecision(candidate.name, "float", f"{reason}: {before * 1e6:.0f} -> {after * 1e6:.0f} µs"))
    return chosen, stay


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
    if isinstance(module, nn.Embedding):
        return QuantizedEmbedding.from_float(module)
    if isinstance(module, nn.Linear):
        return QuantizedLinear.from_float(module, **options)
    options.pop("outlier_ratio", None)
    return QuantizedConv2d.from_float(module, **options)


def _record_inputs(model: nn.Module, example_inputs: Any) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    hooks = []

    def record(name):
        def hook(module, args):
            if len(args) == 1:
                inputs.setdefault(name, args[0].detach().clone(memory_format=torch.preserve_format))

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
    return inputs


def _shared_weights(model: nn.Module) -> set[str]:
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            names.setdefault(id(weight), []).append(name)
    return {name for shared in names.values() if len(shared) > 1 for name in shared}


def _time_in_place(model: nn.Module, candidates: list[Candidate], example_inputs: Any, progress: Progress) -> None:
    """Measures ``before`` and ``after`` of all candidates within calls of the model, all of them quantised or none.

    In place, since weights that a loop over one layer would find in a cache come from memory in a call of the model,
    four times as many of them in float32. The best of several turns: what another process does meets some of them.
    """
    if not candidates:
        return
    quantized = apply(model, candidates)
    before, after = {}, {}
    progress.start("timing", _TURNS)
    for _ in range(_TURNS):
        progress.step("layers")
        for target, types, seconds in (
            (model, _LAYERS, before), (quantized, (QuantizedLinear, QuantizedConv2d), after),
        ):  # fmt: skip
            for name, spent in measure_layers(target, example_inputs, types).items():
                seconds[name] = min(spent, seconds.get(name, spent))
    for candidate in candidates:
        candidate.before, candidate.after = before[candidate.name], after[candidate.name]


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
    alone, and those that cost most for what they win, in time and a little in bytes, stay in floating point."""
    progress.start("quantising", None)
    progress.step("all layers")
    if not candidates or measure.share(apply(model, candidates)) >= floor:
        return candidates, []
    start = measure.loss(model)
    costs = {}
    progress.start("quantising", len(candidates))
    for candidate in candidates:
        progress.step(candidate.name)
        costs[candidate.name] = max(measure.loss(apply(model, [candidate])) - start, 1e-7)
    time = sum(c.before - c.after for c in candidates) or 1.0
    size = sum(c.bytes for c in candidates) or 1
    worth = {c.name: (c.before - c.after) / time + _BYTES_WORTH * c.bytes / size for c in candidates}
    order = sorted(candidates, key=lambda c: -worth[c.name] / costs[c.name])
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
            c.name, "float", f"quantised alone it moves the outputs by {costs[c.name]:.2%}", None, None,
            c.before - c.after, costs[c.name],
        )
        for c in order[low:]
    ]  # fmt: skip
    return order[:low], stay


def relax(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, float] | None:
    """A copy of a quantised model whose activations may take fewer bits, and how many times as fast it is; None where
    that wins nothing, as where the processor multiplies 7 and 8 bits at the same speed."""
    relaxed, changed = copy.deepcopy(model), False
    for module in relaxed.modules():
        if isinstance(module, (QuantizedLinear, QuantizedConv2d)):
            changed = changed or module.policy == "sqnr"
            module.target_sqnr = min(module.target_sqnr, _RELAXED_SQNR)
    if not changed:
        return None
    before, after = compare_latency(model, relaxed, example_inputs)
    gain = before.median / after.median
    return (relaxed, gain) if gain >= _RELAXED_GAIN else None
