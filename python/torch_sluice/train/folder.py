"""The folder of a run: made, locked while a run is at work in it, and told apart from the text that runs read."""

import contextlib
import fcntl
import os
import re
import tempfile
from pathlib import Path

from torch_sluice.train.errors import TrainError

# What runs leave in their folders, on a mesh or not; temporary names are theirs with an ending.
_NAMES = ("checkpoint.pt", "steps.jsonl", "metrics.jsonl", "results.json", "report.html", "checkpoints", "tensorboard")
_STEP_LINE = re.compile(rb'\{"step": \d+, ("time": [\d.]+, "monitor"|"loss"): ')


def make_folder(folder: Path) -> None:
    """Makes the folder of a run; TrainError where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise TrainError(f"--out is '{folder}', where nothing can be written: {error.strerror or error}") from error


class FolderLock:
    """Held by a run from its start to its report; ends with ``close`` or with the process, however that ends.

    It is the folder itself that is locked, so that nothing is left behind in it.

    Args:
        option: what named the folder, for the message.

    Raises:
        TrainError: another run, of this process or another, holds it.
    """

    def __init__(self, folder: Path, option: str = "--out"):
        try:
            self._file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise TrainError(f"{option} is '{folder}', which cannot be read: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise TrainError(
                f"{option} is '{folder}', where another run is at work: wait for its end, or choose another --out"
            ) from error
        except OSError:
            pass  # a file system without locks

    def close(self) -> None:
        """Does nothing the second time."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class RunFiles:
    """Which files below ``root`` are a run's and no text: all of ``out``, and in other folders what runs left there.

    Of an ``out`` that is ``root`` itself, or holds it, only what runs write there is theirs.
    """

    def __init__(self, root: Path, out: Path | None):
        self._root, self._known = root, {}
        out = None if out is None else out.resolve()
        self._out = out if out is not None and root.resolve() in out.parents else None
        if out is not None and self._out is None:
            self._known[out] = True

    def hold(self, path: Path) -> bool:
        folder = path.parent.resolve()
        if self._out is not None and (folder == self._out or self._out in folder.parents):
            return True
        # "checkpoints" and "tensorboard" are folders: a file is theirs by the part of its path that lies below a run's.
        while True:
            name = path.name
            if any(name == own or name.startswith(own + ".") for own in _NAMES) and self._is_run(path.parent):
                return True
            if path.parent == self._root or path == path.parent:
                return False
            path = path.parent

    def _is_run(self, folder: Path) -> bool:
        folder = folder.resolve()
        if folder not in self._known:
            self._known[folder] = (folder / "checkpoint.pt").is_file() or any(
                _begins_with_step(folder / name) for name in ("steps.jsonl", "metrics.jsonl")
            )
        return self._known[folder]


def _begins_with_step(path: Path) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return _STEP_LINE.match(file.read(200)) is not None
    return False
