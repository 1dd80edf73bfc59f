"""Text as bytes: finds files, splits them into training and held-out text, and draws batches.

A batch is a pure function of (seed, step, micro-batch), so that a resumed run sees the same text.
"""

import hashlib
import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from torch_sluice.train.errors import TrainError
from torch_sluice.train.folder import RunFiles
from torch_sluice.train.settings import Settings

# Folders of the standard library that are tables, tests or other people's packages rather than source to learn from.
_SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
_SEPARATOR = b"\0"  # between two files


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text.

    Attributes:
        name: where the text came from, for people.
        train, heldout: uint8 arrays, files joined by a zero byte.
        train_files, heldout_files: how many files each holds.
        skipped_files: files of a folder that are not UTF-8 text or are empty; copies of another file count as well.
        fingerprint: sha256 of both parts; a resumed run compares it.
    """

    name: str
    train: np.ndarray
    heldout: np.ndarray
    train_files: int
    heldout_files: int
    skipped_files: int
    fingerprint: str

    def batch(self, seed: int, step: int, micro: int, size: int, context: int) -> torch.Tensor:
        """int64 [size, context + 1]: text to read and, shifted by one, to predict."""
        generator = np.random.default_rng([seed, step, micro])
        starts = generator.integers(0, len(self.train) - context, size=size)
        return _windows(self.train, starts, context)

    def step_batches(self, settings: Settings, step: int) -> list[torch.Tensor]:
        """The micro-batches of a step of a run with these settings, int64 [micro_size, context + 1] each."""
        return [
            self.batch(settings.seed, step, micro, settings.micro_size, settings.context)
            for micro in range(settings.micro_batches)
        ]

    def check_fingerprint(self, fingerprint: str) -> None:
        """Raises TrainError unless this is the text that had the fingerprint."""
        if fingerprint != self.fingerprint:
            raise TrainError(f"the text in {self.name} is not what this run was trained on; restore it, or train anew")

    def heldout_windows(self, count: int, context: int) -> torch.Tensor:
        """int64 [at most count, context + 1], spread evenly over the held-out text, not overlapping."""
        room = (len(self.heldout) - 1) // context
        count = min(count, room)
        starts = np.linspace(0, room - 1, count).round().astype(np.int64) * context
        return _windows(self.heldout, starts, context)


def _windows(text: np.ndarray, starts: np.ndarray, context: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([text[s : s + context + 1] for s in starts]).astype(np.int64))


def load_corpus(path: str | None, context: int, out: Path | None = None) -> Corpus:
    """Reads the text of a folder or a file; None: the standard library of this Python.

    Args:
        out: the folder of the run; its files, and those of other runs, are no text of ``path``.

    Of several files, those whose path hashes into the first eighth are held out; of a single file, its last eighth. Of
    files with the same text one counts, so that nothing that is held out is also trained on.

    Raises:
        TrainError: the path does not exist, is unreadable, not UTF-8, empty, or too short for the context.
    """
    root = Path(path) if path is not None else Path(sysconfig.get_paths()["stdlib"])
    if not root.exists():
        raise TrainError(f"--data is '{root}', and there is no such file or folder")
    if not root.is_dir() and not root.is_file():  # a pipe or a device may never end
        raise TrainError(f"--data is '{root}', which is neither a file nor a folder")
    if root.is_dir():
        texts, skipped = _read_folder(root, RunFiles(root, out), only_source=path is None)
    else:
        texts, skipped = {root.name: _read_file(root)}, 0
    train, heldout, counts = _split(texts)
    shortest = context + 2
    if len(train) < shortest or len(heldout) < shortest:
        raise TrainError(
            f"--data is '{root}' with {len(train)} bytes to train on and {len(heldout)} held out; a context of "
            f"{context} needs at least {shortest} of each: give more text, or a smaller --context"
        )
    digest = hashlib.sha256(train)
    digest.update(heldout)
    return Corpus(
        name=f"the standard library of Python {platform.python_version()}" if path is None else _readable(root),
        train=np.frombuffer(train, np.uint8),
        heldout=np.frombuffer(heldout, np.uint8),
        train_files=counts[0],
        heldout_files=counts[1],
        skipped_files=skipped,
        fingerprint=digest.hexdigest(),
    )


def _readable(path: Path) -> str:
    return os.fsencode(path).decode("utf-8", "replace")


def _read_file(path: Path) -> bytes:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise TrainError(f"--data is '{path}', which cannot be read: {error.strerror}") from error
    if not text.strip():
        raise TrainError(f"--data is '{path}', which is empty; give a text file or a folder of them")
    if (position := _first_bad_byte(text)) is not None:
        raise TrainError(f"--data is '{path}', which is not UTF-8 text (byte {position} is the first that is not)")
    return text


def _first_bad_byte(text: bytes) -> int | None:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    zero = text.find(b"\0")
    return zero if zero >= 0 else None


def _read_folder(root: Path, run_files: RunFiles, only_source: bool) -> tuple[dict[str, bytes], int]:
    texts, skipped, seen = {}, 0, set()
    for path in sorted(root.rglob("*.py" if only_source else "*")):
        relative = path.relative_to(root)
        if only_source and _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        if run_files.hold(path):
            continue
        try:
            text = path.read_bytes()
        except OSError:
            skipped += 1
            continue
        if not text.strip() or _first_bad_byte(text) is not None or text in seen:
            skipped += 1
        else:
            texts[relative.as_posix()] = text
            seen.add(text)
    if not texts:
        raise TrainError(f"--data is '{root}', a folder with no UTF-8 text file in it ({skipped} files passed over)")
    return texts, skipped


def _split(texts: dict[str, bytes]) -> tuple[bytes, bytes, tuple[int, int]]:
    if len(texts) == 1:
        (text,) = texts.values()
        cut = len(text) - len(text) // 8
        return text[:cut], text[cut:], (1, 1)
    # By hash and not by order, so that no topic is held out whole; one file at least on each side.
    order = sorted(texts, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    count = max(1, len(order) // 8)
    heldout, train = order[:count], order[count:]
    return (
        _SEPARATOR.join(texts[name] for name in sorted(train)),
        _SEPARATOR.join(texts[name] for name in sorted(heldout)),
        (len(train), len(heldout)),
    )
