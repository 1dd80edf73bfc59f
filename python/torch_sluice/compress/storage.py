"""Saves a compressed model, and loads it into a fresh one: tensors and plain values, no code.

FILE  an archive of ``torch.save`` that ``torch.load(weights_only=True)`` reads: {"format": "torch-sluice compressed",
"version": 1, "changes": see changes.py, "state": the state_dict, "report": figures}. It is written beside the target,
flushed to the disk and then renamed, so that the old file is whole until the new one is.
"""

import copy
import dataclasses
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_sluice.compress.changes import make_changes

_FORMAT, _VERSION = "torch-sluice compressed", 1


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Saves a model that ``torch_sluice.compress`` returned; training it further before is fine.

    Raises:
        ValueError: the model was not compressed.
        OSError: it cannot be written, as on a full disk; a file that was there is as before.
    """
    report = getattr(model, "compression_report", None)
    if report is None:
        raise ValueError(
            f"model is a {type(model).__name__} without a compression_report, expected what torch_sluice.compress() "
            "returned; save other models by torch.save(model.state_dict(), path)"
        )
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "changes": report.changes,
        "report": report.as_dict(),
        "state": dict(model.state_dict()),
    }
    _write(Path(path), content)


def _write(path: Path, content: dict[str, Any]) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, _Checked(file))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


class _Checked:
    """A file whose failed writes stay OSErrors: torch's writer would report them as its own."""

    def __init__(self, file):
        self._file = file

    def write(self, data) -> int:
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


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
        ValueError: the file is cut off, or something else; or it belongs to another model.
    """
    from torch_sluice.compress.report import CompressionReport, LayerDecision

    content = _read(Path(path))
    fresh = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
    if not isinstance(fresh, nn.Module):
        raise TypeError(f"model gave a {type(fresh).__name__}, expected an nn.Module or a callable that makes one")
    try:
        make_changes(fresh, content["changes"])
        fresh.load_state_dict(content["state"])
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} does not belong to this model ({type(fresh).__name__}): {error}. Give the model that was "
            "compressed, as it was before"
        ) from error
    try:
        layers = [_known_fields(LayerDecision, layer) for layer in content["report"]["layers"]]
        known = {**content["report"], "layers": layers, "changes": content["changes"]}
        fresh.compression_report = _known_fields(CompressionReport, known)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} has a report that cannot be read ({error}): save the model again") from error
    return fresh.eval()


def _known_fields(kind: type, values: dict[str, Any]):
    """Reports gain and lose figures from version to version, which must not keep a model from being loaded."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file, expected what torch_sluice.compress.save() wrote")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError, UnicodeDecodeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise ValueError(
            f"{path} cannot be read ({reason}): it is cut off, or no file of "
            "torch_sluice.compress.save(). Save the model again"
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is no file of torch_sluice.compress.save(): load it the way it was saved")
    if content.get("version") != _VERSION:
        raise ValueError(f"{path} has version {content.get('version')}, expected {_VERSION}: update torch-sluice")
    return content
