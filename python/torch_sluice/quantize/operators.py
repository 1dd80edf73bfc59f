"""What the sluice:: quantize operators need beside their kernels: shapes for tracing. See ops/sluice/quantize.h."""

import math

import torch

from torch_sluice._fakes import register_fake

PANEL = 16  # output channels of a panel: SL_QUANTIZE_PANEL
DEPTH = 8  # what inputs are padded to a multiple of: SL_QUANTIZE_DEPTH
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def packed_sizes(out_features, in_features, bits: int, group_size: int, groups: int = 1):
    """Bytes of a packed weight, and the shape of its scales."""
    padded_outputs = groups * ((out_features // groups + PANEL - 1) // PANEL) * PANEL
    padded_inputs = (in_features + DEPTH - 1) // DEPTH * DEPTH
    scale_groups = torch.sym_max(1, (in_features + group_size - 1) // group_size) if group_size else 1
    return padded_outputs * padded_inputs * bits // 8, (scale_groups, padded_outputs)


def _check_values(name, tensor):
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} is {tensor.dtype}, expected float32, bfloat16 or float16")


def _check_rank(name, tensor, rank, meaning):
    if tensor.dim() != rank:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {meaning}")


def _check_sizes(name, tensor, shape):
    for got, wanted in zip(tensor.shape, shape, strict=True):
        torch._check_value(got == wanted, lambda: f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")


def _check_weight(
    packed, scale, out_features, in_features, bits, group_size, groups=1, names=("packed", "weight_scale")
):
    if bits not in (4, 8):
        raise ValueError(f"bits of the weight is {bits}, expected 8 or 4")
    size, scale_shape = packed_sizes(out_features, in_features, bits, group_size, groups)
    for name, tensor, dtype, shape in (
        (names[0], packed, torch.uint8, (size,)),
        (names[1], scale, torch.float32, scale_shape),
    ):
        if tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected {dtype}")
        _check_rank(name, tensor, len(shape), f"{list(shape)}")
        _check_sizes(name, tensor, shape)


def _check_bias(bias, out_features, name="bias"):
    if bias is None:
        return
    _check_values(name, bias)
    _check_rank(name, bias, 1, f"[{out_features}]")
    _check_sizes(name, bias, [out_features])


@register_fake("quantize_dynamic")
def _fake_quantize(x, bits, target_sqnr, per_token):
    _check_values("x", x)
    if x.dim() < 1:
        raise ValueError(f"x has shape {list(x.shape)}, expected at least one dimension")
    rows = math.prod(x.shape[:-1]) if per_token else 1
    q = x.new_empty(x.shape, dtype=torch.int8 if bits in (4, 7, 8) else torch.int16)
    return q, x.new_empty((rows,), dtype=torch.float32), x.new_empty((rows,), dtype=torch.int8)


def _fake_packed(weight, inputs, bits, group_size, groups=1):
    _check_values("weight", weight)
    if bits not in (4, 8):
        raise ValueError(f"bits of the weight is {bits}, expected 8 or 4")
    size, scale_shape = packed_sizes(weight.shape[0], inputs, bits, group_size, groups)
    return weight.new_empty((size,), dtype=torch.uint8), weight.new_empty(scale_shape, dtype=torch.float32)


@register_fake("pack_linear_weight")
def _fake_pack_linear(weight, bits, group_size):
    _check_rank("weight", weight, 2, "[out_features, in_features]")
    return _fake_packed(weight, weight.shape[1], bits, group_size)


@register_fake("pack_conv2d_weight")
def _fake_pack_conv2d(weight, bits, group_size, groups):
    _check_rank("weight", weight, 4, "[out_channels, channels / groups, height, width]")
    return _fake_packed(weight, weight.shape[1:].numel(), bits, group_size, groups)


@register_fake("unpack_linear_weight")
def _fake_unpack(packed, scale, out_features, in_features, bits, group_size):
    _check_weight(packed, scale, out_features, in_features, bits, group_size)
    return packed.new_empty((out_features, in_features), dtype=torch.float32)


@register_fake("lookup_linear_weight")
def _fake_lookup(rows, packed, scale, out_features, in_features, bits, group_size):
    if rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"rows is {rows.dtype}, expected int64 or int32")
    _check_weight(packed, scale, out_features, in_features, bits, group_size)
    return packed.new_empty((*rows.shape, in_features), dtype=torch.float32)


@register_fake("linear_dynamic")
def _fake_linear(
    x,
    packed,
    weight_scale,
    bias,
    out_features,
    weight_bits,
    group_size,
    activation_bits,
    target_sqnr,
    per_token,
    outlier_ratio,
):
    _check_values("x", x)
    if x.dim() < 1:
        raise ValueError(f"x has shape {list(x.shape)}, expected at least one dimension")
    _check_weight(packed, weight_scale, out_features, x.shape[-1], weight_bits, group_size)
    _check_bias(bias, out_features)
    out = x.new_empty((*x.shape[:-1], out_features))
    return out, x.new_empty((math.prod(x.shape[:-1]),), dtype=torch.int8)


@register_fake("conv2d_dynamic")
def _fake_conv2d(
    x,
    packed,
    weight_scale,
    bias,
    out_channels,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
    weight_bits,
    group_size,
    activation_bits,
    target_sqnr,
):
    _check_values("x", x)
    _check_rank("x", x, 4, "[images, channels, height, width]")
    images, channels, *sizes = x.shape
    inputs = kernel_size[0] * kernel_size[1] * (channels // groups)
    _check_weight(packed, weight_scale, out_channels, inputs, weight_bits, group_size, groups)
    _check_bias(bias, out_channels)
    out_sizes = [
        (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, spread in zip(sizes, kernel_size, stride, padding, dilation, strict=True)
    ]
    for size in out_sizes:
        torch._check_value(size > 0, lambda: f"the output has sizes {out_sizes}, expected at least 1")
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((images, out_channels, *out_sizes), dtype=x.dtype, device=x.device, memory_format=memory_format)
    return out, x.new_empty((images,), dtype=torch.int8)


def _fake_recurrent(gates, x, h0, hidden_size, matrices, biases, batch_sizes, weight_bits, group_size):
    """out, hn and bits of both recurrent layers. matrices: (name, packed, scale, outputs, inputs) of each weight."""
    _check_values("x", x)
    if batch_sizes is None:
        _check_rank("x", x, 3, "[steps, batch, inputs], or [rows, inputs] with batch_sizes")
        torch._check_value(
            h0.shape[0] == x.shape[1],
            lambda: f"h0 has shape {list(h0.shape)}, expected {x.shape[1]} rows, the batch of x",
        )
    else:
        _check_rank("x", x, 2, "[rows, inputs] with batch_sizes")
        if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1:
            raise ValueError(f"batch_sizes is {batch_sizes.dtype} {list(batch_sizes.shape)}, expected int64 [steps]")
    for name, values in (("weight_bits", weight_bits), ("group_size", group_size)):
        if len(values) != len(matrices):
            raise ValueError(f"{name} has {len(values)} numbers, expected {len(matrices)}, one for each weight")
    for (name, packed, scale, outputs, inputs), bits, size in zip(matrices, weight_bits, group_size, strict=True):
        _check_weight(packed, scale, outputs, inputs, bits, size, names=(f"packed_{name}", f"scale_{name}"))
    for name, bias in zip(("bias_ih", "bias_hh"), biases, strict=True):
        _check_bias(bias, gates * hidden_size, name)
    out = x.new_empty((*x.shape[:-1], h0.shape[1]))
    bits = x.new_empty((len(matrices), math.prod(x.shape[:-1])), dtype=torch.int8)
    return out, x.new_empty(h0.shape), bits


def _check_state(name, state, x):
    _check_rank(name, state, 2, "[batch, size]")
    if state.dtype != x.dtype:
        raise ValueError(f"{name} is {state.dtype}, expected {x.dtype}, as x is")


@register_fake("lstm_dynamic")
def _fake_lstm(
    x,
    h0,
    c0,
    packed_ih,
    scale_ih,
    packed_hh,
    scale_hh,
    packed_hr,
    scale_hr,
    bias_ih,
    bias_hh,
    batch_sizes,
    weight_bits,
    group_size,
    *options,
):
    _check_state("h0", h0, x)
    _check_state("c0", c0, x)
    hidden, state = c0.shape[1], h0.shape[1]
    matrices = [("ih", packed_ih, scale_ih, 4 * hidden, x.shape[-1]), ("hh", packed_hh, scale_hh, 4 * hidden, state)]
    if packed_hr is not None:
        matrices.append(("hr", packed_hr, scale_hr, state, hidden))
    biases = bias_ih, bias_hh
    out, hn, bits = _fake_recurrent(4, x, h0, hidden, matrices, biases, batch_sizes, weight_bits, group_size)
    return out, hn, x.new_empty(c0.shape), bits


@register_fake("gru_dynamic")
def _fake_gru(
    x,
    h0,
    packed_ih,
    scale_ih,
    packed_hh,
    scale_hh,
    bias_ih,
    bias_hh,
    batch_sizes,
    weight_bits,
    group_size,
    *options,
):
    _check_state("h0", h0, x)
    hidden = h0.shape[1]
    matrices = [("ih", packed_ih, scale_ih, 3 * hidden, x.shape[-1]), ("hh", packed_hh, scale_hh, 3 * hidden, hidden)]
    return _fake_recurrent(3, x, h0, hidden, matrices, (bias_ih, bias_hh), batch_sizes, weight_bits, group_size)
