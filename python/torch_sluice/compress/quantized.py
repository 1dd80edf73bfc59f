"""Layers that quantise their input as it comes and multiply in integers; weights were packed once.

They are for inference: nothing has a gradient. ops/sluice/quantize.h has formulas and layouts.
"""

import torch
from torch import Tensor, nn

from torch_sluice.monitor import bits as widths
from torch_sluice.quantize import (
    DEFAULT_OUTLIER_RATIO,
    DEFAULT_TARGET_SQNR,
    pack_conv2d_weight,
    pack_linear_weight,
)

POLICIES = {"sqnr": 0, "amax": -1}  # SL_BITS_BY_SQNR, SL_BITS_BY_AMAX
_WIDTHS = (4, 7, 8, 16)


def check_options(policy: str, weight_bits: int, group_size: int, target_sqnr: float) -> None:
    """Raises ValueError for options of the quantised layers that are not allowed."""
    if policy not in POLICIES:
        raise ValueError(f"quantize_policy is {policy!r}, expected 'sqnr' or 'amax'")
    if weight_bits not in (4, 8):
        raise ValueError(f"weight_bits is {weight_bits!r}, expected 8 or 4")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 0 or group_size % 32:
        raise ValueError(f"group_size is {group_size!r}, expected a multiple of 32, or 0 for one scale a channel")
    if not 0 <= target_sqnr <= 200:
        raise ValueError(f"target_sqnr is {target_sqnr}, expected 0 to 200 dB")


class _Quantized(nn.Module):
    """What both layers share: the packed weight as buffers, and a count of the widths that inputs took."""

    def __init__(self, bias: Tensor | None, policy: str, weight_bits: int, group_size: int, target_sqnr: float):
        super().__init__()
        check_options(policy, weight_bits, group_size, target_sqnr)
        self.policy, self.weight_bits, self.group_size = policy, weight_bits, group_size
        self.target_sqnr = float(target_sqnr)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.counting = False  # whether forward counts the widths; count_bits() switches it
        self._rows = dict.fromkeys((0, *_WIDTHS), 0)

    def _set_weight(self, packed: Tensor, scale: Tensor) -> None:
        self.register_buffer("packed", packed)
        self.register_buffer("weight_scale", scale)

    def _note(self, bits: Tensor) -> None:
        """Tells monitors, and counts for count_bits(); neither within a compiled or exported graph."""
        if torch.compiler.is_compiling():
            return
        widths.record(bits, self)
        if self.counting:
            for width in self._rows:
                self._rows[width] += int((bits == width).sum())

    def bits_chosen(self) -> dict[int, int]:
        """Rows (for a convolution, images) that took 4, 7, 8 or 16 bits while counting; 0: those with inf or NaN."""
        return dict(self._rows)

    def _options(self) -> str:
        bias = self.bias is not None
        return (
            f"bias={bias}, weight_bits={self.weight_bits}, group_size={self.group_size}, policy={self.policy!r}, "
            f"target_sqnr={self.target_sqnr:g}"
        )


class QuantizedLinear(_Quantized):
    """``nn.Linear`` in integers: x [..., in_features] -> [..., out_features], in x's dtype.

    Each row of x takes 4, 7, 8 or 16 bits: by ``policy`` "sqnr" the smallest whose predicted signal-to-noise ratio is
    ``target_sqnr`` dB, by "amax" 8 where max |x| < 0.1, else 16. A row with an infinity or NaN becomes NaN.
    """

    kind = "QuantizedLinear"

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, weight_bits: int = 8, group_size: int = 0,
        policy: str = "sqnr", target_sqnr: float = DEFAULT_TARGET_SQNR, outlier_ratio: float = DEFAULT_OUTLIER_RATIO,
        weight: Tensor | None = None,
    ):  # fmt: skip
        super().__init__(torch.zeros(out_features) if bias else None, policy, weight_bits, group_size, target_sqnr)
        self.in_features, self.out_features, self.outlier_ratio = in_features, out_features, float(outlier_ratio)
        weight = torch.zeros(out_features, in_features) if weight is None else weight
        self._set_weight(*pack_linear_weight(weight, weight_bits, group_size))

    @classmethod
    def from_float(cls, linear: nn.Linear, **options) -> "QuantizedLinear":
        """Of a linear layer with finite weights; options as those of the constructor."""
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, weight=linear.weight.detach(), **options
        )
        if linear.bias is not None:
            layer.bias.copy_(linear.bias.detach())
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        out, bits = torch.ops.sluice.linear_dynamic.default(
            x, self.packed, self.weight_scale, self.bias, self.out_features, self.weight_bits, self.group_size,
            POLICIES[self.policy], self.target_sqnr, True, self.outlier_ratio,
        )  # fmt: skip
        self._note(bits)
        return out

    def config(self) -> dict:
        """What recreates the layer but its buffers, as plain values."""
        return {
            "in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None,
            "weight_bits": self.weight_bits, "group_size": self.group_size, "policy": self.policy,
            "target_sqnr": self.target_sqnr, "outlier_ratio": self.outlier_ratio,
        }  # fmt: skip

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._options()}"


class QuantizedConv2d(_Quantized):
    """``nn.Conv2d`` in integers: x [images, channels, height, width], one width and scale for each image.

    Zero padding and groups as those of ``nn.Conv2d``; an unbatched x gains and loses its first dimension. An image with
    an infinity or NaN becomes NaN.
    """

    kind = "QuantizedConv2d"

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size, stride=(1, 1), padding=(0, 0), dilation=(1, 1),
        groups: int = 1, bias: bool = True, *, weight_bits: int = 8, group_size: int = 0, policy: str = "sqnr",
        target_sqnr: float = DEFAULT_TARGET_SQNR, weight: Tensor | None = None,
    ):  # fmt: skip
        super().__init__(torch.zeros(out_channels) if bias else None, policy, weight_bits, group_size, target_sqnr)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = list(kernel_size), list(stride)
        self.padding, self.dilation = list(padding), list(dilation)
        weight = torch.zeros(out_channels, in_channels // groups, *kernel_size) if weight is None else weight
        self._set_weight(*pack_conv2d_weight(weight, weight_bits, group_size, groups))

    @staticmethod
    def why_not(conv: nn.Conv2d) -> str | None:
        """What this class does not take of a convolution, or None."""
        if conv.padding_mode != "zeros":
            return f"padding_mode is {conv.padding_mode!r}"
        return "its padding is not the same on both sides" if _padding(conv) is None else None

    @classmethod
    def from_float(cls, conv: nn.Conv2d, **options) -> "QuantizedConv2d":
        """Of a convolution with finite weights; options as those of the constructor."""
        reason = cls.why_not(conv)
        if reason:
            raise ValueError(f"conv cannot be quantised: {reason}, expected zeros, the same on both sides")
        layer = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, _padding(conv), conv.dilation,
            conv.groups, conv.bias is not None, weight=conv.weight.detach(), **options,
        )  # fmt: skip
        if conv.bias is not None:
            layer.bias.copy_(conv.bias.detach())
        return layer.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        batched = x if x.dim() == 4 else x[None]
        out, bits = torch.ops.sluice.conv2d_dynamic.default(
            batched, self.packed, self.weight_scale, self.bias, self.out_channels, self.kernel_size, self.stride,
            self.padding, self.dilation, self.groups, self.weight_bits, self.group_size, POLICIES[self.policy],
            self.target_sqnr,
        )  # fmt: skip
        self._note(bits)
        return out if x.dim() == 4 else out[0]

    def config(self) -> dict:
        """What recreates the layer but its buffers, as plain values."""
        return {
            "in_channels": self.in_channels, "out_channels": self.out_channels, "kernel_size": self.kernel_size,
            "stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups,
            "bias": self.bias is not None, "weight_bits": self.weight_bits, "group_size": self.group_size,
            "policy": self.policy, "target_sqnr": self.target_sqnr,
        }  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={tuple(self.kernel_size)}, "
            f"stride={tuple(self.stride)}, padding={tuple(self.padding)}, dilation={tuple(self.dilation)}, "
            f"groups={self.groups}, {self._options()}"
        )


def _padding(conv: nn.Conv2d) -> list[int] | None:
    """Padding as numbers, or None where "same" is lopsided."""
    if conv.padding == "valid":
        return [0, 0]
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else [t // 2 for t in total]
    return list(conv.padding)


def count_bits(model: nn.Module, enabled: bool = True) -> dict[int, int]:
    """The rows of all quantised layers that took each width so far; from now on they are counted, or not.

    Counting reads the widths of each call, some microseconds a layer; it is off at first.
    """
    total = dict.fromkeys((0, *_WIDTHS), 0)
    for module in model.modules():
        if isinstance(module, _Quantized):
            module.counting = enabled
            for width, rows in module.bits_chosen().items():
                total[width] += rows
    return total
