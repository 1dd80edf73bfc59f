"""Rules (rules.py) of products: matrices, convolutions, attention. What is summed over meets its partner; rows and
columns become the channels of the result."""

from torch import Tensor

from torch_sluice.compress.labels import Axes, align, all_numbers, combine, reduce, varying


def _multiply(tracer, first: Axes, second: Axes, contracted: int) -> Axes:
    """Axes of the sum over dimension ``contracted`` of first * second, both of the same rank."""
    couplings = tracer.couplings
    for axes in (first, second):
        for axis in axes:
            flags = couplings.contracted if contracted in varying(axis) else couplings.survived
            couplings.mark(flags, axis.numpy().ravel())
    result = reduce(couplings, combine(couplings, [first, second]), {contracted}, keepdim=True)
    result = combine(couplings, [result])  # what became a number for a row meets what is left of it
    for axis in result:
        couplings.mark(couplings.survived, axis.numpy().ravel())
    return result


def _drop(axes: Axes, dim: int) -> Axes:
    return [axis.squeeze(dim) for axis in axes]


def _insert(axes: Axes, dim: int) -> Axes:
    return [axis.unsqueeze(dim) for axis in axes]


def _matrix(tracer, a: Tensor, b: Tensor) -> Axes:
    """[.., i, k] x [.., k, j]"""
    rank = a.dim()
    if not tracer.is_parameter(a) and not tracer.is_parameter(b) and tracer.axes(a) and tracer.axes(b):
        tracer.couplings.mark(tracer.couplings.attended, all_numbers([*tracer.axes(a), *tracer.axes(b)]))
    product = _multiply(tracer, _insert(tracer.axes(a), rank), _insert(tracer.axes(b), rank - 2), rank - 1)
    return _drop(product, rank - 1)


def _mm(tracer, func, args, kwargs):
    a, b = args[0], args[1]
    out = tracer.run(func, args, kwargs)
    tracer.finish(out, _matrix(tracer, a, b))
    return out


def _addmm(tracer, func, args, kwargs):
    added, a, b = args[:3]
    out = tracer.run(func, args, kwargs)
    axes = _matrix(tracer, a, b)
    tracer.finish(out, combine(tracer.couplings, [axes, align(tracer.axes(added), out.dim())]))
    return out


def _grouped_mm(tracer, func, args, kwargs):
    """Rows by the matrix of their expert, [experts, k, j]: experts stay."""
    a, b = args[0], args[1]
    out = tracer.run(func, args, kwargs)
    matrices = []
    for axis in tracer.axes(b):
        if 0 in varying(axis) or a.dim() != 2 or b.dim() != 3:
            tracer.couplings.freeze(all_numbers([axis]), "it is one of several experts")
        else:
            matrices.append(axis[0])
    product = _multiply(tracer, _insert(tracer.axes(a), 2), _insert(matrices, 0), 1)
    tracer.finish(out, _drop(product, 1))
    return out


def _mv(tracer, func, args, kwargs):
    a, b = args[0], args[1]
    out = tracer.run(func, args, kwargs)
    tracer.finish(out, _drop(_multiply(tracer, tracer.axes(a), align(tracer.axes(b), 2), 1), 1))
    return out


def _dot(tracer, func, args, kwargs):
    a, b = args[0], args[1]
    out = tracer.run(func, args, kwargs)
    _multiply(tracer, tracer.axes(a), tracer.axes(b), 0)
    return out


def _linear(tracer, func, args, kwargs):
    x, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    out = tracer.run(func, args, kwargs)
    rank = x.dim()
    turned = align([axis.t() for axis in tracer.axes(weight)], rank)
    product = _multiply(tracer, _insert(tracer.axes(x), rank), _insert(turned, rank - 2), rank - 1)
    axes = _drop(product, rank - 1)
    tracer.finish(out, combine(tracer.couplings, [axes, align(tracer.axes(bias), out.dim())]))
    return out


def _convolution(tracer, func, args, kwargs):
    """Dimensions here: image, group, output channel within it, input channel within it."""
    x, weight, bias, *_, transposed, _, groups = args[:9]
    out = tracer.run(func, args, kwargs)
    couplings, channels, place = (
        tracer.couplings,
        weight.shape[1] if not transposed else weight.shape[0] // groups,
        None,
    )
    made = out.shape[1] // groups
    inputs, weights = [], []
    for axis in tracer.axes(x):
        if varying(axis) <= {0, 1}:
            per_image = axis.reshape(axis.shape[0], axis.shape[1])
            split = (groups, 1, channels) if axis.shape[1] > 1 else (1, 1, 1)
            inputs.append(per_image.reshape(axis.shape[0], *split))
        else:
            couplings.freeze(all_numbers([axis]), "it is a position under a convolution's window")
    for axis in tracer.axes(weight):
        flat = axis.reshape(axis.shape[0], axis.shape[1], -1)
        if flat.shape[2] > 1:
            couplings.freeze(all_numbers([axis]), "it is a place in a convolution's window")
            continue
        flat = flat[:, :, 0]
        if transposed:  # [groups * channels, made]
            rows = (groups, channels) if flat.shape[0] > 1 else (1, 1)
            place = flat.reshape(1, *rows, flat.shape[1]).transpose(2, 3)
        else:  # [groups * made, channels]
            rows = (groups, made) if flat.shape[0] > 1 else (1, 1)
            place = flat.reshape(1, *rows, flat.shape[1])
        weights.append(place)
    _note_groups(couplings, [*inputs, *weights])
    product = _drop(_multiply(tracer, inputs, weights, 3), 3)
    axes = [axis.expand(-1, groups, made).flatten(1) if varying(axis) & {1, 2} else axis.flatten(1) for axis in product]
    axes = [axis.reshape(*axis.shape, *(1,) * (out.dim() - 2)) for axis in axes]
    bias_axes = [axis.reshape(1, -1, *(1,) * (out.dim() - 2)) for axis in tracer.axes(bias)]
    tracer.finish(out, combine(couplings, [axes, bias_axes]))
    return out


def _note_groups(couplings, axes: Axes) -> None:
    """The groups of a convolution hold their channels in rows."""
    for axis in axes:
        couplings.note_rows(axis, len(varying(axis) & {1, 2, 3}) > 1)


def _attend(tracer, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], mask: Tensor | None) -> Axes:
    """softmax(q k^T + mask) v, gates [.., queries] and [.., keys] on the scores. Several heads may share one of k."""
    share = q.shape[1] // k.shape[1] if q.dim() == 4 and k.dim() == 4 else 1

    def of_keys(tensor):
        return [
            axis.repeat_interleave(share, 1) if share > 1 and axis.shape[1] > 1 else axis
            for axis in tracer.axes(tensor)
        ]

    rank = q.dim()
    scores = _multiply(tracer, _insert(tracer.axes(q), rank - 1), _insert(of_keys(k), rank - 2), rank)
    operands = [_drop(scores, rank)]
    if gates:
        operands += [_insert(tracer.axes(gates[0]), rank - 1), _insert(of_keys(gates[1]), rank - 2)]
    if mask is not None:
        operands.append(align(tracer.axes(mask), rank))
    weights = combine(tracer.couplings, operands)
    product = _multiply(tracer, _insert(weights, rank), _insert(of_keys(v), rank - 2), rank - 1)
    for tensor in (q, k, v):
        tracer.couplings.mark(tracer.couplings.attended, all_numbers(tracer.axes(tensor)))
    return _drop(product, rank - 1)


def _attention(tracer, func, args, kwargs):
    q, k, v = args[:3]
    named = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    mask = named.get("attn_mask")
    mask = named.get("attn_bias") if mask is None else mask
    out = tracer.run(func, args, kwargs)
    result = out[0] if isinstance(out, (tuple, list)) else out
    tracer.finish(result, _attend(tracer, q, k, v, (), mask))
    return out


def _gated_attention(tracer, func, args, kwargs):
    named = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    out = tracer.run(func, args, kwargs)
    result = out[0] if isinstance(out, (tuple, list)) else out
    gates = (named["a"], named["b"])
    tracer.finish(result, _attend(tracer, named["q"], named["k"], named["v"], gates, None))
    return out


PRODUCT_RULES = {
    **dict.fromkeys(("mm", "bmm", "matmul"), _mm),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    "mv": _mv,
    "_grouped_mm": _grouped_mm,
    "dot": _dot,
    "vdot": _dot,
    "linear": _linear,
    "convolution": _convolution,
    "_convolution": _convolution,
    "convolution_overrideable": _convolution,
    **dict.fromkeys(
        (
            *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention"),
            *("_scaled_dot_product_flash_attention", "_scaled_dot_product_fused_attention_overrideable"),
            *("scaled_dot_product_attention", "_scaled_dot_product_attention_math"),
        ),
        _attention,
    ),
    "sluice::gated_attention": _gated_attention,
}
