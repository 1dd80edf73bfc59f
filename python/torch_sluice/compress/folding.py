"""Folds batch norms into the convolutions and linear layers before them, for inference."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from torch_sluice.compress.calling import call_model, evaluating, float_outputs

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def fold_batch_norms(model: nn.Module, example_inputs: Any) -> list[str]:
    """Folds in place what the model, run on the example, feeds from a layer straight into a batch norm.

    The norm becomes ``nn.Identity``. A pair that changes the output (because something else reads the layer, too) is
    put back. Returns the names of the norms that are folded.
    """
    pairs = _find_pairs(model, example_inputs)
    with evaluating(model), torch.no_grad():
        expected = float_outputs(call_model(model, example_inputs))
        folded = [_fold(model, *pair) for pair in pairs]
        if not _same(model, example_inputs, expected):
            for undo in reversed(folded):
                _set(model, undo)
            folded = []
            for pair in pairs:
                undo = _fold(model, *pair)
                if _same(model, example_inputs, expected):
                    folded.append(undo)
                else:
                    _set(model, undo)
    return [norm for undo in folded for norm, module in undo.items() if not isinstance(module, _LAYERS)]


def _find_pairs(model: nn.Module, example_inputs: Any) -> list[tuple[str, str]]:
    """(layer, norm) where the norm's input is the layer's output, each called once."""
    made: dict[int, str] = {}
    keep_alive, calls, pairs, hooks = [], {}, [], []

    def after(name):
        def hook(module, args, output):
            calls[name] = calls.get(name, 0) + 1
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
    module.eval(), before[norm].eval()
    fused = fuse(module, before[norm])
    module.train(modes[0]), before[norm].train(modes[1])
    _set(model, {layer: fused, norm: nn.Identity()})
    return before


def _set(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        model.set_submodule(name, module)


def _same(model: nn.Module, example_inputs: Any, expected: list[torch.Tensor]) -> bool:
    outputs = float_outputs(call_model(model, example_inputs))
    pairs = zip(outputs, expected, strict=True)
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max())) for a, b in pairs
    )
