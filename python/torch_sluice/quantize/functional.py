"""The quantize operators as Python calls them, with defaults; ops/sluice/quantize.h has the formulas."""

from typing import NamedTuple

import torch
from torch import Tensor

from torch_sluice._errors import as_value_error, check_tensors

DEFAULT_TARGET_SQNR = 30.0  # dB: an error of 3 % of a row's root mean square, before it averages out in the product
DEFAULT_OUTLIER_RATIO = 10.0
_POLICIES = {"sqnr": 0, "amax": -1}  # SL_BITS_BY_SQNR, SL_BITS_BY_AMAX


class Quantized(NamedTuple):
    """Integers and what they stand for: ``q * scale`` in each row."""

    q: Tensor  #: int8 or int16, the shape of what was quantised
    scale: Tensor  #: float32 [rows], or [1] for the whole tensor; NaN for rows with an infinity or NaN
    bits: Tensor  #: int8, like scale: the width, 0 where scale is NaN

    def dequantize(self) -> Tensor:
        """The float32 values that the integers stand for."""
        rows = self.q.reshape(-1, self.q.shape[-1]) if self.q.numel() else self.q
        if not self.q.numel():
            return self.q.float()
        return (rows * self.scale[:, None]).reshape(self.q.shape)


def _number_of_bits(name: str, bits) -> int:
    if isinstance(bits, str):
        if bits not in _POLICIES:
            raise ValueError(f"{name} is {bits!r}, expected 4, 7, 8, 16, 'sqnr' or 'amax'")
        return _POLICIES[bits]
    return bits


def _call(operator, *arguments):
    try:
        return operator(*arguments)
    except RuntimeError as error:
        raise as_value_error(error) from None


def _refuse_gradient(name: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"{name} has no gradient, and an argument requires one: call it under torch.inference_mode() or "
            "torch.no_grad(), or detach the argument"
        )


def quantize_dynamic(
    x: Tensor,
    bits: int | str = "sqnr",
    *,
    target_sqnr: float = DEFAULT_TARGET_SQNR,
    per_token: bool = True,
) -> Quantized:
    """Rounds x to integers with a scale for each row (token) or for the whole tensor.

    Args:
        x: float32, bfloat16 or float16 [..., columns]; all but the last dimension are rows.
        bits: 4, 7, 8 or 16; "sqnr": for each row the smallest whose predicted signal-to-noise ratio,
            ``12 qmax^2 rms^2 / amax^2``, is at least target_sqnr; "amax": 8 for ``max |x| < 0.1``, else 16.
        target_sqnr: in dB, 0 to 200; for "sqnr".
        per_token: a scale and a width for each row; else one for all.

    Returns:
        :class:`Quantized`: q is int8 for bits 4, 7 and 8, else int16.

    Raises:
        ValueError: an argument is not allowed; the message names it.
        RuntimeError: x requires a gradient.
    """
    _refuse_gradient("quantize_dynamic", x)
    operator = torch.ops.sluice.quantize_dynamic.default
    return Quantized(*_call(operator, x, _number_of_bits("bits", bits), target_sqnr, per_token))


def pack_linear_weight(weight: Tensor, bits: int = 8, group_size: int = 0) -> tuple[Tensor, Tensor]:
    """Rounds the weight of a linear layer to integers, in the layout that :func:`linear_dynamic` reads.

    Args:
        weight: float32, bfloat16 or float16 [out_features, in_features], finite.
        bits: 8 or 4.
        group_size: inputs that share a scale, a multiple of 32; 0: one scale for an output channel. 4 bits want 128
            or less.

    Returns:
        packed, uint8 [bytes], and scale, float32 [groups, out_features padded to 16]. Both may be saved: the layout is
        the same on every machine.

    Raises:
        ValueError: an argument is not allowed, or a weight is infinite or NaN; the message names it.
    """
    check_tensors(weight=weight)
    return _call(torch.ops.sluice.pack_linear_weight.default, weight.detach(), bits, group_size)


def unpack_linear_weight(
    packed: Tensor, scale: Tensor, *, out_features: int, in_features: int, bits: int = 8, group_size: int = 0
) -> Tensor:
    """The float32 weight [out_features, in_features] that a packed one stands for.

    For a convolution without groups, the inputs of a channel are in the order [height, width, channels].
    Raises ValueError for what does not fit together.
    """
    operator = torch.ops.sluice.unpack_linear_weight.default
    return _call(operator, packed, scale, out_features, in_features, bits, group_size)


def lookup_linear_weight(
    rows: Tensor,
    packed: Tensor,
    scale: Tensor,
    *,
    out_features: int,
    in_features: int,
    bits: int = 8,
    group_size: int = 0,
) -> Tensor:
    """Rows of the weight that a packed one stands for: the lookup of an embedding tied to a linear layer.

    Args:
        rows: int64 or int32 of any shape, each in [0, out_features).
        packed, scale: from :func:`pack_linear_weight`.
        out_features, in_features, bits, group_size: what the weight was packed with.

    Returns:
        float32 [..., in_features], the same values as those of :func:`unpack_linear_weight`.

    Raises:
        ValueError: a row is out of range, or an argument does not fit the others; the message names it.
    """
    operator = torch.ops.sluice.lookup_linear_weight.default
    return _call(operator, rows, packed, scale, out_features, in_features, bits, group_size)


def linear_dynamic(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    weight_bits: int = 8,
    group_size: int = 0,
    activation_bits: int | str = "sqnr",
    target_sqnr: float = DEFAULT_TARGET_SQNR,
    per_token: bool = True,
    outlier_ratio: float = DEFAULT_OUTLIER_RATIO,
) -> tuple[Tensor, Tensor]:
    """A linear layer on integers: x is quantised as it comes, the weight was by :func:`pack_linear_weight`.

    Args:
        x: float32, bfloat16 or float16 [..., in_features].
        packed, weight_scale: from :func:`pack_linear_weight`.
        bias: [out_features], or None.
        out_features, weight_bits, group_size: what the weight was packed with.
        activation_bits, target_sqnr, per_token: as ``bits`` and so on of :func:`quantize_dynamic`.
        outlier_ratio: input channels whose largest value is above this many times the usual one (the root mean square
            of all channels' largest values but the highest 1 in 32) are multiplied in float32, if at most one in 32
            is; 0: none.

    Returns:
        out, x's dtype [..., out_features], and bits, int8 [rows]: the width that each row took. A row of x with an
        infinity or NaN has NaN in out and 0 in bits.

    Raises:
        ValueError: an argument is not allowed; the message names it.
        RuntimeError: an argument requires a gradient.
    """
    _refuse_gradient("linear_dynamic", x, bias)
    return _call(
        torch.ops.sluice.linear_dynamic.default,
        x,
        packed,
        weight_scale,
        bias,
        out_features,
        weight_bits,
        group_size,
        _number_of_bits("activation_bits", activation_bits),
        target_sqnr,
        per_token,
        outlier_ratio,
    )


def pack_conv2d_weight(weight: Tensor, bits: int = 8, group_size: int = 0, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Rounds the weight of a convolution to integers, in the layout that conv2d_dynamic reads.

    Args:
        weight: float32, bfloat16 or float16 [out_channels, channels / groups, height, width], finite.
        bits: 8 or 4.
        group_size: inputs of a channel, in the order [height, width, channels], that share a scale; 0: all.
        groups: of the convolution.

    Returns:
        packed and scale, as :func:`pack_linear_weight`.

    Raises:
        ValueError: an argument is not allowed, or a weight is infinite or NaN; the message names it.
    """
    check_tensors(weight=weight)
    return _call(torch.ops.sluice.pack_conv2d_weight.default, weight.detach(), bits, group_size, groups)


def _pair(name: str, value: int | tuple[int, int]) -> list[int]:
    if isinstance(value, int):
        return [value, value]
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} is {value!r}, expected an integer or two, for height and width")
    return list(value)


def conv2d_dynamic(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    weight_bits: int = 8,
    group_size: int = 0,
    activation_bits: int | str = "sqnr",
    target_sqnr: float = DEFAULT_TARGET_SQNR,
) -> tuple[Tensor, Tensor]:
    """A convolution on integers: each image is quantised as it comes, with one scale and width.

    Args:
        x: float32, bfloat16 or float16 [images, channels, height, width], in either memory format.
        packed, weight_scale: from :func:`pack_conv2d_weight`.
        bias: [out_channels], or None.
        out_channels, kernel_size, groups, weight_bits, group_size: of the weight that was packed.
        stride, padding, dilation: as of ``torch.nn.functional.conv2d``; padding is with zeros.
        activation_bits, target_sqnr: as ``bits`` and so on of :func:`quantize_dynamic`, for each image.

    Returns:
        out, x's dtype [images, out_channels, height, width], in x's memory format, and bits, int8 [images]: the width
        that each image took. An image with an infinity or NaN has NaN in out and 0 in bits.

    Raises:
        ValueError: an argument is not allowed; the message names it.
        RuntimeError: an argument requires a gradient.
    """
    _refuse_gradient("conv2d_dynamic", x, bias)
    return _call(
        torch.ops.sluice.conv2d_dynamic.default,
        x,
        packed,
        weight_scale,
        bias,
        out_channels,
        _pair("kernel_size", kernel_size),
        _pair("stride", stride),
        _pair("padding", padding),
        _pair("dilation", dilation),
        groups,
        weight_bits,
        group_size,
        _number_of_bits("activation_bits", activation_bits),
        target_sqnr,
    )
