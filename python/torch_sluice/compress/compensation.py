"""Makes the layers that read pruned channels go without them: what a removed channel would have brought is estimated
from those that stay, by least squares over the user's data, and folded into the weights. No training is needed.

For a layer y = W x + c with inputs of which the set r is removed and k is kept, with the mean m and the covariance C of
x over the data, x_r is close to m_r + A (x_k - m_k), A = C_rk (C_kk + lambda I)^-1, so that W_k becomes W_k + W_r A and
c becomes c + W_r (m_r - A m_k). A layer without c uses second moments instead of the covariance, and no mean.
A convolution does so at every tap; the channels at one position stand for x.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torch_sluice.compress.calling import call_model, evaluating
from torch_sluice.compress.graph import ChannelGroup
from torch_sluice.compress.slicing import Lost, is_depthwise

_MOST_CHANNELS = 4096  # whose moments, a square matrix, are kept
_MOST_ROWS = 16384  # samples of x taken from one batch
_RIDGE = 1e-3  # lambda, relative to the mean variance


class Moments:
    """Count, sums and second moments of the input channels of some layers of a model."""

    def __init__(self) -> None:
        self.count: dict[str, int] = {}
        self.total: dict[str, Tensor] = {}
        self.product: dict[str, Tensor] = {}

    def add(self, path: str, rows: Tensor) -> None:
        """rows [samples, channels]"""
        rows = rows[:: max(1, -(-len(rows) // _MOST_ROWS))].float()
        if not rows.isfinite().all():
            return
        self.count[path] = self.count.get(path, 0) + len(rows)
        self.total[path] = self.total.get(path, 0) + rows.sum(0, dtype=torch.float64)
        self.product[path] = self.product.get(path, 0) + (rows.T @ rows).double()


def reading_layers(model: nn.Module, groups: Iterable[ChannelGroup]) -> list[str]:
    """The layers that read a group's channels and can be compensated."""
    paths = {member.path for group in groups for member in group.members if _is_input(member.name, member.dim)}
    return sorted(path for path in paths if _is_compensable(model.get_submodule(path)))


def _is_input(name: str, dim: int) -> bool:
    return dim == 1 and name.rpartition(".")[2] == "weight"


def _is_compensable(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return module.in_features <= _MOST_CHANNELS
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == 1 and module.in_channels <= _MOST_CHANNELS and not is_depthwise(module)
    return False


def measure_moments(
    model: nn.Module, batches: list[Any], paths: list[str], report: Callable[[str], None] = lambda text: None
) -> Moments:
    """Runs the model over the inputs of the batches and takes the moments of what these layers read."""
    moments, hooks = Moments(), []

    def record(path: str):
        def hook(module, args):
            x = args[0].detach()
            rows = x.flatten(0, -2) if isinstance(module, nn.Linear) else x.movedim(1, -1).flatten(0, -2)
            moments.add(path, rows)

        return hook

    try:
        for path in paths:
            hooks.append(model.get_submodule(path).register_forward_pre_hook(record(path)))
        with evaluating(model), torch.no_grad():
            for inputs in batches:
                report("activations")
                call_model(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return moments


@torch.no_grad()
def compensate(pruned: nn.Module, original: nn.Module, lost: Lost, moments: Moments) -> None:
    """Changes the weights of layers of ``pruned`` that lost inputs. ``lost`` counts in channels of ``original``."""
    for (name, dim), indices in lost.items():
        path = name.rpartition(".")[0]
        if not _is_input(name, dim) or not indices or moments.count.get(path, 0) < 2:
            continue
        module, source = pruned.get_submodule(path), original.get_submodule(path)
        if not _is_compensable(source):
            continue
        channels = source.weight.shape[1]
        kept = torch.tensor([i for i in range(channels) if i not in indices])
        gone = torch.tensor(sorted(indices))
        mean = moments.total[path] / moments.count[path]
        moment = moments.product[path] / moments.count[path]
        if module.bias is not None:
            moment = moment - mean[:, None] * mean
        inner = moment[kept][:, kept]
        ridge = _RIDGE * inner.diagonal().mean().clamp_min(1e-30)
        inner.diagonal().add_(ridge)
        estimate = torch.linalg.solve(inner, moment[kept][:, gone]).T  # A
        # Rows of the output side that are gone from `module` are gone from the source's, too.
        rows = _kept_rows(source, lost.get((name, 0), set()))
        weight = source.weight.detach().cpu().double()[rows]
        change = torch.einsum("or...,rk->ok...", weight[:, gone], estimate)
        module.weight.add_(change.to(module.weight))
        if module.bias is not None:
            taps = weight[:, gone].flatten(2).sum(2) if weight.dim() > 2 else weight[:, gone]
            module.bias.add_((taps @ (mean[gone] - estimate @ mean[kept])).to(module.bias))


def _kept_rows(source: nn.Module, lost: set[int]) -> Tensor:
    return torch.tensor([i for i in range(source.weight.shape[0]) if i not in lost])
