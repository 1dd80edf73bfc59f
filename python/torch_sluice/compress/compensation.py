"""Makes the layers that read pruned channels go without them: what a removed channel would have brought is estimated
from those that stay, by least squares over the user's data, and folded into the weights. No training is needed.

For a layer y = W x + c with inputs of which the set r is removed and k is kept, with the mean m and the covariance C of
x over the data, x_r is close to m_r + A (x_k - m_k), A = C_rk (C_kk + lambda I)^-1, so that W_k becomes W_k + W_r A and
c becomes c + W_r (m_r - A m_k). A layer without c uses second moments instead of the covariance, and no mean.
A convolution does so at every tap; the channels at one position stand for x.

lambda is the mean variance times |k| / n, the unknowns for each independent row that C was taken from, times
s / (1 - s), where s is the share of x_r that cannot be told: what is best if all unknowns are alike. s is what a first
fit leaves, corrected by its degrees of freedom, or 1/2 with fewer than 1.5 rows for each unknown; with fewer than 1/4,
A is 0.
Positions of a sample are not independent rows: how many they are worth is measured, by how much C differs between two
halves of the data.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from torch_sluice.compress.graph import ChannelGroup
from torch_sluice.compress.module_sizes import is_depthwise
from torch_sluice.compress.moments import ROWS_FOR_UNKNOWN, Moments, Part
from torch_sluice.compress.slicing import Lost, all_names

_MOST_CHANNELS = 4096  # whose moments, a square matrix, are kept
_RIDGE = 1e-3  # lambda is at least this, relative to the mean variance
_LOOKED_AT = 64  # removed channels of which a first fit tells how much of all can be told
_MOST_RIDGES = 12  # each ten times the one before
_FEWEST = 8  # independent rows for a mean


def reading_layers(model: nn.Module, groups: Iterable[ChannelGroup]) -> list[str]:
    """The layers that read a group's channels and can be compensated: not those whose weight others use, too."""
    shared = _shared_weights(model)
    paths = {reading_layer((member.name, member.dim)) for group in groups for member in group.members} - {None}
    return sorted(path for path in paths - shared if _is_compensable(model.get_submodule(path)))


def reading_layer(side: tuple[str, int]) -> str | None:
    """The layer whose inputs a dimension of a parameter counts, if it is a linear layer or a convolution."""
    path, _, leaf = side[0].rpartition(".")
    return path if leaf == "weight" and side[1] == 1 else None


def _shared_weights(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[0] for names in all_names(model).values() if len(names) > 1 for name in names}


def _is_compensable(module: nn.Module) -> bool:
    if "weight" not in module._parameters:  # it is computed from others
        return False
    if isinstance(module, nn.Linear):
        return module.in_features <= _MOST_CHANNELS
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == 1 and module.in_channels <= _MOST_CHANNELS and not is_depthwise(module)
    return False


@dataclass
class Update:
    """What is added to the weight and the bias of a layer that has lost channels."""

    path: str
    find: Callable[[], tuple[Tensor | None, Tensor | None]]  # computes it: all layers' would be as large as the model

    @torch.no_grad()
    def add_to(self, pruned: nn.Module) -> Callable[[], None]:
        """Adds it to the weight, of which cutting has made a copy, and puts another bias in place of the layer's.
        Returns what puts the old bias back."""
        module = pruned.get_submodule(self.path)
        change, shift = self.find()
        if change is not None:
            module.weight.data.add_(change.to(module.weight))
        if shift is None:
            return lambda: None
        bias = module.bias
        module.bias = nn.Parameter(bias + shift.to(bias), requires_grad=bias.requires_grad)
        return lambda: setattr(module, "bias", bias)


@torch.no_grad()
def find_updates(
    original: nn.Module,
    lost: Lost,
    moments: Moments,
    left_out: Moments | None = None,
) -> list[Update]:
    """What makes up for inputs that layers lose. ``lost`` counts in channels of ``original``, which stays as it is, or
    is cut after this. ``left_out``: the part of the moments that must not be used."""
    updates = []
    for (name, dim), indices in lost.items():
        path = reading_layer((name, dim))
        if path is None or not indices or path not in moments.count:
            continue
        source = original.get_submodule(path)
        weight, centred = source.weight.detach(), source.bias is not None
        of_outputs = lost.get((name, 0), set())
        updates.append(Update(path, partial(_find, path, weight, centred, indices, of_outputs, moments, left_out)))
    return updates


@torch.no_grad()
def _find(path, weight: Tensor, centred: bool, lost: set[int], of_outputs: set[int], moments: Moments, left_out):
    """What is added to a layer's weight, and to its bias, each None for nothing."""
    part = Part([moments], path, left_out)
    rows = moments.rows.get(path, moments.count[path]) * part.count / moments.count[path]
    if rows < _FEWEST:
        return None, None
    channels = weight.shape[1]
    kept = torch.tensor([i for i in range(channels) if i not in lost])
    gone = torch.tensor(sorted(lost))
    outputs = torch.tensor([i for i in range(len(weight)) if i not in of_outputs])
    removed = weight.cpu()[outputs][:, gone].double()
    change = shift = None
    # All channels count, so that a group is treated alike at all its sizes.
    if path not in moments.refused and rows >= ROWS_FOR_UNKNOWN * channels:
        change = _make_up(part, rows, kept, gone, removed, centred)
    if centred:
        shift = _over_taps(removed) @ part.mean[gone]
        if change is not None:
            shift -= _over_taps(change) @ part.mean[kept]
    return change, shift


def _over_taps(weight: Tensor) -> Tensor:
    return weight.flatten(2).sum(2) if weight.dim() > 2 else weight


def _make_up(part: Part, rows: float, kept: Tensor, gone: Tensor, weight: Tensor, centred: bool) -> Tensor:
    """W_r A, float64 [outputs, kept, taps ..]. ``weight``: W_r."""
    moment = part.covariance(centred)
    inner, outer, unknowns = moment[kept][:, kept], moment[kept][:, gone], len(kept)
    scale = inner.diagonal().mean().clamp_min(1e-30)
    untold = 0.5
    if rows > 1.5 * unknowns:  # else the fit leaves next to nothing, whatever is true
        some = slice(None, None, max(1, len(gone) // _LOOKED_AT))
        variance = moment.diagonal()[gone[some]].sum().clamp_min(1e-30)
        told = (_solve(inner, outer[:, some], _RIDGE * scale) * outer[:, some]).sum() / variance
        untold = min(max(float(1 - told) * rows / (rows - unknowns), 0.0), 0.9)
    ridge = max(_RIDGE, unknowns / rows * untold / (1 - untold)) * scale
    # [outputs and taps, gone]: of A and of W_r A, that is solved for which has fewer columns.
    wanted = weight.movedim(1, -1)
    flat = wanted.reshape(-1, len(gone))
    if len(flat) < len(gone):
        change = _solve(inner, outer @ flat.T, ridge).T
    else:
        change = flat @ _solve(inner, outer, ridge).T
    return change.reshape(*wanted.shape[:-1], len(kept)).movedim(-1, 1)


def _solve(inner: Tensor, outer: Tensor, ridge: Tensor) -> Tensor:
    """(inner + ridge I)^-1 outer, for a symmetric inner that is positive but for rounding: sums of squares of channels
    far from 0 cancel in a covariance. Where that shows, the ridge grows beyond it."""
    inner = inner.clone()
    inner.diagonal().add_(ridge)
    for _ in range(_MOST_RIDGES):
        factor, failed = torch.linalg.cholesky_ex(inner)
        if not failed:
            return torch.cholesky_solve(outer, factor)
        inner.diagonal().add_(9 * ridge)
        ridge = 10 * ridge
    return torch.zeros_like(outer)


def compensate(pruned: nn.Module, original: nn.Module, lost: dict[tuple[str, str], set[int]], moments: Moments) -> None:
    """Changes the weights of layers of ``pruned`` that lost inputs. ``lost`` counts in channels of ``original``."""
    for update in find_updates(original, lost, moments):
        update.add_to(pruned)
