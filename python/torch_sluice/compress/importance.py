"""How much each unit of a channel group is worth, from the L1 norms of its weights."""

import torch
from torch import Tensor, nn

from torch_sluice.compress.graph import ChannelGroup
from torch_sluice.compress.norms import channel_norms
from torch_sluice.compress.slicing import Member


def raw_norms(model: nn.Module, group: ChannelGroup) -> Tensor:
    """[width] The seed's score: the L1 norm of the weights that make the unit, summed over the layers that make it."""
    total = torch.zeros(group.width, dtype=torch.float64)
    tensors = _tensors(model)
    for member in group.members:
        norms = _norms(tensors, member)
        if norms is not None and member.role == "out":
            total += _per_unit(norms, member)
    return total


def relative_norms(model: nn.Module, group: ChannelGroup) -> Tensor:
    """[width] The mean, over the layers that make a unit and those that read it, of its L1 norm relative to the layer's
    mean norm: comparable across layers, and a unit that nobody reads is worth as little as one that nobody makes.

    A batch norm of the same channels scales the norm of what it normalises, as folding it would.
    """
    total, count = torch.zeros(group.width, dtype=torch.float64), 0
    tensors = _tensors(model)
    scale = _normalisation_scale(model, group)
    for member in group.members:
        norms = _norms(tensors, member)
        if norms is None:
            continue
        of_unit = _per_unit(norms, member)
        if member.role == "out" and scale is not None:
            of_unit = of_unit * scale
        mean = of_unit.mean()
        total += of_unit / mean if mean > 0 else of_unit
        count += 1
    return total / max(1, count)


def _normalisation_scale(model: nn.Module, group: ChannelGroup) -> Tensor | None:
    """|gamma| / sigma of the only batch norm of a group, per unit."""
    norms = {}
    for member in group.members:
        module = model.get_submodule(member.path)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and member.name.endswith("weight"):
            norms[member.path] = (module, member)
    if len(norms) != 1:
        return None
    ((norm, member),) = norms.values()
    if norm.running_var is None or any(len(places) != group.channels for places in member.indices):
        return None
    scale = norm.weight.detach().double().abs() / (norm.running_var.double() + norm.eps).sqrt()
    return _per_unit(scale.cpu(), member) / group.channels


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict((*model.named_parameters(), *model.named_buffers()))


def _norms(tensors: dict[str, Tensor], member: Member) -> Tensor | None:
    """L1 norms along that dimension of a weight; None for what is no weight between channels."""
    weight = tensors[member.name]
    if weight.dim() < 2 or not weight.is_floating_point() or weight.numel() == max(weight.shape):
        return None
    if weight.dim() > 2 and member.dim == 0 and weight.shape[1] == 1:
        return None  # depth-wise
    return channel_norms(weight, member.dim)


def _per_unit(norms: Tensor, member: Member) -> Tensor:
    norms = norms.double().cpu()
    return torch.stack([norms[list(places)].sum() for places in member.indices])
