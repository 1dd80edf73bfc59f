"""Finds and loads the native operator library."""

import os
from pathlib import Path

import torch

_NAME = "libsluice_torch.so"


def library_path() -> str:
    """Path of the operator library, for ``torch.ops.load_library`` in code that does not import this package.

    ``SLUICE_LIBRARY`` overrides it.
    """
    override = os.environ.get("SLUICE_LIBRARY")
    path = Path(override) if override else Path(__file__).parent / "lib" / _NAME
    if not path.is_file():
        source = "SLUICE_LIBRARY" if override else "the installed package"
        raise ImportError(
            f"{source} points to {path}, and there is no such file. "
            "Install the package with 'pip install .', or set SLUICE_LIBRARY to a built libsluice_torch.so."
        )
    return str(path)


def load() -> None:
    """Registers ``torch.ops.sluice.*``; a second call does nothing."""
    torch.ops.load_library(library_path())
