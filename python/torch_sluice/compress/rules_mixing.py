"""Rules (rules.py) of operators that take something over channels: sums, means, maxima, norms, softmax.

Where channels are gone (``Couplings.gone``), all of these are taken over the others, as they are in a model that was
cut: a mean over half of the channels divides by half of their number.
"""

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torch_sluice.compress.labels import all_numbers, combine, reduce, varying

_SUMS = ("sum", "nansum", "any", "linalg_vector_norm", "norm", "count_nonzero")  # to which zeros add nothing


def _named(func, args, kwargs) -> dict:
    return {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs


def _kept_places(tracer, x: Tensor, dims) -> dict[int, Tensor]:
    """For each of these dimensions along which something is gone, the places that stay."""
    if tracer.couplings.gone is None:
        return {}
    kept = {}
    for axis in tracer.axes(x):
        for dim in varying(axis) & set(dims):
            own = torch.from_numpy(~tracer.couplings.gone[axis.numpy()])
            own = own.movedim(dim, 0).reshape(own.shape[dim], -1).any(1)
            if not bool(own.all()):
                kept[dim] = own & kept[dim] if dim in kept else own
    return {dim: own.nonzero().flatten() for dim, own in kept.items()}


def _select(x: Tensor, kept: dict[int, Tensor]) -> Tensor:
    for dim, places in kept.items():
        x = x.index_select(dim, places)
    return x


def _put_back(out: Tensor, shape, kept: dict[int, Tensor]) -> Tensor:
    """Zeros where something is gone, ``out`` elsewhere."""
    for dim, places in kept.items():
        size = list(out.shape)
        size[dim] = shape[dim]
        out = out.new_zeros(size).index_copy(dim, places, out)
    return out


def _reduction(tracer, func, args, kwargs):
    x, named = args[0], _named(func, args, kwargs)
    dims = named.get("dim")
    if isinstance(dims, int):
        dims = [dims]
    dims = {d % max(1, x.dim()) for d in dims} if dims else set(range(x.dim()))
    name = func._schema.name.partition("::")[2]
    if name in _SUMS:
        out = func(tracer.without_gone(x), *args[1:], **kwargs)
    else:
        out = func(_select(x, _kept_places(tracer, x, dims)), *args[1:], **kwargs)
    keepdim = bool(named.get("keepdim", False))
    axes = reduce(tracer.couplings, tracer.axes(x), dims, keepdim)
    for tensor in tree_leaves(out):
        tracer.finish(tensor, list(axes))
    return out


def _along(tracer, func, args, kwargs):
    """softmax and cumulative sums: the shape stays."""
    x, named = args[0], _named(func, args, kwargs)
    dim = named.get("dim", -1) % max(1, x.dim())
    kept = _kept_places(tracer, x, {dim})
    if func._schema.name == "aten::cumsum":
        running = [axis for axis in tracer.axes(x) if dim in varying(axis)]
        tracer.couplings.freeze(all_numbers(running), "a sum runs over its channels")
    out = func(_select(x, kept), *args[1:], **kwargs)
    if kept:
        out = _put_back(out, x.shape, kept)
    tracer.finish(out, tracer.axes(x))
    return out


def _layer_norm(tracer, func, args, kwargs):
    x, shape, weight, bias = args[:4]
    first = x.dim() - len(shape)
    kept = _kept_places(tracer, x, range(first, x.dim()))
    if kept:
        inner = {dim - first: places for dim, places in kept.items()}
        small = [None if t is None else _select(t, inner) for t in (weight, bias)]
        chosen = _select(x, kept)
        out = func(chosen, list(chosen.shape[first:]), *small, *args[4:], **kwargs)
        out = (_put_back(out[0], x.shape, kept), *out[1:])
    else:
        out = func(*args, **kwargs)
    own = [tracer.axes(x)]
    for t in (weight, bias):
        own.append([axis.reshape((1,) * first + tuple(axis.shape)) for axis in tracer.axes(t)])
    tracer.finish(out[0], combine(tracer.couplings, own))
    return out


def _group_norm(tracer, func, args, kwargs):
    x, weight, bias, images, channels, size, groups = args[:7]
    couplings = tracer.couplings
    for axis in tracer.axes(x):
        if varying(axis) == {1}:
            couplings.note_rows(axis.reshape(groups, -1), 1 < groups < channels)
        elif not varying(axis) <= {0, 1}:
            couplings.freeze(all_numbers([axis]), "it is a position that is normalised with its channels")
    kept = _kept_places(tracer, x, {1})
    if kept:  # group by group, since a model that was cut may put a channel into another group
        each, normed = channels // groups, x.new_zeros(x.shape)
        for group in kept[1].split([int((kept[1] // each == g).sum()) for g in range(groups)]):
            if len(group):
                small = [None if t is None else t.index_select(0, group) for t in (weight, bias)]
                part = func(x.index_select(1, group), *small, images, len(group), size, 1, *args[7:], **kwargs)[0]
                normed.index_copy_(1, group, part)
        out = (normed, *func(*args, **kwargs)[1:])
    else:
        out = func(*args, **kwargs)
    own = [tracer.axes(x)]
    own += [[axis.reshape(1, -1, *(1,) * (x.dim() - 2)) for axis in tracer.axes(t)] for t in (weight, bias)]
    tracer.finish(out[0], combine(couplings, own))
    return out


def _batch_norm(tracer, func, args, kwargs):
    x = args[0]
    out = func(*args, **kwargs)
    own = [tracer.axes(x)]
    for t in args[1:5]:
        if isinstance(t, Tensor):
            own.append([axis.reshape(1, -1, *(1,) * (x.dim() - 2)) for axis in tracer.axes(t)])
    result = out[0] if isinstance(out, (tuple, list)) else out
    tracer.finish(result, combine(tracer.couplings, own))
    return out


def _weight_norm(tracer, func, args, kwargs):
    """A weight of norms g and directions v: v / |v| g for each row, whose norm is that of what stays."""
    v, g = args[:2]
    out = func(tracer.without_gone(v), *args[1:], **kwargs)
    tracer.finish(out[0], combine(tracer.couplings, [tracer.axes(v), tracer.axes(g)]))
    tracer.finish(out[1], tracer.axes(g))
    return out


MIXING_RULES = {
    "_weight_norm_interface": _weight_norm,
    **dict.fromkeys(
        (
            *("sum", "nansum", "any", "all", "mean", "amax", "amin", "max", "min", "var", "var_mean", "std", "prod"),
            *("std_mean", "linalg_vector_norm", "norm", "logsumexp", "median", "nanmedian", "count_nonzero", "aminmax"),
        ),
        _reduction,
    ),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "cumsum"), _along),
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    **dict.fromkeys(
        (
            *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "batch_norm"),
            *("cudnn_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update"),
        ),
        _batch_norm,
    ),
}
