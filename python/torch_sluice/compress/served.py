"""What calls of torch make of a :class:`QuantizedWeight`: which integer kernels serve, and what unpacks."""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_sluice.compress import served_recurrent
from torch_sluice.compress.quantized import QuantizedWeight, pack
from torch_sluice.monitor import bits as widths
from torch_sluice.quantize.operators import FLOATS

_LINEAR = torch.ops.sluice.linear_dynamic.default
_LOOKUP = torch.ops.sluice.lookup_linear_weight.default
_CONV2D = torch.ops.sluice.conv2d_dynamic.default
_aten = torch.ops.aten
_ADVICE = (
    "a quantised weight is for inference: torch_sluice.compress.unpack_weights(model) gives the model its "
    "floating-point weights back"
)


def _note(bits: Tensor, weight: QuantizedWeight) -> None:
    """Tells monitors, and counts for count_bits(); neither within a compiled or exported graph."""
    if torch.compiler.is_compiling():
        return
    widths.record(bits, weight)
    if weight.counting:
        for width in weight.counts:
            weight.counts[width] += int((bits == width).sum())


def _refuse_gradient(x: Tensor, bias: Tensor | None) -> None:
    """Called where gradients are enabled: an answer without one would train the rest of a model on nothing."""
    if x.requires_grad or (bias is not None and bias.requires_grad):
        name = "the input" if x.requires_grad else "the bias"
        raise RuntimeError(
            f"a layer with a quantised weight has no gradient, and {name} requires one: call it under "
            "torch.inference_mode() or torch.no_grad(), or detach the input"
        )


def _linear(input, weight, bias=None):
    """``F.linear``."""
    if type(weight) is not QuantizedWeight or weight.kind != "linear" or not _fits(input, weight):
        return F.linear(unpacked(input), unpacked(weight), unpacked(bias))
    if torch.is_grad_enabled():
        _refuse_gradient(input, bias)
    out, bits = _LINEAR(input, weight.packed, weight.scale, bias, *weight.arguments)
    if widths.listeners or weight.counting:
        _note(bits, weight)
    return out


def _matmul(input, other):
    """``input @ other``; also ``torch.mm``."""
    if type(other) is not QuantizedWeight or other.kind != "transposed" or not _fits(input, other):
        return torch.matmul(unpacked(input), unpacked(other))
    if torch.is_grad_enabled():
        _refuse_gradient(input, None)
    out, bits = _LINEAR(input, other.packed, other.scale, None, *other.arguments)
    if widths.listeners or other.counting:
        _note(bits, other)
    return out


def _fits(x: Tensor, weight: QuantizedWeight) -> bool:
    """Whether the kernels take x. They would not notice a few columns too many or too few, weights being padded; torch
    says what is wrong with them."""
    return x.dtype in FLOATS and x.shape[-1:] == weight.columns


def _mm(input, mat2):
    """``torch.mm``, which takes matrices only."""
    if input.dim() != 2:
        return torch.mm(unpacked(input), unpacked(mat2))
    return _matmul(input, mat2)


def _addmm(input, mat1, mat2, *, beta=1, alpha=1):
    """``torch.addmm``: input + mat1 @ mat2, as transformers' Conv1D calls it."""
    served = type(mat2) is QuantizedWeight and mat2.kind == "transposed" and type(input) is not QuantizedWeight
    if not served or beta != 1 or alpha != 1 or mat1.dim() != 2 or not _fits(mat1, mat2):
        return torch.addmm(unpacked(input), unpacked(mat1), unpacked(mat2), beta=beta, alpha=alpha)
    bias = input if input.dim() == 1 and input.shape[0] == mat2.options.shape[1] else None
    if torch.is_grad_enabled():
        _refuse_gradient(mat1, input)
    out, bits = _LINEAR(mat1, mat2.packed, mat2.scale, bias, *mat2.arguments)
    if widths.listeners or mat2.counting:
        _note(bits, mat2)
    return out if bias is not None else out + input


def _pair(value):
    """Height and width."""
    return value if type(value) is tuple and len(value) == 2 else torch.nn.modules.utils._pair(value)


def _padding(weight: QuantizedWeight, padding, dilation):
    """Padding in numbers, or None where "same" is not the same on both sides."""
    if padding == "valid":
        return 0, 0
    if padding != "same":
        return None if isinstance(padding, str) else _pair(padding)
    total = [spread * (kernel - 1) for spread, kernel in zip(_pair(dilation), weight.geometry[1], strict=True)]
    return None if total[0] % 2 or total[1] % 2 else (total[0] // 2, total[1] // 2)


def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """``F.conv2d``."""
    served = type(weight) is QuantizedWeight and weight.kind == "conv2d" and groups == weight.arguments[0]
    around = _padding(weight, padding, dilation) if served else None
    if around is None or input.dtype not in FLOATS or input.shape[-3:-2] != weight.columns:
        return F.conv2d(unpacked(input), unpacked(weight), unpacked(bias), stride, padding, dilation, groups)
    if torch.is_grad_enabled():
        _refuse_gradient(input, bias)
    batched = input.dim() == 4
    out, bits = _CONV2D(
        input if batched else input[None], weight.packed, weight.scale, bias, *weight.geometry, _pair(stride), around,
        _pair(dilation), *weight.arguments,
    )  # fmt: skip
    if widths.listeners or weight.counting:
        _note(bits, weight)
    return out if batched else out[0]


def _embedding(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):  # fmt: skip
    """``F.embedding``."""
    if type(weight) is not QuantizedWeight:
        return F.embedding(unpacked(input), weight)
    if max_norm is not None:
        raise RuntimeError(f"an embedding with max_norm={max_norm} writes to its table, which is quantised: {_ADVICE}")
    if weight.kind == "linear":
        shape, bits, group_size = weight.options.shape, weight.options.weight_bits, weight.options.group_size
        return _LOOKUP(input, weight.packed, weight.scale, *shape, bits, group_size).to(weight.options.dtype)
    if weight.kind == "rows":
        rows = torch.embedding(weight.packed, input) * torch.embedding(weight.scale, input)  # int8 by float32
        return rows if weight.options.dtype is torch.float32 else rows.to(weight.options.dtype)
    return F.embedding(input, unpacked(weight), padding_idx)


def unpacked(value):
    """An ordinary tensor for a quantised weight; whatever else it is stays as it is."""
    return value.unpack() if isinstance(value, QuantizedWeight) else value


def _unpack_all(values):
    return tree_map_only(QuantizedWeight, QuantizedWeight.unpack, values)


def _asking_no_more(function: types.FunctionType) -> types.FunctionType:
    """A copy of a function of torch.nn.functional that does not look for ``__torch_function__`` among its arguments.

    Such a function hands over to its arguments first, before it does anything. Called again from there it would do so
    again for ever; with ``__torch_function__`` disabled, the calls of F.linear within it would not be served.
    """
    namespace = {**function.__globals__, "has_torch_function": _never}
    copy = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _never(arguments) -> bool:
    return False


#: Functions that are served, by what torch hands to ``__torch_function__``.
FUNCTIONS: dict[Callable, Callable] = {
    F.linear: _linear,
    torch.conv2d: _conv2d,
    F.conv2d: _conv2d,
    F.embedding: _embedding,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _mm,
    Tensor.mm: _mm,
    F.multi_head_attention_forward: _asking_no_more(F.multi_head_attention_forward),
}
# What reads memory that a quantised weight does not have, directly.
_READERS = (torch._VF.rnn_tanh, torch._VF.rnn_relu, torch._VF.rnn_tanh_cell, torch._VF.rnn_relu_cell)
_READERS += (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.item, Tensor.__dlpack__, Tensor.__format__)
_WRITERS = (Tensor.__setitem__, Tensor.data.__set__)


def call(function: Callable, args: tuple, kwargs: dict[str, Any]):
    """Whatever else is called with a quantised weight among its arguments."""
    if function in served_recurrent.SERVED:
        weights = [w for w in served_recurrent.flat_weights(function, args) if isinstance(w, QuantizedWeight)]
        heard = widths.listeners or any(weight.counting for weight in weights)
        return served_recurrent.call(function, args, kwargs, _note if heard else None)
    if function in _READERS:
        return function(*_unpack_all(args), **_unpack_all(kwargs))
    if function in _WRITERS and isinstance(args[0], QuantizedWeight):
        _refuse_writing(args[0], function.__name__)
    if function is Tensor.requires_grad_ and (args[1:] or kwargs.values() or (True,)) != (False,):
        wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
        if wanted:
            raise RuntimeError(
                f"requires_grad_(True) was asked of a quantised weight: {_ADVICE}. A model that is to hold it, as by "
                "load_state_dict(assign=True), must ask for no gradient: call model.requires_grad_(False) before"
            )
    if function is Tensor.data_ptr:
        return args[0].packed.data_ptr()  # so that who looks for shared memory finds it
    if function is Tensor.share_memory_:
        args[0].packed.share_memory_(), args[0].scale.share_memory_()
        return args[0]
    if function is Tensor.is_shared:
        return args[0].packed.is_shared()
    if torch.is_inference_mode_enabled():  # in which a view of a tensor made outside of it has no version to share
        with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


def _refuse_writing(weight: QuantizedWeight, name: str) -> None:
    raise RuntimeError(
        f"{name} writes to a quantised weight {list(weight.options.shape)}, whose values are packed. Use "
        f"weight.copy_(values), which packs them, or unpack it: {_ADVICE}"
    )


def dispatch(function, args: tuple, kwargs: dict[str, Any]):
    """Operators of torch, below ``__torch_function__``."""
    handle = _OPERATORS.get(function)
    if handle is not None:
        return handle(function, *args, **kwargs)
    if function._schema.is_mutable:
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, QuantizedWeight):
                _refuse_writing(value, function._schema.name.removeprefix("aten::"))
        out = kwargs.get("out")
        if isinstance(out, QuantizedWeight):
            _refuse_writing(out, function._schema.name.removeprefix("aten::"))
    return function(*_unpack_all(args), **_unpack_all(kwargs))


def refuse_onnx() -> None:
    """ONNX has no operators for this, and says so in many words for each layer."""
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(f"ONNX has no operator for quantised weights. Export a model in floating point: {_ADVICE}")


def _alias(function, weight):
    refuse_onnx()
    return QuantizedWeight(weight.packed, weight.scale, weight.options)


def _clone(function, weight, *, memory_format=None):
    return QuantizedWeight(weight.packed.clone(), weight.scale.clone(), weight.options)


def _to_copy(function, weight, *, dtype=None, device=None, **others):
    """Another dtype is only that of what it answers. Off the CPU it unpacks: the kernels are for the CPU."""
    device = weight.device if device is None else torch.device(device)
    if device.type != "cpu" or (dtype is not None and not dtype.is_floating_point):
        return function(weight.unpack(), dtype=dtype, device=device, **others)
    options = weight.options if dtype is None else weight.options._replace(dtype=dtype)
    return QuantizedWeight(weight.packed, weight.scale, options)  # nothing ever writes into the integers


def _copy(function, target, source, non_blocking=False):
    """Packs what it is given; of another quantised weight it takes everything, also how its inputs are quantised."""
    if not isinstance(target, QuantizedWeight):
        return function(target, unpacked(source), non_blocking)
    options = target.options
    if tuple(source.shape) != options.shape:
        raise RuntimeError(f"source has shape {list(source.shape)}, expected {list(options.shape)}")
    same = isinstance(source, QuantizedWeight) and (source.kind, source.options.groups) == (target.kind, options.groups)
    if same:
        packed, scale = source.packed.clone(), source.scale.clone()
        options = source.options._replace(dtype=options.dtype)
    else:
        packed, scale = pack(unpacked(source), options)
    target.packed, target.scale = packed, scale
    target._set_options(options)
    return target


def _product(serve: Callable) -> Callable:
    """Products below ``__torch_function__``, as C++ and functions traced before call them."""
    return lambda function, *args, **kwargs: serve(*args, **kwargs)


def _convolution(function, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    if transposed or not isinstance(weight, QuantizedWeight):
        return function(
            unpacked(x), unpacked(weight), unpacked(bias), stride, padding, dilation, transposed, output_padding, groups
        )
    return _conv2d(x, weight, bias, stride, padding, dilation, groups)


def _lookup(function, weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    return _embedding(indices, weight)


_TURNED = {"linear": "transposed", "transposed": "linear"}


def _transpose(function, weight, *dimensions):
    """A matrix turned round is the same integers, read by the other kind of call."""
    if weight.kind not in _TURNED:
        return function(weight.unpack(), *dimensions)
    if function is _aten.permute.default:
        swaps = [d % 2 for d in dimensions[0]] == [1, 0]
    else:
        swaps = function is _aten.t.default or {d % 2 for d in dimensions} == {0, 1}
    if not swaps:
        return function(weight.unpack(), *dimensions)
    options = weight.options._replace(kind=_TURNED[weight.kind], shape=weight.options.shape[::-1])
    return QuantizedWeight(weight.packed, weight.scale, options)


_OPERATORS: dict[Any, Callable] = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.copy_.default: _copy,
    _aten.t.default: _transpose,
    _aten.transpose.int: _transpose,
    _aten.permute.default: _transpose,
    _aten.linear.default: _product(_linear),
    _aten.mm.default: _product(_mm),
    _aten.addmm.default: _product(_addmm),
    _aten.convolution.default: _convolution,
    _aten.embedding.default: _lookup,
}
