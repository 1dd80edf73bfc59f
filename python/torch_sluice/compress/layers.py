"""Quantises the weights of layers in place, gives them back, and counts the widths that inputs took."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from torch_sluice.compress.quantized import WIDTHS, QuantizedWeight


def quantize_layer(module: nn.Module, **options) -> nn.Module:
    """Packs the weight of a layer into integers, in place; the layer stays what it is.

    ::

        torch_sluice.compress.quantize_layer(model.head, weight_bits=4, group_size=32)

    Args:
        module: an ``nn.Linear``, ``nn.Conv2d`` or ``nn.Embedding``, or a subclass that uses ``weight`` as they do, or
            transformers' ``Conv1D``; on the CPU, its weight finite.
        weight_bits: 8, or 4 with ``group_size`` inputs that share a scale (a multiple of 32; 0: all).
        policy, target_sqnr: how many bits each row of inputs takes, as ``compress`` says.
        outlier_ratio: of linear layers, see ``torch_sluice.quantize.linear_dynamic``.

    Returns:
        The module. Its weight is a :class:`QuantizedWeight`, and no parameter of it requires a gradient. Another layer
        that shares the weight keeps the old one: ``compress`` quantises both together.

    Raises:
        TypeError: it is another kind of module.
        ValueError: an option is not allowed, or the weight cannot be quantised.
    """
    kind = _kind_of(module)
    weight = getattr(module, "weight", None)
    if kind is None or not isinstance(weight, Tensor):
        raise TypeError(
            f"module is a {type(module).__name__}, expected nn.Linear, nn.Conv2d, nn.Embedding, a subclass of them, or "
            "transformers' Conv1D"
        )
    if isinstance(weight, QuantizedWeight):
        raise ValueError("module has a quantised weight: unpack_weights(module) gives it its floating-point one back")
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        raise ValueError("module's weight is computed from others, as by a parametrisation, expected a parameter")
    if kind == "rows":
        if module.max_norm is not None:
            raise ValueError("module renormalises the rows of its table (max_norm), expected one that only reads it")
        options = {name: value for name, value in options.items() if name not in ("weight_bits", "group_size")}
    if kind == "conv2d":
        options = {"groups": module.groups, **options}
    put_weight(module, "weight", QuantizedWeight.from_float(weight, kind, **options))
    return module


def _kind_of(module: nn.Module) -> str | None:
    for kind, layer in (("linear", nn.Linear), ("conv2d", nn.Conv2d), ("rows", nn.Embedding)):
        if isinstance(module, layer):
            return kind
    return "transposed" if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else None


def put_weight(module: nn.Module, name: str, weight: Tensor) -> None:
    """Makes it the parameter of this name of a module whose parameters, where it is quantised, ask for no gradient."""
    quantized = isinstance(weight, QuantizedWeight)
    if not isinstance(weight, nn.Parameter):
        weight = nn.Parameter(weight, requires_grad=False)
    # By register_parameter's way, but in place: the order of parameters, and so that of the state_dict, stays.
    setattr(module, name, weight)
    if quantized:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, QuantizedWeight]]:
    """(name, weight) of a model, each weight once."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedWeight):
            yield name, parameter


def unpack_weights(model: nn.Module) -> nn.Module:
    """Gives a model ordinary weights again, in place: those that its integers stand for, tied ones still tied.

    It then runs in floating point wherever torch runs, can be exported to ONNX, traced and trained.
    """
    values: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, QuantizedWeight):
                if id(parameter) not in values:
                    values[id(parameter)] = nn.Parameter(parameter.unpack(), requires_grad=False)
                setattr(module, name, values[id(parameter)])
    return model


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, shared ones once, quantised ones as they are packed."""
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(sizes.values())


def forgo_fast_paths(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Has encoder layers of torch with a quantised weight call their parts, instead of one fused function in C++ that
    would get unpacked weights; their encoder makes nested tensors for that function, by a look at its first layer.

    Returns:
        (module, attribute, former value) of what it changed.
    """
    former = []
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            name, slow = "activation_relu_or_gelu", 0
        elif isinstance(module, nn.TransformerEncoder):
            name, slow = "use_nested_tensor", False
        else:
            continue
        if getattr(module, name, slow) != slow and any(True for _ in quantized_weights(module)):
            former.append((module, name, getattr(module, name)))
            setattr(module, name, slow)
    return former


def count_bits(model: nn.Module, enabled: bool = True) -> dict[int, int]:
    """The rows of all quantised layers (images of convolutions) that took each width so far; from now on they are
    counted, or not.

    Counting reads the widths of each call, some microseconds a layer; it is off at first.
    """
    total = dict.fromkeys(WIDTHS, 0)
    for _, weight in quantized_weights(model):
        for width, rows in weight.counts.items():
            total[width] += rows
        weight.counting = enabled
    return total
