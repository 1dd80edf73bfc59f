"""Checkpoints: written whole or not at all, and checked when read."""

import contextlib
import os
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch

from torch_sluice.train.errors import TrainError

NAME = "checkpoint.pt"
MESH_FOLDER = "checkpoints"  # of a run on a mesh: torch_sluice.train.mesh.checkpoint
_FORMAT = "torch-sluice train, version 1"


def save_checkpoint(folder: Path, state: dict) -> Path:
    """Replaces the folder's checkpoint in one step: a crash leaves the old one or the new one."""
    path = folder / NAME
    unfinished = folder / (NAME + ".unfinished")
    try:
        with open(unfinished, "wb") as file:
            write_tensors({"format": _FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise TrainError(f"cannot write the checkpoint {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    return path


def write_tensors(state: object, file: BinaryIO) -> None:
    """``torch.save``, but a write that fails raises its own OSError: torch raises a RuntimeError about its archive."""
    watched = _WatchedFile(file)
    try:
        torch.save(state, watched)
    except RuntimeError as error:
        if watched.problem is None:
            raise
        raise watched.problem from error


class _WatchedFile:
    """A file to write to, which remembers why it couldn't be written."""

    def __init__(self, file: BinaryIO):
        self._file, self.problem = file, None

    def write(self, data) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.problem = self.problem or error
            raise

    def flush(self) -> None:
        self._file.flush()


def load_checkpoint(folder: Path) -> dict:
    """The state of ``save_checkpoint``. Loads tensors and plain values only, never code.

    Raises:
        TrainError: there is none, it is cut short or damaged, or it was written by something else.
    """
    path = folder / NAME
    if not path.exists():
        raise TrainError(f"--resume is '{folder}', which holds no {NAME}; give the --out folder of an earlier run")
    try:
        file = path.open("rb")
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        with file:
            _check_sums(file)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch raise a dozen kinds for a file that is not what it should be
        raise TrainError(f"{path} is damaged or is not a checkpoint; train anew with another --out") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise TrainError(
            f"{path} is not a checkpoint of 'torch-sluice train' (this version writes '{_FORMAT}'); train anew with "
            "another --out"
        )
    return state


def _check_sums(file) -> None:
    """A changed byte within a tensor would load silently: torch.load does not look at the archive's CRCs. And of a
    member whose attributes say that it is a folder it reads nothing, and leaves the tensor's memory as it was."""
    with zipfile.ZipFile(file) as archive:
        damaged = [member.filename for member in archive.infolist() if member.external_attr] or archive.testzip()
    if damaged:
        raise ValueError(f"{damaged} in the archive is damaged")
    file.seek(0)


def peek_steps(folder: Path) -> tuple[int, int] | None:
    """(steps done, steps wanted) of the run in a folder, on a mesh or not; None where there is none.

    Raises:
        TrainError: there is one, and it cannot be read.
    """
    if (folder / MESH_FOLDER).is_dir():
        from torch_sluice.train.mesh.checkpoint import newest_checkpoint, read_state

        if newest_checkpoint(folder) is None:
            return None
        _, state = read_state(folder)
    elif (folder / NAME).exists():
        state = load_checkpoint(folder)
    else:
        return None
    try:
        return int(state["step"]), int(state["settings"]["steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise TrainError(f"{folder / NAME} does not say how far its run is; train anew with another --out") from error
