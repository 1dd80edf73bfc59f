"""Takes channels out of a model's modules: by type, and by side where a module has two.

A plan names channels by their place in the *original* model, and may take from the same side of a module for several
reasons (a layer behind a concatenation reads two groups): so all of them are gathered first, then each module is cut
once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_sluice.attention import Gate


@dataclass(frozen=True)
class Member:
    """One side of a module that loses channels with a group. ``indices[u]``: what goes with the group's unit u."""

    path: str
    side: str  # "out", "in", "both"; "queries", "keys" of a gate; "dim N" of a parameter; "count NAME": an attribute
    indices: tuple[tuple[int, ...], ...]


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels > 1


def side_of(module: nn.Module, side: str) -> str | None:
    """The side under which channels of a module are gathered, or None if it is a type that cannot be cut."""
    if isinstance(module, nn.modules.conv._ConvNd):
        if is_depthwise(module):
            return "both" if module.in_channels == module.out_channels and not module.transposed else None
        return side if module.groups == 1 or not module.transposed else None
    if isinstance(module, (nn.Linear, nn.Bilinear)):
        return side if isinstance(module, nn.Linear) else None
    if isinstance(module, nn.Embedding):
        return "out"
    if isinstance(module, nn.LayerNorm):
        return "both" if len(module.normalized_shape) == 1 else None
    normalisations = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)
    if isinstance(module, (*normalisations, nn.PReLU, nn.MultiheadAttention)):
        return "both"
    return None


def _cut(module: nn.Module, name: str, keep: Tensor, dim: int) -> None:
    tensor = getattr(module, name, None)
    if tensor is None:
        return
    cut = tensor.detach().index_select(dim, keep.to(tensor.device)).contiguous()
    if isinstance(tensor, nn.Parameter):
        setattr(module, name, nn.Parameter(cut, requires_grad=tensor.requires_grad))
    else:
        setattr(module, name, cut)


def _cut_conv(conv, keep: Tensor, side: str) -> None:
    if side == "both":
        _cut(conv, "weight", keep, 0)
        conv.in_channels = conv.out_channels = conv.groups = len(keep)
    elif side == "out":
        _cut(conv, "weight", keep, 1 if conv.transposed else 0)
        conv.out_channels = len(keep)
    else:
        each = conv.in_channels // conv.groups  # groups lose the same places, so the first tells what is kept in all
        _cut(conv, "weight", keep[keep < each], 0 if conv.transposed else 1)
        conv.in_channels = len(keep)
    if side != "in":
        _cut(conv, "bias", keep, 0)


def _cut_linear(linear: nn.Linear, keep: Tensor, side: str) -> None:
    _cut(linear, "weight", keep, 0 if side == "out" else 1)
    if side == "out":
        _cut(linear, "bias", keep, 0)
        linear.out_features = len(keep)
    else:
        linear.in_features = len(keep)


def _cut_normalisation(norm: nn.Module, keep: Tensor, side: str) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        _cut(norm, name, keep, 0)
    if isinstance(norm, nn.LayerNorm):
        norm.normalized_shape = (len(keep),)
    elif isinstance(norm, nn.GroupNorm):
        norm.num_channels = len(keep)
    else:
        norm.num_features = len(keep)


def _cut_multihead(attention: nn.MultiheadAttention, keep: Tensor, side: str) -> None:
    """The width of an nn.MultiheadAttention is also that of its heads together: each head loses as many rows of its
    projections, those of the smallest L1 norm, as keeps the two equal."""
    from torch_sluice.compress.norms import channel_norms

    width, heads = attention.embed_dim, attention.num_heads
    stacked = attention.in_proj_weight.detach().view(3, width, width)
    norms = sum(channel_norms(stacked[i]) for i in range(3)) + channel_norms(attention.out_proj.weight, 1)
    kept = norms.view(heads, -1).argsort(dim=1, descending=True, stable=True)[:, : len(keep) // heads].sort(1).values
    rows = (kept + torch.arange(heads)[:, None] * (width // heads)).flatten()
    all_rows = torch.cat([rows + i * width for i in range(3)])
    _cut(attention, "in_proj_weight", all_rows, 0)
    _cut(attention, "in_proj_weight", keep, 1)
    _cut(attention, "in_proj_bias", all_rows, 0)
    _cut_linear(attention.out_proj, rows, "in")
    _cut_linear(attention.out_proj, keep, "out")
    attention.embed_dim = attention.kdim = attention.vdim = len(keep)
    attention.head_dim = len(keep) // heads
    gate = getattr(attention, "sluice_gate", None)
    if gate is not None:
        _cut_gate(gate, keep, "in")


def _cut_gate(gate: Gate, keep: Tensor, side: str) -> None:
    if side == "in":
        for name in ("query_weight", "key_weight"):
            _cut(gate, name, keep, 1)
        gate.dim = len(keep)
    else:
        name = "query" if side == "queries" else "key"
        _cut(gate, f"{name}_weight", keep, 0)
        _cut(gate, f"{name}_bias", keep, 0)


def cut_module(module: nn.Module, keep: Tensor, side: str) -> None:
    """Keeps only these channels, in ascending order, on one side of a module."""
    if isinstance(module, nn.modules.conv._ConvNd):
        _cut_conv(module, keep, side)
    elif isinstance(module, nn.Linear):
        _cut_linear(module, keep, side)
    elif isinstance(module, nn.Embedding):
        _cut(module, "weight", keep, 1)
        module.embedding_dim = len(keep)
    elif isinstance(module, nn.PReLU):
        if module.num_parameters > 1:
            _cut(module, "weight", keep, 0)
            module.num_parameters = len(keep)
    elif isinstance(module, nn.MultiheadAttention):
        _cut_multihead(module, keep, side)
    elif isinstance(module, Gate):
        _cut_gate(module, keep, side)
    else:
        _cut_normalisation(module, keep, side)


def size_of(module: nn.Module, side: str) -> int:
    """Channels on that side of a module."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels if side == "in" else module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features if side == "in" else module.out_features
    if isinstance(module, Gate):
        return {"in": module.dim, "queries": module.heads, "keys": module.kv_heads}[side]
    names = ("embedding_dim", "num_features", "num_channels", "embed_dim", "num_parameters")
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[0]
    return next(getattr(module, name) for name in names if hasattr(module, name))


def gather(members: Iterable[Member], units: Iterable[int], into: dict[tuple[str, str], set[int]]) -> None:
    """Adds what goes with these units to the channels that each side loses."""
    units = list(units)
    for member in members:
        lost = into.setdefault((member.path, member.side), set())
        for unit in units:
            lost.update(member.indices[unit])


@torch.no_grad()
def take_out(model: nn.Module, lost: dict[tuple[str, str], set[int]]) -> None:
    """Cuts a model in place; parameters that were shared and stay equal are shared again."""
    tied = _shared_parameters(model)
    for (path, side), indices in lost.items():
        if not indices:
            continue
        if side.startswith("dim "):
            owner, _, name = path.rpartition(".")
            dim = int(side.removeprefix("dim "))
            module = model.get_submodule(owner)
            _cut(module, name, _keep(getattr(module, name).shape[dim], indices), dim)
        elif side.startswith("count "):
            module, name = model.get_submodule(path), side.removeprefix("count ")
            setattr(module, name, getattr(module, name) - len(indices))
        else:
            module = model.get_submodule(path)
            if isinstance(module, nn.PReLU) and module.num_parameters == 1:
                continue
            cut_module(module, _keep(size_of(module, side), indices), side)
    _share_again(model, tied)


def _keep(size: int, lost: set[int]) -> Tensor:
    return torch.tensor([i for i in range(size) if i not in lost], dtype=torch.int64)


def _shared_parameters(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [shared for shared in names.values() if len(shared) > 1]


def _share_again(model: nn.Module, tied: list[list[str]]) -> None:
    for first, *others in tied:
        parameter = model.get_parameter(first)
        for name in others:
            other = model.get_parameter(name)
            if other is not parameter and other.shape == parameter.shape and torch.equal(other, parameter):
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, parameter)
