"""Keeps the scale of norms that lost channels: a mean of squares over fewer channels is another mean.

A norm divides each row x by the root of the mean of its squares (of its squared distances from its mean, for a layer
norm). Over the channels that stay that mean is, on average over data, r times as large; multiplying the norm's weight
by sqrt(r) undoes it. Channels that are 0 leave n / n' of the mean, so that cutting them from an RMS norm changes
nothing. Which modules are such norms, and how they use their weight, is measured on their inputs, not read from names.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_sluice.compress.calling import call_model, evaluating, seeded
from torch_sluice.compress.graph import ChannelGroup
from torch_sluice.compress.slicing import Lost

_ROWS = 64  # on which a norm is tried
_CLOSE = 1e-3


@dataclass
class NormScale:
    """What one norm's channels have of the mean of squares of a row, on average: 1 each if all are alike."""

    path: str
    shift: float  # the weight acts as (weight + shift)
    share: Tensor  # float64 [channels]

    def factor(self, lost: set[int]) -> float:
        kept = [i for i in range(len(self.share)) if i not in lost]
        return float(self.share[kept].mean().sqrt()) if kept else 1.0


def norms_of(model: nn.Module, groups: Iterable[ChannelGroup]) -> list[str]:
    """Modules that own nothing but one vector of a group's channels, or that and a bias."""
    paths = {member.path for group in groups for member in group.members if member.name.endswith("weight")}
    batch_norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.PReLU)
    found = []
    for path in sorted(paths):
        module = model.get_submodule(path)
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 1 and not isinstance(module, batch_norms):
            found.append(path)
    return found


class NormRecorder:
    """Measures the scales of those of these modules that are norms over their last dimension, for as long as it is
    entered."""

    def __init__(self, model: nn.Module, paths: Iterable[str]):
        self._model, self._paths = model, list(paths)
        self._forms: dict[str, tuple[bool, float] | None] = {}
        self._total: dict[str, Tensor] = {}
        self._count: dict[str, int] = {}
        self._hooks: list = []

    def __enter__(self) -> "NormRecorder":
        for path in self._paths:
            self._hooks.append(self._model.get_submodule(path).register_forward_pre_hook(self._record(path)))
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def finish(self) -> dict[str, NormScale]:
        return {
            path: NormScale(path, form[1], self._total[path] / self._count[path])
            for path, form in self._forms.items()
            if form is not None and self._count.get(path)
        }

    def _record(self, path: str):
        def hook(module, args):
            if len(args) != 1 or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
                self._forms[path] = None
                return
            x = args[0].detach()
            if path not in self._forms:
                self._forms[path] = _form(module, x)
            form = self._forms[path]
            if form is None or x.shape[-1] != len(module.weight):
                return
            rows = x.reshape(-1, x.shape[-1]).double()
            if form[0]:
                rows = rows - rows.mean(1, keepdim=True)
            squares = rows.square()
            mean = squares.mean(1, keepdim=True)
            squares = squares[(mean > 0).flatten()] / mean[mean > 0][:, None]
            self._total[path] = self._total.get(path, 0) + squares.sum(0)
            self._count[path] = self._count.get(path, 0) + len(squares)

        return hook


def measure_norms(model: nn.Module, batches: Iterable[Any], paths: Iterable[str]) -> dict[str, NormScale]:
    """Runs the model over the inputs of the batches and measures the scales of these norms."""
    with NormRecorder(model, paths) as recorder, evaluating(model), torch.no_grad():
        for inputs in batches:
            with seeded():
                call_model(model, inputs)
    return recorder.finish()


def _form(module: nn.Module, x: Tensor) -> tuple[bool, float] | None:
    """(whether rows are centred, what is added to the weight) where the module is a norm of rows; else None."""
    weight, forward = module._parameters["weight"], type(module).forward
    rows = x.reshape(-1, x.shape[-1])[:_ROWS].float() if x.dim() else x
    if rows.dim() != 2 or rows.shape[-1] != len(weight) or not len(rows):
        return None
    dtype = x.dtype

    def run(values: Tensor, with_weight: Tensor | None = None) -> Tensor:
        if with_weight is not None:
            module._parameters["weight"] = nn.Parameter(with_weight, requires_grad=False)
        try:
            return forward(module, values.to(dtype)).float()
        finally:
            module._parameters["weight"] = weight

    try:
        plain = run(rows)
        scale = float(plain.abs().max())
        # rows twice as large give the same; moved by a constant they do if they are centred
        if plain.shape != rows.shape or float((run(rows * 4) - plain).abs().max()) > 0.02 * scale:
            return None
        centred = float((run(rows + rows.abs().mean()) - plain).abs().max()) < 0.02 * scale
        for shift in (0.0, 1.0):
            constant = run(rows, torch.full_like(weight, -shift))
            if float((constant - constant[:1]).abs().max()) <= _CLOSE * scale:
                return centred, shift
    except Exception:
        return None
    return None


def lost_channels(lost: Lost, path: str) -> set[int]:
    return lost.get((f"{path}.weight" if path else "weight", 0), set())


def scale_norms(model: nn.Module, lost: Lost, scales: dict[str, NormScale]) -> list[tuple[str, Tensor]]:
    """(path, what is added to the weight that is left) of the norms that lose channels. ``model`` is not cut yet."""
    changes = []
    for path, scale in scales.items():
        gone = lost_channels(lost, path)
        if gone:
            weight = model.get_submodule(path).weight.detach()
            kept = torch.tensor([i for i in range(len(weight)) if i not in gone], dtype=torch.int64)
            changes.append((path, (weight[kept].double() + scale.shift) * (scale.factor(gone) - 1)))
    return changes
