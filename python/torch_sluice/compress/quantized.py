"""A weight that was packed once into integers and is still the parameter of its layer: what it holds and answers.

What calls of torch make of it is in served.py, formulas and layouts are in ops/sluice/quantize.h.
"""

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_sluice.quantize import (
    DEFAULT_OUTLIER_RATIO,
    DEFAULT_TARGET_SQNR,
    pack_conv2d_weight,
    pack_linear_weight,
)

POLICIES = {"sqnr": 0, "amax": -1}  # SL_BITS_BY_SQNR, SL_BITS_BY_AMAX
KINDS = ("linear", "transposed", "conv2d", "rows")
WIDTHS = (0, 4, 7, 8, 16)  # that the rows of an input can take; 0: those with inf or NaN
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that a weight can stand for


def check_options(policy: str, weight_bits: int, group_size: int, target_sqnr: float) -> None:
    """Raises ValueError for options of quantised weights that are not allowed."""
    if policy not in POLICIES:
        raise ValueError(f"quantize_policy is {policy!r}, expected 'sqnr' or 'amax'")
    if isinstance(weight_bits, bool) or weight_bits not in (4, 8):
        raise ValueError(f"weight_bits is {weight_bits!r}, expected 8 or 4")
    if (
        isinstance(group_size, bool)
        or not isinstance(group_size, numbers.Integral)
        or group_size < 0
        or group_size % 32
    ):
        raise ValueError(f"group_size is {group_size!r}, expected a multiple of 32, or 0 for one scale a channel")
    if isinstance(target_sqnr, bool) or not isinstance(target_sqnr, numbers.Real) or not 0 <= target_sqnr <= 200:
        raise ValueError(f"target_sqnr is {target_sqnr!r}, expected 0 to 200 dB")


class Options(NamedTuple):
    """What a packed weight is, in plain values.

    ``kind`` says who reads it, and so its layout:
        "linear"      [out_features, in_features]: a linear layer, and the lookup of an embedding tied to it
        "transposed"  [in_features, out_features]: transformers' Conv1D, and ``x @ w``; packed as the above
        "conv2d"      [out_channels, channels / groups, height, width]
        "rows"        [num_embeddings, embedding_dim]: a lookup only; int8 rows, one scale each
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # that it stands for: of unpack() and of rows that are looked up
    weight_bits: int = 8
    group_size: int = 0
    groups: int = 1  # of the convolution
    policy: str = "sqnr"
    target_sqnr: float = DEFAULT_TARGET_SQNR
    outlier_ratio: float = DEFAULT_OUTLIER_RATIO  # of linear products

    def check(self) -> None:
        """Raises ValueError for what no weight has."""
        check_options(self.policy, self.weight_bits, self.group_size, self.target_sqnr)
        rank = 4 if self.kind == "conv2d" else 2
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}, expected one of {', '.join(map(repr, KINDS))}")
        if len(self.shape) != rank or any(type(size) is not int or size < 0 for size in self.shape):
            raise ValueError(f"shape is {self.shape!r}, expected {rank} sizes for kind {self.kind!r}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype}, expected float32, bfloat16, float16 or float64")
        if type(self.groups) is not int or self.groups < 1 or self.shape[0] % self.groups:
            raise ValueError(f"groups is {self.groups!r}, expected a divisor of {self.shape[0]} channels")
        if self.kind != "conv2d" and self.groups != 1:
            raise ValueError(f"groups is {self.groups}, expected 1 for kind {self.kind!r}")
        if not isinstance(self.outlier_ratio, (int, float)) or not 0 <= self.outlier_ratio < float("inf"):
            raise ValueError(f"outlier_ratio is {self.outlier_ratio!r}, expected a number of at least 0")
        if self.kind == "rows" and (self.weight_bits, self.group_size) != (8, 0):
            raise ValueError(
                f"weight_bits and group_size are {self.weight_bits} and {self.group_size}, expected 8 and 0 for rows"
            )

    def matrix(self) -> tuple[int, int]:
        """Outputs, and inputs of each."""
        outputs, inputs = self.shape[0], self.shape[1]
        if self.kind == "transposed":
            return inputs, outputs
        if self.kind == "conv2d":
            inputs = self.shape[1] * self.shape[2] * self.shape[3]
        return outputs, inputs

    def packed_shapes(self) -> tuple[tuple[torch.dtype, tuple[int, ...]], tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of ``packed`` and of ``scale``."""
        from torch_sluice.quantize.operators import packed_sizes

        outputs, inputs = self.matrix()
        if self.kind == "rows":
            return (torch.int8, (outputs, inputs)), (torch.float32, (outputs, 1))
        size, scales = packed_sizes(outputs, inputs, self.weight_bits, self.group_size, self.groups)
        return (torch.uint8, (size,)), (torch.float32, tuple(int(number) for number in scales))


class QuantizedWeight(Tensor):
    """A weight in integers that answers as the floating-point tensor it stands for.

    ``F.linear``, ``F.conv2d``, ``F.embedding``, ``torch.addmm`` and ``x @ weight`` are served by integer kernels
    without unpacking; every other function gets ``unpack()``, an ordinary tensor made anew at each call. It is for
    inference: it has no gradient, and writing to it but by ``copy_`` raises RuntimeError.

    Args:
        packed, scale: as :meth:`Options.packed_shapes` says.
        options: see :class:`Options`.
    """

    packed: Tensor
    scale: Tensor
    options: Options

    @staticmethod
    def __new__(cls, packed: Tensor, scale: Tensor, options: Options):
        return Tensor._make_wrapper_subclass(
            cls, options.shape, dtype=options.dtype, device=packed.device, requires_grad=False
        )

    def __init__(self, packed: Tensor, scale: Tensor, options: Options):
        self.packed, self.scale = packed, scale
        self._set_options(options)
        self.counting = False  # whether calls count the widths of their rows; count_bits() switches it
        self.counts = dict.fromkeys(WIDTHS, 0)

    def _set_options(self, options: Options) -> None:
        self.options, self.kind = options, options.kind
        numbers = (options.weight_bits, options.group_size, POLICIES[options.policy], float(options.target_sqnr))
        # What the operators take behind their tensors, since making it at each call would take longer than the call.
        if options.kind == "conv2d":
            self.arguments = (options.groups, *numbers)
            self.columns, self.geometry = (options.shape[1] * options.groups,), (options.shape[0], options.shape[2:])
        else:
            outputs, inputs = options.matrix()
            self.arguments = (outputs, *numbers, True, float(options.outlier_ratio))
            self.columns = (inputs,)  # the size of the dimension of an input that is summed over

    @classmethod
    def from_float(cls, weight: Tensor, kind: str = "linear", *, groups: int = 1, **options) -> "QuantizedWeight":
        """Packs a finite weight on the CPU; ``options`` are those fields of :class:`Options` that choose.

        Raises:
            ValueError: an option is not allowed, or the weight is not finite or on another device.
        """
        chosen = Options(kind, tuple(weight.shape), weight.dtype, groups=groups, **options)
        chosen.check()
        return cls(*pack(weight, chosen), chosen)

    def unpack(self) -> Tensor:
        """The weight that the integers stand for, an ordinary tensor of this dtype and shape."""
        return unpack(self.packed, self.scale, self.options)

    def set_target_sqnr(self, decibels: float) -> None:
        """Changes the signal-to-noise ratio by which inputs take their widths."""
        options = self.options._replace(target_sqnr=float(decibels))
        options.check()
        self._set_options(options)

    @property
    def nbytes(self) -> int:
        """Of memory: integers and scales."""
        return self.packed.nbytes + self.scale.nbytes

    def __tensor_flatten__(self):
        return ["packed", "scale"], self.options

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], options: Options, outer_size, outer_stride):
        served.refuse_onnx()
        return QuantizedWeight(parts["packed"], parts["scale"], options)

    def _stable_hash_for_caching(self) -> str:
        """For the cache of torch.compile, which outlives a version of this package: all that a graph depends on."""
        return repr((tuple(self.options), tuple(self.packed.shape), tuple(self.scale.shape)))

    def __repr__(self, *, tensor_contents=None) -> str:
        o = self.options
        return (
            f"QuantizedWeight({list(o.shape)}, {o.dtype}, kind={o.kind!r}, weight_bits={o.weight_bits}, "
            f"group_size={o.group_size}, policy={o.policy!r}, target_sqnr={o.target_sqnr:g})"
        )

    def twin(self) -> "QuantizedWeight":
        """The same numbers in the same memory, which nothing may write to, with options of its own."""
        return QuantizedWeight(self.packed, self.scale, self.options)

    def __deepcopy__(self, memo: dict) -> "QuantizedWeight":
        if id(self) in memo:
            return memo[id(self)]
        twin = QuantizedWeight(self.packed.clone(), self.scale.clone(), self.options)
        memo[id(self)] = twin = nn.Parameter(twin, requires_grad=False) if isinstance(self, nn.Parameter) else twin
        return twin

    def __reduce_ex__(self, protocol):
        return rebuild, (self.packed, self.scale, tuple(self.options), isinstance(self, nn.Parameter))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        serve = _SERVED.get(func)
        if serve is None:
            return served.call(func, args, {} if kwargs is None else kwargs)
        return serve(*args) if kwargs is None else serve(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return served.dispatch(func, args, {} if kwargs is None else kwargs)


def pack(weight: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """``packed`` and ``scale`` of a weight in floating point."""
    if weight.device.type != "cpu":
        raise ValueError(f"weight is on {weight.device}, expected cpu: the integer kernels are for the CPU")
    weight = weight.detach()
    if weight.dtype == torch.float64:
        weight = weight.float()
    if options.kind == "rows":
        return _pack_rows(weight.float())
    if options.kind == "conv2d":
        return pack_conv2d_weight(weight, options.weight_bits, options.group_size, options.groups)
    matrix = weight.t().contiguous() if options.kind == "transposed" else weight
    return pack_linear_weight(matrix, options.weight_bits, options.group_size)


def _pack_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """w becomes round(w / scale) with scale = max |w| of the row / 127."""
    if not weight.isfinite().all():
        raise ValueError("weight has NaN or infinity, expected finite values")
    scale = weight.abs().amax(1, keepdim=True) / 127 if weight.shape[1] else weight.new_zeros(weight.shape[0], 1)
    units = scale.clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / units).round_().clamp_(-127, 127).to(torch.int8), scale


def unpack(packed: Tensor, scale: Tensor, options: Options) -> Tensor:
    """The floating-point weight, of operators of torch and sluice only, so that it can be traced."""
    if options.kind == "rows":
        return (packed * scale).to(options.dtype)
    outputs, inputs = options.matrix()
    padded = scale.shape[1]  # with the empty outputs that fill up the last panel of each group
    rows = outputs if options.groups == 1 else padded
    values = torch.ops.sluice.unpack_linear_weight.default(
        packed, scale, rows, inputs, options.weight_bits, options.group_size
    )
    if options.kind == "conv2d":
        channels, height, width = options.shape[1:]
        if options.groups > 1:
            each = outputs // options.groups
            values = values.view(options.groups, padded // options.groups, inputs)[:, :each].reshape(outputs, inputs)
        values = values.view(outputs, height, width, channels).permute(0, 3, 1, 2).contiguous()
    elif options.kind == "transposed":
        values = values.t().contiguous()
    return values.to(options.dtype)


def check_parts(packed: Any, scale: Any, options: Options) -> None:
    """Raises ValueError unless they are the parts of a weight with these options."""
    options.check()
    for name, part, (dtype, shape) in zip(("packed", "scale"), (packed, scale), options.packed_shapes(), strict=True):
        if not isinstance(part, Tensor) or part.dtype != dtype or tuple(part.shape) != shape:
            found = f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"{name} is {found}, expected {dtype} {list(shape)} for a weight {list(options.shape)}")


def rebuild(packed: Tensor, scale: Tensor, values: tuple, is_parameter: bool) -> QuantizedWeight:
    """What pickles and ``torch.load`` call, also with ``weights_only=True``."""
    options = Options(*values)
    options = options._replace(shape=tuple(options.shape))
    check_parts(packed, scale, options)
    weight = QuantizedWeight(packed, scale, options)
    return nn.Parameter(weight, requires_grad=False) if is_parameter else weight


torch.serialization.add_safe_globals([rebuild, QuantizedWeight])

from torch_sluice.compress import served  # noqa: E402  it needs the class

_SERVED = served.FUNCTIONS
