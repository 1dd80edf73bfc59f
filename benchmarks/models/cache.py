"""Weights that were trained here, kept in the user's cache folder: written whole or not at all, checked when read."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "torch_sluice" / "models"


def train_once(name: str, recipe: str, train: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The state dict that ``train()`` returned when it ran for this recipe, now or earlier.

    Args:
        name: begins the file's name.
        recipe: all that decides the result: settings, seed, a fingerprint of the data. Another one trains anew.
        train: returns the state dict. What it raises passes through, and no file is left.

    A file that is damaged or was made by something else is replaced. A cache folder that cannot be written costs a
    training each time, and nothing else.
    """
    recipe = f"{recipe}, torch {torch.__version__}"
    path = cache_folder() / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.pt"
    state = _read(path, recipe)
    if state is None:
        state = train()
        with contextlib.suppress(OSError):
            _write(path, {"recipe": recipe, "state": state})
    return state


def _read(path: Path, recipe: str) -> dict[str, torch.Tensor] | None:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # absent, cut short, foreign: zipfile, pickle and torch raise a dozen kinds
        return None
    return content["state"] if isinstance(content, dict) and content.get("recipe") == recipe else None


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(prefix=path.name, suffix=".unfinished", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
