"""What is lost in the layers that read a group when it is cut further and further, told by moments without running the
model: how the cost of a cut grows with its size.

With inputs x of covariance C, of which a layer y = W x loses a part that is made up for by least squares
(compensation.py), what y loses is tr(W_r S W_r'), S = C_rr - C_rk C_kk^-1 C_kr. With the channels in the order in which
they go, the last first, and C = L L', S is the product of the last rows and columns of L with themselves. So one
factor tells it for all sizes: sums of the last columns of (W L)^2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torch_sluice.compress.compensation import reading_layer
from torch_sluice.compress.graph import ChannelGroup
from torch_sluice.compress.moments import ROWS_FOR_UNKNOWN, Moments, Part
from torch_sluice.compress.slicing import Lost

_RIDGE = 1e-3  # relative to the mean variance, as where channels are made up for


@torch.no_grad()
def find_residuals(
    model: nn.Module, group: ChannelGroup, lost: Sequence[Lost], moments: Moments, left_out: Moments | None = None
) -> list[float] | None:
    """For each cut, of which each takes what the one before does and more, the share of what the group's readers give
    that is lost, summed over these. None where moments do not tell it of every one of them."""
    sides = {(member.name, member.dim) for member in group.members if member.role == "in"}
    total = [0.0] * len(lost)
    for side in sides:
        path = reading_layer(side)
        if path is None or path not in moments.count or path in moments.refused:
            return None
        part, module = Part([moments], path, left_out), model.get_submodule(path)
        rows = moments.rows.get(path, moments.count[path]) * part.count / moments.count[path]
        if rows < ROWS_FOR_UNKNOWN * module.weight.shape[1]:
            return None
        gone = [cut.get(side, set()) for cut in lost]
        columns = _lost_by_column(module.weight, part.covariance(module.bias is not None), _order(gone, module))
        if columns is None:
            return None
        whole = float(columns.sum())
        for place, channels in enumerate(gone):
            if whole > 0 and channels:
                total[place] += float(columns[-len(channels) :].sum()) / whole
    return total if sides else None


def _order(gone: list[set[int]], module: nn.Module) -> Tensor:
    """Channels, those that stay longest first."""
    left = dict.fromkeys(range(module.weight.shape[1]), len(gone))
    for number, channels in reversed(list(enumerate(gone))):
        left.update(dict.fromkeys(channels, number))
    return torch.tensor(sorted(left, key=lambda channel: -left[channel]))


def _lost_by_column(weight: Tensor, covariance: Tensor, order: Tensor) -> Tensor | None:
    """float64 [channels] Squares of W L, channels in this order, summed over outputs and taps."""
    inner = covariance[order][:, order]
    inner.diagonal().add_(_RIDGE * inner.diagonal().mean().clamp_min(1e-30))
    factor, failed = torch.linalg.cholesky_ex(inner)
    if failed:
        return None
    flat = weight.detach().cpu().movedim(1, -1).reshape(-1, weight.shape[1]).float()[:, order]
    return (flat @ factor.float()).square().sum(0, dtype=torch.float64)
