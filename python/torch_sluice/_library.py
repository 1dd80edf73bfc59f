"""Finds and loads the native operator library."""

import ctypes
import os
from pathlib import Path

import torch

_NAME = "libsluice_torch.so"


def _package_folders() -> list[Path]:
    # An editable install has two: the sources, and the folder of what was built.
    package = __import__(__package__)
    return [Path(folder) for folder in package.__path__]


def library_path() -> str:
    """Path of the operator library, for ``torch.ops.load_library`` in code that does not import this package.

    ``SLUICE_LIBRARY`` overrides it. Raises ``ImportError`` if there is no such file.
    """
    override = os.environ.get("SLUICE_LIBRARY")
    candidates = [Path(override)] if override else [folder / "lib" / _NAME for folder in _package_folders()]
    for path in candidates:
        if path.is_file():
            return str(path)
    raise ImportError(
        f"{'SLUICE_LIBRARY' if override else 'the installed package'} points to {candidates[-1]}, and there is no such "
        "file. Install the package with 'pip install .', or set SLUICE_LIBRARY to a built libsluice_torch.so."
    )


def load() -> None:
    """Registers ``torch.ops.sluice.*``; a second call does nothing."""
    torch.ops.load_library(library_path())


def version() -> str:
    """The version of the loaded library, which is that of the contract in ``ops/sluice/version.h``."""
    sl_version = ctypes.CDLL(library_path()).sl_version
    sl_version.restype = ctypes.c_char_p
    return sl_version().decode()
