"""Operators that move or pick channels by their places (rules.py): by numbers in the code, as roll(3) and x[:, ::2]
do, or by indices in a tensor.

A buffer that holds the indices can be cut with the channels: its entries leave with what they pick, and its values are
renumbered (slicing.py). What is written in the code stays as it is, and does something else to fewer channels; whether
another order of the weights makes up for that is found out later (arrangement.py).
"""

import numpy as np
import torch
from torch import Tensor

from torch_sluice.compress.couplings import Couplings, Move
from torch_sluice.compress.labels import Axes, all_numbers, clean, combine, varying
from torch_sluice.compress.slicing import VALUES

PLACES = frozenset(("roll", "slice", "index", "index_select", "gather"))
_BUFFER = "indices in a buffer (register_buffer) would be cut and renumbered with them"


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
        advice = f"aten::roll moves its channels by {shifts[0]}, however many they are; {_BUFFER}"
        couplings.moves.append(Move(numbers, advice, True, numbers[:0]))
    elif name == "slice":
        named = dict(zip(("self", "dim", "start", "end", "step"), args, strict=False)) | kwargs
        start, end, step = (named.get(key, other) for key, other in (("start", None), ("end", None), ("step", 1)))
        if step == 1 and out.shape == x.shape:
            return moved
        text = ":".join("" if part is None or part >= x.shape[min(along)] else str(part) for part in (start, end, step))
        advice = f"aten::slice takes {text.removesuffix(':1')} of its channels, however many they are; {_BUFFER}"
        couplings.moves.append(Move(numbers, advice, False, all_numbers(clean(couplings, moved))))
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
    couplings, numbers = tracer.couplings, all_numbers(axes)
    if name == "index":
        tensors = [index for index in args[1] if index is not None]
        index = tensors[0] if len(tensors) == 1 else None
    else:
        index = args[2] if len(args) > 2 else kwargs["index"]
    picked = None if index is None else _picked_by(tracer, index)
    if picked is None:
        advice = f"aten::{name} takes its channels by indices that are no buffer of the model; {_BUFFER}"
        couplings.moves.append(Move(numbers, advice, False, numbers[:0]))
        return moved
    buffer, values = picked
    advice = f"aten::{name} takes its channels by {buffer}, which ties them to others in rings or for several uses"
    couplings.moves.append(Move(numbers, advice, False, numbers[:0]))
    for axis in axes:
        if varying(axis) == {dim}:
            count = min(len(values), axis.numel())
            couplings.join(axis.reshape(-1)[:count].numpy(), values[:count])
    own, moved = tracer.axes(index), clean(couplings, moved)
    if name == "index":  # its dimensions stand in place of the one that it indexes
        before, after = (1,) * dim, (1,) * (out.dim() - dim - index.dim())
        own = [axis.reshape(before + tuple(axis.shape) + after) for axis in own]
    elif name == "index_select":
        own = [axis.reshape((1,) * dim + (-1,) + (1,) * (out.dim() - dim - 1)) for axis in own]
    return combine(couplings, [moved, own]) if moved else moved


def _picked_by(tracer, index: Tensor) -> tuple[str, np.ndarray] | None:
    """The buffer that these indices are, in any shape, or the inverse of the permutation that it holds; with the number
    of what each value picks. None where they are of another origin."""
    couplings: Couplings = tracer.couplings
    sources = [couplings.source_of(int(axis.max())) for axis in tracer.axes(index)]
    if not sources or any(source is None or source.name != sources[0].name for source in sources):
        return None
    held = buffer = couplings.tensors[sources[0].name].cpu()
    values = couplings.values_of(sources[0].name)
    if values is None:
        return None
    picks = np.arange(values.first, values.first + values.size)
    if sources[0].dim == VALUES:
        held = buffer.argsort()
        picks = np.arange(values.first - len(buffer), values.first)
    places: list[Tensor | int] = [0] * held.dim()
    for source, axis in zip(sources, tracer.axes(index), strict=True):
        places[max(source.dim, 0)] = axis - source.first
        if int(axis.min()) < source.first:
            return None  # what pads it, or numbers of another dimension
    same = bool((held[tuple(places)] == index.cpu()).all())
    return (sources[0].name, picks) if same else None


def follow_order(tracer, x: Tensor, out: tuple[Tensor, ...]) -> bool:
    """The order of a buffer's values, where these are a permutation: its inverse. False where x is another tensor."""
    axes, couplings = tracer.axes(x), tracer.couplings
    if len(axes) != 1 or x.dim() != 1 or x.is_floating_point() or _picked_by(tracer, x) is None:
        return False
    values = couplings.values_of(couplings.source_of(int(axes[0].max())).name)
    held = couplings.tensors[values.name]
    if values.size != x.numel() or held.dim() != 1 or not torch.equal(held, x):
        return False
    if not torch.equal(x.sort().values, torch.arange(values.size, dtype=x.dtype, device=x.device)):
        return False
    for tensor in out:
        tracer.finish(tensor, [torch.arange(values.first, values.first + values.size)], fresh=False)
    return True
