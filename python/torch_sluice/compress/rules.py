"""What each operator of ATen does to the channels of its inputs: the rules of tracer.py, by kind of operator.

A rule runs the operator, and notes the axes (labels.py) of its results. An operator without a rule lets nothing be cut
that reaches it.
"""

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torch_sluice.compress.labels import align, all_numbers, clean, clean_shape, combine, cross, note_split, varying
from torch_sluice.compress.rules_mixing import MIXING_RULES
from torch_sluice.compress.rules_places import PLACES, follow_order, follow_places
from torch_sluice.compress.rules_products import PRODUCT_RULES

_MOVES = (
    *("view", "_unsafe_view", "_reshape_alias", "reshape", "permute", "transpose", "t", "expand", "slice", "select"),
    *("unsqueeze", "squeeze", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "chunk", "unbind", "flip"),
    *("roll", "repeat", "alias", "detach", "lift_fresh", "constant_pad_nd", "pixel_unshuffle"),
    *("channel_shuffle", "native_channel_shuffle", "movedim", "diagonal", "index_select", "index", "gather", "unfold"),
    *("repeat_interleave", "narrow", "split_copy", "view_copy", "take_along_dim"),
)
_PARTS = ("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk")
_SHUFFLES = ("channel_shuffle", "native_channel_shuffle")
_RESHAPES = ("view", "_unsafe_view", "_reshape_alias", "reshape")
_POINTWISE = (
    *("where", "masked_fill", "dropout", "native_dropout", "tril", "triu", "copy", "_to_copy", "clone", "contiguous"),
    *("copy_", "masked_fill_", "lerp", "gelu", "zeros_like", "ones_like", "rand_like", "randn_like", "empty_like"),
    *("full_like", "fill_", "zero_", "add_", "mul_", "sub_", "div_", "addcmul_", "tril_", "triu_", "new_empty_strided"),
    *("nan_to_num", "nan_to_num_", "log_sigmoid_forward", "prelu", "_prelu_kernel", "rrelu_with_noise"),
    *("bernoulli_", "exponential_", "hardswish", "hardswish_", "mish_", "threshold_", "gelu_"),
    *("rsub", "floor_divide", "polar", "complex"),
)
_LIKE = ("zeros_like", "ones_like", "rand_like", "randn_like", "empty_like", "full_like")
_MERGES = (
    *("masked_scatter", "masked_scatter_", "index_put", "index_put_", "_index_put_impl_", "index_add", "index_add_"),
    *("index_copy", "index_copy_", "slice_scatter", "select_scatter", "_unsafe_index_put"),
)
_TABLES = ("embedding", "_embedding_bag")
_QUIET = (
    *("_local_scalar_dense", "equal", "is_nonzero", "item", "sym_size", "sym_stride", "sym_numel", "size"),
    *("new_empty", "new_zeros", "new_ones", "new_full"),
)


def rule_for(func):
    name = func._schema.name.partition("::")[2]
    if func._schema.name.startswith("sluice::"):
        return PRODUCT_RULES.get(func._schema.name, _unknown)
    return _RULES.get(name) or (_pointwise if torch.Tag.pointwise in func.tags else _unknown)


def _move(tracer, func, args, kwargs):
    """Elements go elsewhere, or are repeated or left out: what happens to them happens to their numbers."""
    out = tracer.run(func, args, kwargs)
    x, name = args[0], func._schema.name.partition("::")[2]
    axes = tracer.axes(x)
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    if name in _RESHAPES and len(axes) > 1:
        axes = _cross_merged(tracer, axes, x.shape, out.shape)
    moved: list[list[Tensor]] = [[] for _ in outs]
    for axis in axes:
        full = axis.expand(x.shape)
        new = [full.reshape(out.shape)] if name in _RESHAPES else func(full, *args[1:], **kwargs)
        for place, part in enumerate(new if isinstance(new, (tuple, list)) else [new]):
            moved[place].append(part)
    if name in _SHUFFLES:  # its parts are a view of the operator's own
        for axis in axes:
            if varying(axis) == {1}:
                tracer.couplings.note_rows(axis.reshape(args[1], -1), axis.numel() > args[1] > 1)
    if name in _PARTS and len({part.shape for part in outs}) == 1:
        _note_parts(tracer.couplings, axes, args, kwargs, len(outs))
    if name in PLACES:
        moved = [follow_places(tracer, name, args, kwargs, out, moved[0])]
    aliases = any(argument.alias_info is not None for argument in func._schema.arguments)
    for tensor, parts in zip(outs, moved, strict=True):
        parts = clean(tracer.couplings, parts)
        note_split(tracer.couplings, axes, parts)
        tracer.finish(tensor, parts, fresh=not aliases)
    return out


def _note_parts(couplings, axes, args, kwargs, count: int) -> None:
    """Channels that are divided into equal parts form rows, whatever becomes of the parts."""
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    for axis in axes:
        if count > 1 and varying(axis) == {dim % axis.dim()}:
            couplings.parts.append(axis.reshape(count, -1))


def _cross_merged(tracer, axes, before, after):
    """Axes along dimensions that become one have to be one."""

    def becomes(axis):
        return varying(clean_shape(axis.expand(before).reshape(after)))

    result = [axes[0]]
    for axis in axes[1:]:
        if any(becomes(axis) & becomes(known) for known in result):
            result = cross(tracer.couplings, [*result, axis])
        else:
            result.append(axis)
    return result


def _pixel_shuffle(tracer, func, args, kwargs):
    """factor^2 channels become the pixels of one, which leaves when all of them do."""
    out = tracer.run(func, args, kwargs)
    tracer.finish(out, _merge_places(tracer, args[0], args[0].dim() - 3, args[1] ** 2, out))
    return out


def _fold(tracer, func, args, kwargs):
    """col2im: what im2col made of each channel for the places of a window is added up to one again."""
    out = tracer.run(func, args, kwargs)
    tracer.finish(out, _merge_places(tracer, args[0], args[0].dim() - 2, args[2][0] * args[2][1], out))
    return out


def _merge_places(tracer, x: Tensor, dim: int, size: int, out: Tensor):
    """Axes of an image, of which each channel comes from ``size`` channels of x in a row."""
    couplings, axes = tracer.couplings, []
    for axis in tracer.axes(x):
        if varying(axis) == {dim}:
            rows = axis.reshape(-1, size)
            couplings.note_rows(rows, size > 1)
            numbers = torch.from_numpy(couplings.numbers_for(rows.numpy()))
            axes.append(numbers.reshape((1,) * (out.dim() - 3) + (-1, 1, 1)))
        else:
            couplings.freeze(all_numbers([axis]), "it is a position, or one of several rows, where pixels are shuffled")
    return axes


def _turn(tracer, func, args, kwargs):
    """transpose_ and the like change a tensor's shape in place."""
    x = args[0]
    axes = [func(axis.expand(x.shape).clone(), *args[1:], **kwargs) for axis in tracer.axes(x)]
    out = tracer.run(func, args, kwargs)
    tracer.finish(out, axes, fresh=False)
    return out


def _restride(tracer, func, args, kwargs):
    """Other strides for the same elements, as pooling gives what is channels-last."""
    x, size, stride = args[:3]
    offset = args[3] if len(args) > 3 else kwargs.get("storage_offset")
    moved = any(n > 1 and own != other for n, own, other in zip(size, x.stride(), stride, strict=False))
    if moved or tuple(size) != tuple(x.shape) or offset not in (None, x.storage_offset()):
        return _unknown(tracer, func, args, kwargs)
    axes = tracer.axes(x)
    out = tracer.run(func, args, kwargs)
    tracer.finish(out, axes, fresh=False)
    return out


def _complex(tracer, func, args, kwargs):
    """Pairs along the last dimension become one complex number each, or the other way round."""
    x = args[0]
    out = tracer.run(func, args, kwargs)
    if func._schema.name == "aten::view_as_real":
        axes = [axis.unsqueeze(-1) for axis in tracer.axes(x)]
    else:
        axes = []
        for axis in tracer.axes(x):
            if axis.shape[-1] == 2:
                tracer.couplings.join(axis[..., 0].numpy().ravel(), axis[..., 1].numpy().ravel())
            axes.append(axis[..., 0])
    tracer.finish(out, axes, fresh=False)
    return out


def _windows(tracer, func, args, kwargs):
    """im2col: each channel becomes one for each place of the window."""
    x, size = args[0], args[1][0] * args[1][1]
    out = tracer.run(func, args, kwargs)
    axes = []
    for axis in tracer.axes(x):
        if varying(axis) == {x.dim() - 3}:
            axes.append(axis.reshape(-1).repeat_interleave(size).reshape((1,) * (out.dim() - 2) + (-1, 1)))
        else:
            tracer.couplings.freeze(all_numbers([axis]), "it is a position under a window")
    tracer.finish(out, axes)
    return out


def _glu(tracer, func, args, kwargs):
    """The first half of a dimension by the sigmoid of the second."""
    x, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", -1)
    out = tracer.run(func, args, kwargs)
    halves = [[], []]
    for axis in tracer.axes(x):
        for half, part in zip(halves, axis.expand(x.shape).chunk(2, dim), strict=True):
            half.append(part)
    halves = [clean(tracer.couplings, half) for half in halves]
    tracer.finish(out, combine(tracer.couplings, halves))
    return out


def _join_tensors(tracer, func, args, kwargs):
    """cat and stack: what lies at the same place of the other dimensions goes together."""
    out = tracer.run(func, args, kwargs)
    tensors = list(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    parts = [tracer.axes(x) for x in tensors]
    shapes = [x.shape for x in tensors]
    if func._schema.name == "aten::stack":
        dim %= out.dim()
        parts = [[axis.unsqueeze(dim) for axis in axes] for axes in parts]
        shapes = [x.unsqueeze(dim).shape for x in tensors]
    dim %= out.dim()
    kept = [i for i, shape in enumerate(shapes) if len(shape) == out.dim()]  # cat takes empty ones of any rank
    if tracer.couplings.meetings is not None:
        parts = _told_apart(tracer.couplings, parts, dim)
    combine(tracer.couplings, [[axis for axis in parts[i] if dim not in varying(axis)] for i in kept])
    signatures = {varying(axis) | {dim} for i in kept for axis in parts[i]}
    result = []
    for signature in sorted(signatures, key=sorted):
        pieces = []
        for i in kept:
            own = [axis for axis in parts[i] if varying(axis) | {dim} == signature]
            piece = own[0] if own else torch.zeros((1,) * out.dim(), dtype=torch.int64)
            pieces.append(piece.expand([shapes[i][d] if d in signature else 1 for d in range(out.dim())]))
        result.append(torch.cat(pieces, dim))
    tracer.finish(out, result)
    return out


def _told_apart(couplings, parts, dim: int):
    """Axes of tensors that are put together, with a name of its own for what one before them has, too."""
    seen: set[int] = set()
    result = []
    for axes in parts:
        own = []
        for axis in axes:
            numbers = set(axis.numpy().ravel().tolist()) - {0}
            own.append(axis if dim not in varying(axis) or seen.isdisjoint(numbers) else couplings.renamed(axis))
            seen |= numbers
        result.append(own)
    return result


def _pointwise(tracer, func, args, kwargs):
    """Each element of the result comes from the elements at its place."""
    written = args[0] if func._schema.is_mutable and args and isinstance(args[0], Tensor) else None
    before = tracer.axes(written)
    out = tracer.run(func, args, kwargs)
    outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    rank = outs[0].dim() if outs else 0
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim() <= rank]
    axes = combine(tracer.couplings, [align(tracer.axes(x), rank) for x in operands])
    if written is not None and written._is_view() and [a.shape for a in axes] != [a.shape for a in before]:
        tracer.couplings.freeze(all_numbers(axes), "it is written into a part of another tensor")
    like = func._schema.name.partition("::")[2] in _LIKE
    for tensor in outs:
        tracer.finish(tensor, axes, fresh=not like)
    return out


def _merge(tracer, func, args, kwargs):
    """Rows of one tensor are put into another: channels, along the last dimension, go together."""
    out = tracer.run(func, args, kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and tracer.axes(leaf)]
    operands = []
    for x in tensors:
        last = [axis for axis in tracer.axes(x) if varying(axis) == {x.dim() - 1} and x.shape[-1] == out.shape[-1]]
        others = [axis for axis in tracer.axes(x) if not any(axis is known for known in last)]
        tracer.couplings.freeze(all_numbers(others), f"{func._schema.name} moves them in a way that is not followed")
        operands.append([axis.reshape((1,) * (out.dim() - 1) + (-1,)) for axis in last])
    tracer.finish(out, combine(tracer.couplings, operands))
    return out


def _table(tracer, func, args, kwargs):
    """Rows of a table by their number: all rows stay, its columns are channels."""
    out = tracer.run(func, args, kwargs)
    result = out[0] if isinstance(out, tuple) else out
    axes = []
    for axis in tracer.axes(args[0]):
        if varying(axis) == {1}:
            tracer.couplings.mark(tracer.couplings.survived, axis.numpy().ravel())
            axes.append(axis.reshape((1,) * (result.dim() - 1) + (-1,)))
        else:
            tracer.couplings.freeze(all_numbers([axis]), "it is a row of a table")
    tracer.finish(result, axes)
    return out


def _spatial(tracer, func, args, kwargs):
    """Pooling and resizing: channels come before the dimensions that are resized."""
    out = tracer.run(func, args, kwargs)
    name = func._schema.name
    spatial = next(n for n in (1, 2, 3) if f"{n}d" in name or (n == 1 and "linear1d" in name))
    x, axes = args[0], []
    for axis in tracer.axes(x):
        if all(dim < x.dim() - spatial for dim in varying(axis)):
            axes.append(axis)
        else:
            tracer.couplings.freeze(all_numbers([axis]), "it is a position that is pooled or resized")
    for tensor in tree_leaves(out):
        tracer.finish(tensor, list(axes))
    return out


def _ranked(tracer, func, args, kwargs):
    """The places of the largest: what is compared stays."""
    out = tracer.run(func, args, kwargs)
    outs = tuple(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
    descends = True in args[2:] or kwargs.get("descending", False)
    if "sort" in func._schema.name and not descends and follow_order(tracer, args[0], outs):
        return out
    numbers = all_numbers(tracer.axes(args[0]))
    tracer.couplings.freeze(numbers, "its channels are ranked")
    return out


def _quiet(tracer, func, args, kwargs):
    return func(*args, **kwargs)


def _unknown(tracer, func, args, kwargs):
    out = tracer.run(func, args, kwargs)
    name = func._schema.name
    tracer.unknown.add(name)
    for leaf in tree_leaves((args, kwargs)):
        tracer.couplings.freeze(all_numbers(tracer.axes(leaf)), f"{name} is not followed")
    for leaf in tree_leaves(out):
        tracer.finish(leaf, [], fresh=False)
    return out


_RULES = {
    **dict.fromkeys(_MOVES, _move),
    **dict.fromkeys(("transpose_", "t_", "squeeze_", "unsqueeze_"), _turn),
    "glu": _glu,
    "im2col": _windows,
    "col2im": _fold,
    **dict.fromkeys(("as_strided", "as_strided_"), _restride),
    "pixel_shuffle": _pixel_shuffle,
    **dict.fromkeys(("view_as_real", "view_as_complex"), _complex),
    **dict.fromkeys(("cat", "stack", "concat"), _join_tensors),
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(_MERGES, _merge),
    **dict.fromkeys(_TABLES, _table),
    **dict.fromkeys(("topk", "sort", "argsort", "argmax", "argmin", "multinomial", "kthvalue"), _ranked),
    **dict.fromkeys(_QUIET, _quiet),
    **dict.fromkeys(
        (
            *("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d", "max_pool1d", "avg_pool1d"),
            *("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d"),
            *("adaptive_max_pool2d", "adaptive_max_pool3d", "adaptive_avg_pool2d", "upsample_nearest1d"),
            *("upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d"),
            *("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa"),
            *("_upsample_bicubic2d_aa", "reflection_pad1d", "reflection_pad2d", "replication_pad1d"),
            *("replication_pad2d", "reflection_pad3d", "replication_pad3d", "grid_sampler_2d", "fractional_max_pool2d"),
            *("upsample_trilinear3d", "grid_sampler_3d"),
        ),
        _spatial,
    ),
    **PRODUCT_RULES,
    **MIXING_RULES,
}
