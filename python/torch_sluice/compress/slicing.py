"""Takes channels out of a model's parameters, in place and with a way back.

A plan names channels by their place in the *original* model, and may take from the same side of a parameter for several
reasons (a layer behind a concatenation reads two groups): so all of them are gathered first, then each is cut once.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torch_sluice.compress.module_sizes import sizes_of

if TYPE_CHECKING:
    from torch_sluice.compress.graph import ChannelGroup

VALUES = -1  # in place of a dimension of a buffer of integers: places of channels that it holds, not its own indices

Side = tuple[str, int]  # name of a parameter or buffer, dimension
Lost = dict[Side, set[int]]  # indices that go
Order = dict[Side, list[int]]  # indices that stay, as they lie after a cut; sides that are not named keep their order


@dataclass(frozen=True)
class Member:
    """One dimension of a parameter that loses indices with a group. ``indices[u]``: what goes with unit u of it."""

    name: str  # of model.named_parameters() or named_buffers()
    dim: int
    role: str  # "out": what a layer makes, "in": what it reads
    indices: tuple[tuple[int, ...], ...]

    @property
    def path(self) -> str:
        """Of the module that has the parameter."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class SizeMember:
    """An attribute of a module, an integer or a tuple of them, that counts what a group's units are made of."""

    path: str
    attribute: str
    place: int | None  # in a tuple
    each: int  # by how much it falls with each unit


Sizes = Iterable[tuple[SizeMember, int]]  # with the number of units that go


def gather(members: Iterable[Member], units: Iterable[int], into: Lost) -> None:
    """Adds what goes with these units to the indices that each dimension loses."""
    units = list(units)
    for member in members:
        lost = into.setdefault((member.name, member.dim), set())
        for unit in units:
            lost.update(member.indices[unit])


@torch.no_grad()
def cut(model: nn.Module, lost: Lost, sizes: Sizes = ()) -> Callable[[], None]:
    """Cuts a model in place: every parameter under all of its names, the sizes that torch's layers keep of theirs, and
    ``sizes``, for each attribute with the number of units that go. Returns a function that undoes it."""
    undo: list[Callable[[], None]] = []
    try:
        _cut(model, lost, sizes, undo)
    except BaseException:
        _undo_all(undo)
        raise
    return lambda: _undo_all(undo)


def _undo_all(undo: list[Callable[[], None]]) -> None:
    for step in reversed(undo):
        step()
    undo.clear()


def _cut(model: nn.Module, lost: Lost, sizes, undo) -> None:
    names = all_names(model)
    dims: dict[str, dict[int, set[int]]] = {}
    for (name, dim), indices in lost.items():
        if indices:
            dims.setdefault(name, {})[dim] = indices
    owners: dict[str, nn.Module] = {}
    for name, of_dim in dims.items():
        tensor = _get(model, name)
        _put(model, names[id(tensor)], tensor, _without(tensor, of_dim), undo)
        for alias in names[id(tensor)]:
            owners.setdefault(layer_of(alias), model.get_submodule(layer_of(alias)))
    for owner in owners.values():
        kind = type(owner)
        for attribute, value in sizes_of(owner).items():
            if attribute == "__class__":
                undo.append(lambda owner=owner, kind=kind: setattr(owner, "__class__", kind))
                owner.__class__ = value
            else:
                _set(owner, attribute, value, undo)
    for member, units in sizes:
        module = model.get_submodule(member.path)
        value = getattr(module, member.attribute)
        if member.place is None:
            value -= member.each * units
        else:
            parts = list(value)
            parts[member.place] -= member.each * units
            value = type(value)(parts)
        _set(module, member.attribute, value, undo)


def _put(model: nn.Module, names: list[str], before: Tensor, after: Tensor, undo) -> None:
    """Puts a tensor in another's place, under all of its names."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        holder = model.get_submodule(path)
        undo.append(lambda holder=holder, leaf=leaf: setattr(holder, leaf, before))
        setattr(holder, leaf, after)


@torch.no_grad()
def reorder(model: nn.Module, before: Order, order: Order) -> Callable[[], None]:
    """Puts what a cut left into another order, in place. ``before``: the indices of the same sides as they lie now; of
    sides that are not named they ascend. Returns a function that undoes it."""
    undo: list[Callable[[], None]] = []
    names = all_names(model)
    for (name, dim), wanted in order.items():
        tensor = _get(model, name)
        own = names.pop(id(tensor))
        place = {index: place for place, index in enumerate(before.get((name, dim)) or sorted(wanted))}
        places = torch.tensor([place[index] for index in wanted], dtype=torch.int64, device=tensor.device)
        moved = _like(tensor, tensor.detach().index_select(dim, places))
        _put(model, own, tensor, moved, undo)
        names[id(moved)] = own
    return lambda: _undo_all(undo)


def cut_in_order(model: nn.Module, lost: Lost, sizes: Sizes, order: Order) -> Callable[[], None]:
    """Cuts a model in place, and puts what is left into this order. Returns a function that undoes both."""
    undo = cut(model, lost, sizes)
    try:
        back = reorder(model, {}, order)
    except BaseException:
        undo()
        raise

    def undo_both():
        back()
        undo()

    return undo_both


def _set(module: nn.Module, attribute: str, value, undo) -> None:
    before = getattr(module, attribute)
    if before != value:
        undo.append(lambda: setattr(module, attribute, before))
        setattr(module, attribute, value)


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: for a parametrised one, the layer and not its list of parametrisations."""
    return name.rpartition(".")[0].partition("parametrizations.")[0].rstrip(".")


def _without(tensor: Tensor, lost: dict[int, set[int]]) -> Tensor:
    smaller = tensor.detach()
    for dim, indices in sorted(lost.items(), reverse=True):
        if dim == VALUES:
            gone = torch.tensor(sorted(indices), dtype=smaller.dtype, device=smaller.device)
            smaller = smaller - torch.searchsorted(gone, smaller, out_int32=smaller.dtype == torch.int32)
            continue
        keep = torch.tensor([i for i in range(tensor.shape[dim]) if i not in indices], dtype=torch.int64)
        smaller = smaller.index_select(dim, keep.to(tensor.device))
    return _like(tensor, smaller.contiguous())


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """A parameter where the tensor is one."""
    return nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _get(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def prune(model: nn.Module, removals: Iterable[tuple["ChannelGroup", list[int]]]) -> nn.Module:
    """A copy of the model without these units of these groups."""
    lost: Lost = {}
    sizes: list[tuple[SizeMember, int]] = []
    removals = list(removals)
    for group, units in removals:
        gather(group.members, units, lost)
        sizes += [(member, len(units)) for member in group.sizes]
    pruned = copy.deepcopy(model)
    order = order_for([group for group, _ in removals], pruned, lost, sizes)
    cut_in_order(pruned, lost, sizes, order)
    return pruned


def order_for(groups: Iterable["ChannelGroup"], model: nn.Module, lost: Lost, sizes: Sizes) -> Order:
    """In which order parameters have to lie once this is cut, where it is another than their present one."""
    arranger = next((group.arranger for group in groups if group.arranged), None)
    return {} if arranger is None else arranger.order(model, lost, sizes)


def all_names(model: nn.Module) -> dict[int, list[str]]:
    """Names of each parameter and buffer, by the identity of the tensor: several where it is shared."""
    names: dict[int, list[str]] = {}
    everything = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in everything:
        names.setdefault(id(tensor), []).append(name)
    return names
