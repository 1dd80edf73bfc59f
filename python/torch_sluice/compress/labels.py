"""Arrays that say which number (couplings.py) each element of an activation carries, and what operators do to them.

An *axis* is an int64 array of the rank of its tensor, with size 1 along dimensions on which the number does not depend;
0 is none. A tensor has a list of axes: a position table has one for its positions and one for its channels.
"""

import numpy as np
import torch
from torch import Tensor

from torch_sluice.compress.couplings import Couplings

Axes = list[Tensor]

PICKED = "a channel is picked by its place"  # why it stays


def varying(axis: Tensor) -> frozenset[int]:
    return frozenset(dim for dim, size in enumerate(axis.shape) if size > 1)


def squeeze_constant(couplings: Couplings, axis: Tensor) -> Tensor:
    """The same axis with size 1 along every dimension that it does not depend on."""
    axis = clean_shape(axis)
    if len(varying(axis)) > 1:  # numbers that differ may have become equal
        roots = torch.from_numpy(couplings.find(axis.numpy().ravel())).reshape(axis.shape)
        narrowed = clean_shape(roots)
        if narrowed.shape != axis.shape:
            return narrowed
    return axis


def clean_shape(axis: Tensor) -> Tensor:
    """With size 1 along every dimension along which its numbers are the same. 0 goes with any: beside the channels of
    an image, its padding has none."""
    for dim, size in enumerate(axis.shape):
        if size < 2:
            continue
        if axis.stride(dim) == 0:
            axis = axis.narrow(dim, 0, 1)
            continue
        if axis.numel():  # most differ from the first to the next
            first, second = axis.numpy()[tuple(slice(2) if d == dim else 0 for d in range(axis.dim()))].tolist()
            if first and second and first != second:
                continue
        highest = axis.amax(dim, keepdim=True)
        if bool(((axis == highest) | (axis == 0)).all()):
            axis = highest
    return axis


def clean(couplings: Couplings, axes: Axes) -> Axes:
    """Without axes that say nothing; a number that all elements carry was picked by its place, and must stay."""
    result = []
    for axis in axes:
        if not axis.numel():
            continue  # what rotates all of a head leaves none of it
        axis = squeeze_constant(couplings, axis)
        if varying(axis):
            result.append(axis)
        elif axis.numel() == 1 and int(axis):
            couplings.freeze(axis.numpy().ravel(), PICKED)
            if couplings.meetings is not None:
                result.append(axis)  # in a wider model it is one of several, and may come beside others again
    return result


def align(axes: Axes, rank: int) -> Axes:
    """For a tensor that is broadcast to more dimensions."""
    return [axis.reshape((1,) * (rank - axis.dim()) + tuple(axis.shape)) for axis in axes]


def combine(couplings: Couplings, operands: list[Axes]) -> Axes:
    """Axes of the element-wise result of operands of equal rank. Numbers that meet in an element become equal, or a
    number that meets several along another dimension stands for their set."""
    result: Axes = []
    for axes in operands:
        for axis in axes:
            _add(couplings, result, axis)
    return result


def _add(couplings: Couplings, result: Axes, new: Tensor) -> None:
    for place, old in enumerate(result):
        of_old, of_new = varying(old), varying(new)
        shared = of_old & of_new
        if not shared:
            continue
        if of_old == of_new:
            couplings.join(old.numpy().ravel(), new.numpy().ravel())
            result[place] = torch.where(old != 0, old, new)
            return
        one, other = _numbers_along(couplings, old, shared), _numbers_along(couplings, new, shared)
        couplings.join(one, other)
        if of_new < of_old and bool((old != 0).all()):
            return
        if of_old < of_new and bool((new != 0).all()):
            del result[place]
            _add(couplings, result, new)
            return
    result.append(new)


def _numbers_along(couplings: Couplings, axis: Tensor, dims: frozenset[int]) -> np.ndarray:
    """For each place along ``dims`` the number that stands for all of the axis at that place."""
    order = sorted(dims)
    rest = [dim for dim in range(axis.dim()) if dim not in dims]
    count = int(np.prod([axis.shape[dim] for dim in order]))
    rows = axis.permute(*order, *rest).reshape(count, -1).numpy()
    if rows.shape[1] == 1:
        return rows[:, 0]
    return couplings.numbers_for(rows)


def reduce(couplings: Couplings, axes: Axes, dims: set[int], keepdim: bool) -> Axes:
    """Axes of what an operator leaves that makes one of all elements along ``dims``."""
    result = []
    for axis in axes:
        if varying(axis) <= dims:
            continue
        if varying(axis) & dims:
            stay = varying(axis) - dims
            numbers = torch.from_numpy(_numbers_along(couplings, axis, stay))
            axis = numbers.reshape([size if dim in stay else 1 for dim, size in enumerate(axis.shape)])
        if not keepdim:
            axis = axis.reshape([size for dim, size in enumerate(axis.shape) if dim not in dims])
        result.append(axis)
    return result


def cross(couplings: Couplings, axes: Axes) -> Axes:
    """Axes of which no two share a dimension, as one: a fresh number for each pair, which a row's number stands for as
    the set of its pairs. For dimensions that are about to become one, as the heads and channels of shared values do."""
    first, *others = axes
    for other in others:
        shape = torch.broadcast_shapes(first.shape, other.shape)
        fresh = couplings.fresh_numbers(int(np.prod(shape)), first.expand(shape), other.expand(shape)).reshape(shape)
        for axis in (first, other):
            dims = varying(axis)
            couplings.join(_numbers_along(couplings, fresh, dims), _numbers_along(couplings, axis, dims))
        first = fresh
    return [first]


def all_numbers(axes: Axes) -> np.ndarray:
    return np.concatenate([axis.numpy().ravel() for axis in axes]) if axes else np.zeros(0, np.int64)


def note_split(couplings: Couplings, before: Axes, after: Axes) -> None:
    """Remembers axes that depend on more dimensions than they did: the ways in which their numbers form rows."""
    most = max((len(varying(axis)) for axis in before), default=0)
    for axis in after:
        couplings.note_rows(axis, len(varying(axis)) > most)


def gone_mask(couplings: Couplings, axes: Axes) -> Tensor | None:
    """Broadcastable: True for the elements whose number is gone; None: all stay."""
    mask = None
    for axis in axes:
        own = couplings.gone[axis.numpy()]
        if own.any():
            mask = own if mask is None else mask | own
    return None if mask is None else torch.from_numpy(mask)
