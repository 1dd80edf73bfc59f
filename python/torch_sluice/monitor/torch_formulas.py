"""Operations of torch's own operators that ``torch.utils.flop_counter`` has no formula for, or not the right one.

Each formula takes the ``Call`` and returns the multiplications and additions of its products as executed; a
multiply-add counts as two. Biases, activations and normalisation are left out, as in torch's own formulas.
"""

import math
from collections.abc import Callable

import torch

from torch_sluice.monitor.pairs import causal_pairs


class Call:
    """A call of an operator: ``call["weight"]`` is the argument of that name in its schema, ``call.out`` its result."""

    def __init__(self, operator: torch._ops.OpOverload, args: tuple, kwargs: dict, out):
        self.operator, self.args, self.kwargs, self.out = operator, args, kwargs, out
        self._places = {argument.name: i for i, argument in enumerate(operator._schema.arguments)}

    def __getitem__(self, name: str):
        place = self._places[name]
        if place < len(self.args):
            return self.args[place]
        return self.kwargs.get(name, self.operator._schema.arguments[place].default_value)

    def __contains__(self, name: str) -> bool:
        return name in self._places


# ---- products


def _product(left: str, right: str) -> Callable[[Call], int]:
    """[..., M, K] times [..., K, N], or times [K]."""
    return lambda call: 2 * call[left].numel() * (call[right].shape[-1] if call[right].dim() > 1 else 1)


def _linear_layer(call: Call) -> int:
    return 2 * call.out.numel() * call["weight"].shape[-1]  # of the input nothing but the numbers, if it is nested


def _linear(x: str) -> Callable[[Call], int]:
    """[..., K] to [..., N], however the weight is packed."""
    return lambda call: 2 * call.out.numel() * call[x].shape[-1]


def _linear_backward(call: Call) -> int:
    x, _, weight = call.args[:3]
    return 2 * x.numel() * weight.shape[0] * sum(map(bool, call["output_mask"][:2]))


def _grouped_mm(call: Call) -> int:
    """Groups along the rows, along the columns, along what is summed over, or in a batch."""
    left, right = call["self"], call["mat2"]
    if left.dim() == 3 and right.dim() == 2:  # [G, M, K] times [K, N], each column with the matrix of its group
        return 2 * left.shape[1] * right.numel()
    return 2 * left.numel() * right.shape[-1]


def _foreach_mm(call: Call) -> int:
    return sum(2 * a.numel() * b.shape[-1] for a, b in zip(call["self"], call["mat2"], strict=True))


def _affine_grid(call: Call) -> int:
    return 2 * call.out.numel() * call["theta"].shape[-1]


# ---- convolutions


def _convolution(call: Call) -> int:
    x, weight = call.args[:2]
    transposed = "transposed" in call and call["transposed"]
    return _convolved(x if transposed else call.out, weight)


def _transposed_convolution(call: Call) -> int:
    return _convolved(*call.args[:2])


def _convolution_backward(call: Call) -> int:
    # Either gradient is a convolution with the products of the forward pass. (torch's formula has the weights' one
    # of a grouped convolution too high by the number of groups.)
    larger = call["input"] if call["transposed"] else call["grad_output"]
    return _convolved(larger, call["weight"]) * sum(map(bool, call["output_mask"][:2]))


def _convolved(slid_over: torch.Tensor, weight: torch.Tensor) -> int:
    """Each number of the output (transposed: of the input) meets the weights of its channel."""
    return 2 * slid_over.numel() * math.prod(weight.shape[1:])


def _convolution_over_time(call: Call) -> int:
    taps, channels, _ = call["weight"].shape
    return 2 * call.out.numel() * taps * channels


# ---- attention


def _sdpa(call: Call) -> int:
    q, v = call["query"], call["value"]
    return _pairs(call) * 2 * (q.shape[3] + v.shape[3])


def _sdpa_backward(call: Call) -> int:
    q, v = call["query"], call["value"]
    return _pairs(call) * (6 * q.shape[3] + 4 * v.shape[3])


def _pairs(call: Call) -> int:
    # torch counts the whole square under a causal mask. A causal kernel does not compute the upper half, so counting
    # it would flatter whoever uses SDPA. SDPA aligns the mask top left; with n_q = n_k it is the same.
    q, n_k = call["query"], call["key"].shape[2]
    n_q = q.shape[2]
    return q.shape[0] * q.shape[1] * (causal_pairs(n_q, n_k) if call["is_causal"] else n_q * n_k)


def _lengths(x: torch.Tensor) -> list[int]:
    """Of the sequences [B, N, D], or of a nested tensor's."""
    return x._nested_tensor_size()[:, 0].tolist() if x.is_nested else [x.shape[1]] * x.shape[0]


def _multi_head_attention(call: Call) -> int:
    """The projections, QK^T and PV of all pairs (a mask is added to them), the output's projection."""
    width, queries, keys = call["embed_dim"], _lengths(call["query"]), _lengths(call["key"])
    projected = 2 * sum(queries) + 2 * sum(keys)  # queries and outputs, keys and values
    pairs = sum(n_q * n_k for n_q, n_k in zip(queries, keys, strict=True))
    return 2 * width**2 * projected + 4 * width * pairs


def _transformer_encoder_layer(call: Call) -> int:
    width, lengths = call["embed_dim"], _lengths(call["src"])
    attention = 8 * width**2 * sum(lengths) + 4 * width * sum(n * n for n in lengths)
    return attention + 2 * sum(lengths) * (call["ffn_weight_1"].numel() + call["ffn_weight_2"].numel())


# ---- recurrent layers: every matrix of weights meets every step of every sequence once


def _recurrent(call: Call) -> int:
    return _recurrence(call["input"], call["weight"])


def _recurrent_backward(call: Call) -> int:
    return _recurrence(call["input"], call["weight"]) * (2 if call["output_mask"][3] else 1)


def _recurrent_layer(call: Call) -> int:
    return _recurrence(call["input"], call.args[1:3])


def _recurrent_layer_backward(call: Call) -> int:
    return 2 * _recurrence(call["input"], call.args[1:3])


def _recurrence(x: torch.Tensor, weights) -> int:
    return 2 * (x.numel() // x.shape[-1]) * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _of_aten(formula: Callable[[Call], int], names: str) -> dict[str, Callable[[Call], int]]:
    return {f"aten::{name}": formula for name in names.split()}


# By the operator's qualified name. One that works in place, as "addmv_", has the formula of the other.
FORMULAS: dict[str, Callable[[Call], int]] = {
    **_of_aten(_product("self", "vec"), "mv"),
    **_of_aten(_product("mat", "vec"), "addmv"),
    **_of_aten(_product("self", "tensor"), "dot"),
    **_of_aten(_product("self", "other"), "vdot"),
    **_of_aten(lambda call: 2 * call["vec1"].numel() * call["vec2"].numel(), "addr"),
    **_of_aten(_product("batch1", "batch2"), "addbmm"),
    **_of_aten(_product("mat1", "mat2"), "_addmm_activation"),
    **_of_aten(_product("self", "mat2"), "_int_mm _scaled_mm_v2"),
    **_of_aten(_foreach_mm, "_foreach_mm"),
    **_of_aten(_grouped_mm, "_grouped_mm _scaled_grouped_mm _scaled_grouped_mm_v2"),
    **_of_aten(_linear_layer, "linear"),
    **_of_aten(_linear("input"), "_mixed_dtypes_linear"),
    **_of_aten(_linear("self"), "mkldnn_linear _weight_int8pack_mm _weight_int4pack_mm _weight_int4pack_mm_for_cpu"),
    **_of_aten(_linear_backward, "linear_backward"),
    **_of_aten(_affine_grid, "affine_grid_generator cudnn_affine_grid_generator"),
    "mkldnn::_linear_pointwise": _linear("X"),
    **_of_aten(
        _convolution,
        "convolution _convolution convolution_overrideable cudnn_convolution cudnn_convolution_relu "
        "cudnn_convolution_add_relu miopen_convolution miopen_convolution_relu miopen_convolution_add_relu "
        "miopen_depthwise_convolution mkldnn_convolution _mps_convolution _nnpack_spatial_convolution "
        "_slow_conv2d_forward slow_conv3d_forward slow_conv_dilated2d slow_conv_dilated3d _conv_depthwise2d "
        "conv_depthwise3d",
    ),
    **_of_aten(
        _transposed_convolution,
        "cudnn_convolution_transpose miopen_convolution_transpose slow_conv_transpose2d slow_conv_transpose3d",
    ),
    **_of_aten(_convolution_backward, "convolution_backward convolution_backward_overrideable"),
    **_of_aten(_convolution_over_time, "conv_tbc"),
    **_of_aten(
        _sdpa,
        "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
        "_scaled_dot_product_fused_attention_overrideable",
    ),
    **_of_aten(
        _sdpa_backward,
        "_scaled_dot_product_flash_attention_backward _scaled_dot_product_flash_attention_for_cpu_backward "
        "_scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention_backward "
        "_scaled_dot_product_fused_attention_overrideable_backward",
    ),
    **_of_aten(_multi_head_attention, "_native_multi_head_attention _triton_multi_head_attention"),
    **_of_aten(_transformer_encoder_layer, "_transformer_encoder_layer_fwd"),
    **_of_aten(_recurrent, "_cudnn_rnn miopen_rnn"),
    **_of_aten(_recurrent_backward, "_cudnn_rnn_backward miopen_rnn_backward"),
    **_of_aten(_recurrent_layer, "mkldnn_rnn_layer"),
    **_of_aten(_recurrent_layer_backward, "mkldnn_rnn_layer_backward"),
}

# torch's quantised layers multiply int8, whatever the dtype of what comes in.
IN_INT8: dict[str, Callable[[Call], int]] = {
    f"quantized::{name}": _linear("X")
    for name in ("linear", "linear_relu", "linear_leaky_relu", "linear_tanh", "linear_dynamic", "linear_relu_dynamic")
}
