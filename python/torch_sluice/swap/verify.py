"""Compares a model with itself after the swap, on inputs that the user gives."""

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Largest difference, relative to the largest number. Rounding in another order makes some 1e-6 in float32.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_TOLERANCE = 3e-2


def _tensors(output) -> list[Tensor]:
    return [x.detach() for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


@torch.no_grad()
def record(model: nn.Module, modules: list[nn.Module], example) -> list[tuple[nn.Module, list[Tensor]]]:
    """(module, its outputs) for every call of one of modules, and last the model's, in a forward in evaluation mode."""
    calls = []
    hooks = [m.register_forward_hook(lambda m, _, out: calls.append((m, _tensors(out)))) for m in modules]
    training = [m for m in model.modules() if m.training]
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.eval()
            out = model(**example) if isinstance(example, dict) else model(*example)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return [*calls, (model, _tensors(out))]


def _distance(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape:
        return float("inf")
    known = y.isfinite()  # where the model as it was gave NaN, nothing is to be kept
    if not known.any():
        return 0.0
    x, y = x[known].double(), y[known].double()
    return float(((x - y).abs().max() / y.abs().max().clamp(min=1e-30)).nan_to_num(torch.inf))


def _excess(call: tuple) -> tuple[float, float]:
    """(the largest difference of a call before and after, what is allowed)."""
    (_, old), (_, new) = call
    if len(old) != len(new):
        return float("inf"), 0.0
    allowed = max((_TOLERANCES.get(x.dtype, _HALF_TOLERANCE) for x in old), default=0.0)
    return max((_distance(x, y) for x, y in zip(new, old, strict=True)), default=0.0), allowed


def first_difference(before: list, after: list) -> tuple[nn.Module, float] | None:
    """If the model's outputs differ by more than rounding: the module whose call differs first, and by how much."""
    if len(before) != len(after):
        return before[-1][0], float("inf")
    calls = list(zip(before, after, strict=True))
    off, allowed = _excess(calls[-1])
    if off <= allowed:
        return None
    for call in calls:
        off, allowed = _excess(call)
        if off > allowed:
            return call[0][0], off
