"""Rules (rules.py) of operators that take something over channels: sums, means, maxima, norms, softmax.

Where channels are gone, all of these are taken over the others (absent.py).
"""

from torch import Tensor
from torch.utils._pytree import tree_leaves

from torch_sluice.compress.absent import named_arguments, reduced_dims
from torch_sluice.compress.labels import all_numbers, combine, reduce, varying


def _reduction(tracer, func, args, kwargs):
    out = tracer.run(func, args, kwargs)
    keepdim = bool(named_arguments(func, args, kwargs).get("keepdim", False))
    axes = reduce(tracer.couplings, tracer.axes(args[0]), reduced_dims(func, args, kwargs), keepdim)
    for tensor in tree_leaves(out):
        tracer.finish(tensor, list(axes))
    return out


def _along(tracer, func, args, kwargs):
    """softmax and cumulative sums: the shape stays."""
    x = args[0]
    dim = named_arguments(func, args, kwargs).get("dim", -1) % max(1, x.dim())
    if func._schema.name == "aten::cumsum":
        running = [axis for axis in tracer.axes(x) if dim in varying(axis)]
        tracer.couplings.freeze(all_numbers(running), "a sum runs over its channels")
    out = tracer.run(func, args, kwargs)
    tracer.finish(out, tracer.axes(x))
    return out


def _layer_norm(tracer, func, args, kwargs):
    x, shape, weight, bias = args[:4]
    first = x.dim() - len(shape)
    out = tracer.run(func, args, kwargs)
    own = [tracer.axes(x)]
    for t in (weight, bias):
        own.append([axis.reshape((1,) * first + tuple(axis.shape)) for axis in tracer.axes(t)])
    tracer.finish(out[0], combine(tracer.couplings, own))
    return out


def _group_norm(tracer, func, args, kwargs):
    x, weight, bias, _, channels, _, groups = args[:7]
    couplings = tracer.couplings
    for axis in tracer.axes(x):
        if varying(axis) == {1}:
            couplings.note_rows(axis.reshape(groups, -1), 1 < groups < channels)
        elif not varying(axis) <= {0, 1}:
            couplings.freeze(all_numbers([axis]), "it is a position that is normalised with its channels")
    out = tracer.run(func, args, kwargs)
    own = [tracer.axes(x)]
    own += [[axis.reshape(1, -1, *(1,) * (x.dim() - 2)) for axis in tracer.axes(t)] for t in (weight, bias)]
    tracer.finish(out[0], combine(couplings, own))
    return out


def _batch_norm(tracer, func, args, kwargs):
    x = args[0]
    out = tracer.run(func, args, kwargs)
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
    out = tracer.run(func, args, kwargs)
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
