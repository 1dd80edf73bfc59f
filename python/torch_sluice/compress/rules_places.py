"""Operators that move or pick channels by their places (rules.py): by a number in the code, as roll(3) and x[:, ::2] do,
or by indices in a tensor.

A buffer that holds the indices can be cut with the channels: its entries leave with what they pick, and its values are
renumbered (slicing.py). What is written in the code stays as it is, and does something else to fewer channels; whether
another order of the weights makes up for that is found out later (arrangement.py).
"""

import torch
from torch import Tensor

from torch_sluice.compress.couplings import Couplings, Move, Source
from torch_sluice.compress.labels import Axes, all_numbers, combine, varying

PLACES = frozenset(("roll", "slice", "index", "index_select", "gather"))
_BUFFER = "register the indices by register_buffer(), which are renumbered then"


def follow_places(tracer, name: str, args, kwargs, out: Tensor, moved: Axes) -> Axes:
    """Notes that an operator of PLACES picked channels. Returns the axes of its result: ``moved``, those that its input
    brings, and those of a buffer with the indices."""
    x = args[0]
    along = _dims(name, x, args, kwargs)
    axes = [axis for axis in tracer.axes(x) if varying(axis) & along]
    if not axes:
        return moved
    numbers, couplings = all_numbers(axes), tracer.couplings
    if name == "roll":
        shifts = [args[1]] if isinstance(args[1], int) else list(args[1])
        advice = f"aten::roll moves its channels by {shifts[0]}, which stays when the width does not; instead, "
        couplings.moves.append(Move(numbers, advice + "index by a buffer: " + _BUFFER, True))
    elif name == "slice":
        named = dict(zip(("self", "dim", "start", "end", "step"), args, strict=False)) | kwargs
        start, end, step = (named.get(key, other) for key, other in (("start", None), ("end", None), ("step", 1)))
        if step == 1 and out.shape == x.shape:
            return moved
        text = ":".join("" if part is None or part >= x.shape[min(along)] else str(part) for part in (start, end, step))
        advice = f"aten::slice takes {text.removesuffix(':1')} of its channels; instead, index by a buffer: {_BUFFER}"
        couplings.moves.append(Move(numbers, advice, step != 1))
    else:
        return _follow_indices(tracer, name, args, kwargs, out, moved, axes, min(along))
    return moved


def _dims(name: str, x: Tensor, args, kwargs) -> set[int]:
    """Dimensions of x along which places change."""
    if name == "roll":
        dims = args[2] if len(args) > 2 else kwargs.get("dims", ())
        return {dim % x.dim() for dim in dims} or set(range(x.dim()))
    if name == "index":
        return {dim for dim, index in enumerate(args[1]) if index is not None and index.dtype != torch.bool}
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return {dim % max(1, x.dim())}


def _follow_indices(tracer, name: str, args, kwargs, out: Tensor, moved: Axes, axes: Axes, dim: int) -> Axes:
    couplings = tracer.couplings
    if name == "index":
        tensors = [index for index in args[1] if index is not None]
        index = tensors[0] if len(tensors) == 1 else None
    else:
        index = args[2] if len(args) > 2 else kwargs["index"]
    values = None if index is None else _buffer_of(tracer, index)
    if values is None:
        advice = (
            f"aten::{name} takes its channels by indices that are no buffer of the model as they are; {_BUFFER} with a "
            "cut"
        )
        couplings.moves.append(Move(all_numbers(axes), advice, True))
        return moved
    advice = f"aten::{name} takes its channels by {values.name}, in an order that no cut of these channels keeps"
    couplings.moves.append(Move(all_numbers(axes), advice, True))
    for axis in axes:
        if varying(axis) == {dim}:
            count = min(values.size, axis.numel())
            first = torch.arange(values.first, values.first + count)
            couplings.join(axis.reshape(-1)[:count].numpy(), first.numpy())
    own = tracer.axes(index)
    if name == "index":  # its dimensions stand in place of the one that it indexes
        before, after = (1,) * dim, (1,) * (out.dim() - dim - index.dim())
        own = [axis.reshape(before + tuple(axis.shape) + after) for axis in own]
    elif name == "index_select":
        own = [axis.reshape((1,) * dim + (-1,) + (1,) * (out.dim() - dim - 1)) for axis in own]
    return combine(couplings, [moved, own])


def _buffer_of(tracer, index: Tensor) -> Source | None:
    """The values of the buffer that these indices are, in any shape; None where they are of another origin."""
    couplings: Couplings = tracer.couplings
    axes = tracer.axes(index)
    if len(axes) != 1 or len(varying(axes[0])) != 1 or bool((axes[0] == 0).any()):
        return None
    numbers = axes[0]
    source = couplings.source_of(int(numbers.min()))
    values = None if source is None else couplings.values_of(source.name)
    if values is None or int(numbers.max()) >= source.first + source.size:
        return None
    buffer = couplings.tensors[source.name]
    if buffer.numel() != source.size:
        return None
    held = buffer.reshape(-1)[(numbers - source.first).to(buffer.device)]
    return values if bool((held == index).all()) else None
