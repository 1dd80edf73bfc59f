"""How much each unit of a channel group is worth, from the L1 norms of its weights."""

import torch
from torch import Tensor, nn

from torch_sluice.attention import Gate
from torch_sluice.compress.graph import ChannelGroup
from torch_sluice.compress.norms import channel_norms
from torch_sluice.compress.slicing import Member, is_depthwise


def raw_norms(model: nn.Module, group: ChannelGroup) -> Tensor:
    """[width] The seed's score: the L1 norm of the weights that make the unit, summed over the layers that make it."""
    total = torch.zeros(group.width, dtype=torch.float64)
    for member in group.members:
        norms = _norms(model, member)
        if norms is not None and member.side != "in":
            total += _per_unit(norms, member)
    return total


def relative_norms(model: nn.Module, group: ChannelGroup) -> Tensor:
    """[width] The mean, over the layers that make a unit and those that read it, of its L1 norm relative to the layer's
    mean norm: comparable across layers, and a unit that nobody reads is worth as little as one that nobody makes.

    A batch norm of the same channels scales the norm of what it normalises, as folding it would.
    """
    total, count = torch.zeros(group.width, dtype=torch.float64), 0
    scale = _normalisation_scale(model, group)
    for member in group.members:
        norms = _norms(model, member)
        if norms is None:
            continue
        of_unit = _per_unit(norms, member)
        if member.side == "out" and scale is not None:
            of_unit = of_unit * scale
        mean = of_unit.mean()
        total += of_unit / mean if mean > 0 else of_unit
        count += 1
    return total / max(1, count)


def _normalisation_scale(model: nn.Module, group: ChannelGroup) -> Tensor | None:
    """|gamma| / sigma of the only batch norm of a group, per unit."""
    norms = [m for m in group.members if isinstance(_module(model, m), nn.modules.batchnorm._BatchNorm)]
    if len(norms) != 1 or any(len(places) != group.channels for places in norms[0].indices):
        return None
    norm = _module(model, norms[0])
    if norm.weight is None or norm.running_var is None:
        return None
    scale = norm.weight.detach().double().abs() / (norm.running_var.double() + norm.eps).sqrt()
    return _per_unit(scale.cpu(), norms[0]) / group.channels


def _module(model: nn.Module, member: Member) -> nn.Module | None:
    return None if member.side.startswith(("dim ", "count ")) else model.get_submodule(member.path)


def _norms(model: nn.Module, member: Member) -> Tensor | None:
    """L1 norms of the channels on that side of a module's weight; None for what carries no weights between channels."""
    module = _module(model, member)
    if isinstance(module, nn.modules.conv._ConvNd):
        if is_depthwise(module):
            return None
        dim = 0 if (member.side == "out") != module.transposed else 1
        norms = channel_norms(module.weight, dim)
        return norms.repeat(module.groups) if member.side == "in" and module.groups > 1 else norms
    if isinstance(module, nn.Linear):
        return channel_norms(module.weight, 0 if member.side == "out" else 1)
    if isinstance(module, nn.Embedding):
        return channel_norms(module.weight, 1)
    if isinstance(module, nn.MultiheadAttention) and not isinstance(module, Gate):
        return channel_norms(module.in_proj_weight, 1) + channel_norms(module.out_proj.weight, 0)
    return None


def _per_unit(norms: Tensor, member: Member) -> Tensor:
    norms = norms.double().cpu()
    return torch.stack([norms[list(places)].sum() for places in member.indices])
