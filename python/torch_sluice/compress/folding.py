"""Folds batch norms into the convolutions and linear layers before them, for inference."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from torch_sluice.compress.calling import call_model, evaluating, float_outputs, seeded

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
Pair = tuple[str, str]  # a layer and the norm that reads it


def fold_batch_norms(model: nn.Module, example_inputs: Any) -> list[str]:
    """Folds in place what the model, run on the example, feeds from a layer straight into a batch norm.

    The norm becomes ``nn.Identity``. A pair that changes the output (because something else reads the layer, too), or
    that cannot be folded, stays. Returns the names of the norms that are folded.
    """
    pairs = find_pairs(model, example_inputs)
    fold_pairs(model, pairs)
    return [norm for _, norm in pairs]


def fold_pairs(model: nn.Module, pairs: list[Pair]) -> Callable[[], None]:
    """Folds these in place. Returns what undoes it."""
    before = [_fold(model, *pair) for pair in pairs]

    def undo() -> None:
        for modules in reversed(before):
            _set(model, modules)

    return undo


def find_pairs(model: nn.Module, example_inputs: Any) -> list[Pair]:
    """The pairs that may be folded without a change of the outputs on the example. The model is as before after it."""
    pairs = _find_candidates(model, example_inputs)
    if not pairs:
        return []
    with evaluating(model), torch.no_grad():
        expected = _run(model, example_inputs)
        if _fits(model, pairs, example_inputs, expected):
            return pairs
        good: list[Pair] = []
        for pair in pairs:
            if _fits(model, [*good, pair], example_inputs, expected):
                good.append(pair)
    return good


def _fits(model: nn.Module, pairs: list[Pair], example_inputs: Any, expected: list[torch.Tensor]) -> bool:
    undo: list[dict[str, nn.Module]] = []
    try:
        for pair in pairs:
            undo.append(_fold(model, *pair))
        return _same(_run(model, example_inputs), expected)
    except Exception:  # sizes that do not fit, or a model that asks its norm for what an identity lacks
        return False
    finally:
        for modules in reversed(undo):
            _set(model, modules)


def _find_candidates(model: nn.Module, example_inputs: Any) -> list[Pair]:
    """(layer, norm) where the norm's input is the layer's output with channels in its dimension, each called once."""
    made: dict[int, str] = {}
    keep_alive, calls, pairs, hooks = [], {}, [], []

    def after(name):
        def hook(module, args, output):
            calls[name] = calls.get(name, 0) + 1
            # A norm's channels are in dimension 1: behind a linear layer over tokens, these are the tokens.
            if output.dim() == (2 if isinstance(module, nn.Linear) else module.weight.dim()):
                made[id(output)] = name
                keep_alive.append(output)

        return hook

    def before(name):
        def hook(module, args):
            calls[name] = calls.get(name, 0) + 1
            if args and id(args[0]) in made:
                pairs.append((made[id(args[0])], name))

        return hook

    try:
        for name, module in model.named_modules():
            if type(module) in _LAYERS:
                hooks.append(module.register_forward_hook(after(name)))
            elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                hooks.append(module.register_forward_pre_hook(before(name)))
        with evaluating(model), torch.no_grad():
            call_model(model, example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in pairs if all(calls[name] == 1 for name in pair)]


def _fold(model: nn.Module, layer: str, norm: str) -> dict[str, nn.Module]:
    """Folds one pair; returns the modules that were there."""
    before = {layer: model.get_submodule(layer), norm: model.get_submodule(norm)}
    module = before[layer]
    fuse = fuse_linear_bn_eval if isinstance(module, nn.Linear) else fuse_conv_bn_eval
    modes = module.training, before[norm].training
    try:
        module.eval(), before[norm].eval()
        fused = fuse(module, before[norm])
    finally:
        module.train(modes[0]), before[norm].train(modes[1])
    _set(model, {layer: fused, norm: nn.Identity()})
    return before


def _set(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        model.set_submodule(name, module)


def _run(model: nn.Module, example_inputs: Any) -> list[torch.Tensor]:
    with seeded():
        return float_outputs(call_model(model, example_inputs))


def _same(outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    pairs = zip(outputs, expected, strict=True)
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max())) for a, b in pairs
    )
