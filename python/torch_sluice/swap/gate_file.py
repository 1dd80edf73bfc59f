"""A file of gates alone: what training them has taught, to be put on the model that they were trained on.

FILE  a safetensors file. Its tensors are LAYER.PARAMETER of every gate, its metadata "format": "torch-sluice gates",
"version": "1", and "config": JSON of the arguments of ``swap_attention``. Nothing of it is code.
"""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

_FORMAT, _VERSION = "torch-sluice gates", "1"
_NUMBERS = ("tau", "opening", "window", "sinks")


def _safetensors():
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError(
            "files of gates are in the format of safetensors, which is not installed: pip install safetensors"
        ) from None
    return safetensors


def gates_of(model: nn.Module) -> dict[str, nn.Module]:
    """{name of a layer: its gate}"""
    suffix = ".sluice_gate"
    found = {}
    for name, module in model.named_modules():
        if name == suffix[1:] or name.endswith(suffix):
            found[name.removesuffix(suffix[1:]).rstrip(".")] = _in_use(module)
    return found


def _in_use(gate: nn.Module) -> nn.Module:
    """The gate itself where peft put a wrap of copies in its place (``modules_to_save``)."""
    copies, active = getattr(gate, "modules_to_save", None), getattr(gate, "active_adapters", None)
    return copies[active[0]] if copies and active and active[0] in copies else gate


def write(path: str | os.PathLike, gates: dict[str, nn.Module], config: dict[str, Any]) -> None:
    """Writes the file whole, or leaves what was there."""
    tensors = {
        f"{layer}.{name}" if layer else name: parameter.detach().cpu().contiguous().clone()
        for layer, gate in gates.items()
        for name, parameter in gate.named_parameters()
    }
    metadata = {"format": _FORMAT, "version": _VERSION, "config": json.dumps(config)}
    content = _safetensors().torch.save(tensors, metadata)
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: str | os.PathLike) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """{layer: {parameter: tensor}}, and the arguments of ``swap_attention``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no gates, is of another version, or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path is {str(path)!r}, expected a file that torch_sluice.save_gates wrote")
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
        raise ValueError(
            f"{path} has the format {metadata.get('format')!r}, version {metadata.get('version')!r}, expected "
            f"{_FORMAT!r}, version {_VERSION!r}: a file that torch_sluice.save_gates wrote"
        )
    try:
        config = json.loads(metadata["config"])
        numbers = {name: config[name] for name in _NUMBERS}
        density = config["target_density"]
        for name, value in (*numbers.items(), ("target_density", density)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name} is {value!r}, expected a number")
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: its config is {metadata.get('config')!r} ({error})") from error
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, parameter = name.rpartition(".")
        layers.setdefault(layer, {})[parameter] = tensor
    return layers, {**numbers, "target_density": density}


def put(gates: dict[str, nn.Module], layers: dict[str, dict[str, Tensor]], path: str | os.PathLike) -> None:
    """Copies the tensors into the gates: all of them, or none.

    Raises:
        ValueError: a layer or a parameter is missing on either side, or has another shape; it is named.
    """
    for name, ours, theirs in (("file", gates.keys(), layers.keys()), ("model", layers.keys(), gates.keys())):
        missing = sorted(ours - theirs)
        if missing:
            raise ValueError(f"{path}: the {name} has no gate for {', '.join(map(repr, missing))}, expected the same")
    copies = []
    for layer, gate in gates.items():
        parameters = dict(gate.named_parameters())
        if parameters.keys() != layers[layer].keys():
            raise ValueError(
                f"{path}: the gate of {layer!r} has {sorted(layers[layer])}, expected {sorted(parameters)}"
            )
        for name, parameter in parameters.items():
            tensor = layers[layer][name]
            if tensor.shape != parameter.shape or not tensor.is_floating_point():
                raise ValueError(
                    f"{path}: {name} of {layer!r} is {list(tensor.shape)}, {tensor.dtype}, expected "
                    f"{list(parameter.shape)} in floating point"
                )
            copies.append((parameter, tensor))
    for parameter, tensor in copies:
        parameter.data.copy_(tensor)
