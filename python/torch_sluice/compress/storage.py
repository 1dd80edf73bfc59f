"""Saves a compressed model, and loads it into a fresh one: tensors and plain values, no code.

The file's format is in container.py. It is written beside the target, flushed to the disk and then renamed, so that the
old file is whole until the new one is.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torch_sluice.compress import container
from torch_sluice.compress.calling import copy_model
from torch_sluice.compress.changes import (
    PARTS,
    find_weights,
    make_changes,
    put_transients,
    put_weights,
    transient_names,
)
from torch_sluice.compress.quantized import QuantizedWeight

# What a structure that does not fit a model, or that was made up, may lead to. Each becomes a ValueError with a reason.
_MISFITS = (ValueError, RuntimeError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Saves a model that ``torch_sluice.compress`` returned; training it further before is fine.

    What ``torch.compile`` made of such a model is saved as the model that it wraps. The file is made in memory first.

    Raises:
        ValueError: the model was not compressed, or holds what is neither a tensor nor a plain value.
        OSError: it cannot be written, as on a full disk; a file that was there is as before.
    """
    model = _unwrapped(model)
    report = getattr(model, "compression_report", None)
    if report is None:
        raise ValueError(
            f"model is a {type(model).__name__} without a compression_report, expected what torch_sluice.compress() "
            "returned; save other models by torch.save(model.state_dict(), path)"
        )
    weights = find_weights(model)
    for weight in weights:
        weight.places = [_plain_name(place) for place in weight.places]
    tensors, aliases, extra = _flatten(model)
    buffers = {_plain_name(name): tensor for name, tensor in model.named_buffers(remove_duplicate=False)}
    tensors.update({name: buffers[name] for name in transient_names(report.changes) if name in buffers})
    structure = {
        "changes": {**report.changes, "weights": [weight.as_plain() for weight in weights]},
        "report": report.as_dict(),
        "aliases": aliases,
        "extra": extra,
    }
    _write(Path(path), container.encode(tensors, structure))


def _unwrapped(model: nn.Module) -> nn.Module:
    """What torch.compile wrapped, else the model."""
    inner = model._modules.get("_orig_mod") if isinstance(model, nn.Module) else None
    return model if inner is None else _unwrapped(inner)


def _plain_name(name: str) -> str:
    """The name of a tensor as it is without torch.compile round modules within the model."""
    return name.replace("_orig_mod.", "")


def _flatten(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Plain tensors by name, each memory once; the names of those that share it; and state that is no tensor."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    extra: dict[str, Any] = {}
    seen: dict[tuple, str] = {}
    for key, value in model.state_dict().items():
        name = _plain_name(key)
        if not isinstance(value, Tensor):
            extra[name] = _checked_extra(name, value)
            continue
        packed = isinstance(value, QuantizedWeight)
        memory = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), packed)
        if value.numel() and memory in seen:
            aliases[name] = seen[memory]
            continue
        seen[memory] = name
        if packed:
            tensors.update({f"{name}.{part}": getattr(value, part) for part in PARTS})
        else:
            tensors[name] = value
    return tensors, aliases, extra


def _checked_extra(name: str, value: Any) -> Any:
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"model's state_dict has a {type(value).__name__} at {name!r}, expected tensors and plain values: {error}"
        ) from None
    return value


def _write(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: str | os.PathLike, model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """The compressed model of a file.

    Args:
        path: what ``save`` wrote. It holds tensors and plain values; no code of it is run.
        model: the uncompressed model, or a callable that makes it; its weights do not matter, its structure does. A
            module that is given stays as it is: a copy is changed.

    Returns:
        The model in eval mode, with a ``compression_report`` as ``compress`` gave it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, cut off, of another version, or something else; or it belongs to another model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file, expected what torch_sluice.compress.save() wrote")
    content = container.Container(path)
    fresh = copy_model(model) if isinstance(model, nn.Module) else model()
    if not isinstance(fresh, nn.Module):
        raise TypeError(f"model gave a {type(fresh).__name__}, expected an nn.Module or a callable that makes one")
    structure = content.structure
    try:
        weights = make_changes(fresh, structure["changes"], content.shapes)
        tensors = content.read_tensors()
        state: dict[str, Any] = dict(put_weights(fresh, weights, tensors))
        put_transients(fresh, structure["changes"], tensors)
        state.update(tensors)
        state.update({name: state[source] for name, source in structure["aliases"].items()})
        fresh.load_state_dict({**state, **structure["extra"]})
    except _MISFITS as error:
        raise ValueError(
            f"{path} does not belong to this model ({type(fresh).__name__}): {error}. Give the model that was "
            "compressed, as it was before"
        ) from error
    fresh.compression_report = _make_report(path, structure)
    return fresh.eval()


def _make_report(path: Path, structure: dict[str, Any]):
    from torch_sluice.compress.report import CompressionReport, LayerDecision

    try:
        layers = [_known_fields(LayerDecision, layer) for layer in structure["report"]["layers"]]
        known = {**structure["report"], "layers": layers, "changes": structure["changes"]}
        return _known_fields(CompressionReport, known)
    except _MISFITS as error:
        raise ValueError(f"{path} has a report that cannot be read ({error}): save the model again") from error


def _known_fields(kind: type, values: dict[str, Any]):
    """Reports gain and lose figures from version to version, which must not keep a model from being loaded."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})
