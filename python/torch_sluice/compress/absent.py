"""What operators give where channels of their inputs are gone (``Couplings.gone``): what they give in a model that was
cut, with 0 in the places of what was cut.

In products and sums these channels are 0, which adds nothing; what takes a mean, a maximum, a norm or a softmax over
channels takes it over the others: a mean over half of the channels divides by half of their number.
"""

import functools

import torch
from torch import Tensor

_SUMS = ("sum", "nansum", "any", "linalg_vector_norm", "norm", "count_nonzero")  # to which zeros add nothing


def run_without(tracer, func, args, kwargs):
    """The operator's result. Channels of its inputs that are gone may have any values."""
    return _way_to_run(func)(tracer, func, args, kwargs)


def named_arguments(func, args, kwargs) -> dict:
    return {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs


def reduced_dims(func, args, kwargs) -> set[int]:
    """Dimensions of its first argument over which an operator takes a sum, a mean or the like."""
    dims, rank = named_arguments(func, args, kwargs).get("dim"), args[0].dim()
    if isinstance(dims, int):
        dims = [dims]
    return {d % max(1, rank) for d in dims} if dims else set(range(rank))


@functools.cache
def _way_to_run(func):
    space, _, name = func._schema.name.partition("::")
    return _as_it_is if space == "sluice" else _WAYS.get(name, _as_it_is)


def _as_it_is(tracer, func, args, kwargs):
    return func(*args, **kwargs)


def _kept_places(tracer, x: Tensor, dims) -> dict[int, Tensor]:
    """For each of these dimensions along which something is gone, the places that stay."""
    kept = {}
    for axis in tracer.axes(x):
        gone = tracer.couplings.gone[axis.numpy()]
        for dim, size in enumerate(axis.shape):
            if size < 2 or dim not in dims or not gone.any():
                continue
            own = torch.from_numpy(~gone).movedim(dim, 0).reshape(size, -1).any(1)
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


def _zeroed(*places: int):
    """Runs an operator with 0 for what is gone of its arguments at these places."""

    def run(tracer, func, args, kwargs):
        args = list(args)
        for place in places:
            args[place] = tracer.without_gone(args[place])
        return func(*args, **kwargs)

    return run


def _reduction(tracer, func, args, kwargs):
    if func._schema.name.partition("::")[2] in _SUMS:
        return func(tracer.without_gone(args[0]), *args[1:], **kwargs)
    kept = _kept_places(tracer, args[0], reduced_dims(func, args, kwargs))
    return func(_select(args[0], kept), *args[1:], **kwargs)


def _along(tracer, func, args, kwargs):
    """softmax and cumulative sums: the shape stays."""
    x = args[0]
    kept = _kept_places(tracer, x, {named_arguments(func, args, kwargs).get("dim", -1) % max(1, x.dim())})
    out = func(_select(x, kept), *args[1:], **kwargs)
    return _put_back(out, x.shape, kept) if kept else out


def _layer_norm(tracer, func, args, kwargs):
    x, shape, weight, bias = args[:4]
    first = x.dim() - len(shape)
    kept = _kept_places(tracer, x, range(first, x.dim()))
    if not kept:
        return func(*args, **kwargs)
    inner = {dim - first: places for dim, places in kept.items()}
    small = [None if t is None else _select(t, inner) for t in (weight, bias)]
    chosen = _select(x, kept)
    out = func(chosen, list(chosen.shape[first:]), *small, *args[4:], **kwargs)
    return (_put_back(out[0], x.shape, kept), *out[1:])


def _group_norm(tracer, func, args, kwargs):
    """Group by group, since a model that was cut may put a channel into another group."""
    x, weight, bias, images, channels, size, groups = args[:7]
    kept, out = _kept_places(tracer, x, {1}), func(*args, **kwargs)
    if not kept:
        return out
    each, normed = channels // groups, x.new_zeros(x.shape)
    for group in kept[1].split([int((kept[1] // each == g).sum()) for g in range(groups)]):
        if len(group):
            small = [None if t is None else t.index_select(0, group) for t in (weight, bias)]
            part = func(x.index_select(1, group), *small, images, len(group), size, 1, *args[7:], **kwargs)[0]
            normed.index_copy_(1, group, part)
    return (normed, *out[1:])


_WAYS = {
    **dict.fromkeys(("mm", "bmm", "matmul", "mv", "_grouped_mm", "dot", "vdot", "linear"), _zeroed(0, 1)),
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable"), _zeroed(0, 1)),
    **dict.fromkeys(("addmm", "baddbmm"), _zeroed(1, 2)),
    **dict.fromkeys(
        (
            *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention"),
            *("_scaled_dot_product_flash_attention", "_scaled_dot_product_fused_attention_overrideable"),
            *("scaled_dot_product_attention", "_scaled_dot_product_attention_math"),
        ),
        _zeroed(0, 1, 2),
    ),
    **dict.fromkeys(("im2col", "col2im", "_weight_norm_interface"), _zeroed(0)),
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
}
