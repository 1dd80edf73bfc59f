"""The file that says which algorithm serves which size on this machine: written by ``torch-sluice tune-comm``.

It has an entry for every kind of machine that it was measured on, so that machines may share a home folder::

    {"AMD EPYC 7763, 8 processors": {"2": {"flat": 65536, "piece": 1048576, "direct": null, ...}, "4": {...}}}

The number is that of a group's ranks on one host. The five sizes, in bytes, are those of ``sl_comm_tuning`` in
``ops/sluice/comm.h``; ``null`` stands for "at no size".
"""

import ctypes
import json
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch_sluice._library import library_path
from torch_sluice.info import processor_name

_VARIABLE = "SLUICE_COMM_TUNING"
_LARGEST_GROUP = 1024
NEVER = (1 << 64) - 1  # SIZE_MAX


@dataclass(frozen=True)
class Tuning:
    """``sl_comm_tuning``, in bytes."""

    flat: int
    piece: int
    direct: int
    direct_send: int
    streaming: int
    buffer_streaming: int

    def as_json(self) -> dict:
        return {name: None if size == NEVER else size for name, size in asdict(self).items()}


class _Sizes(ctypes.Structure):
    _fields_ = [(field.name, ctypes.c_size_t) for field in fields(Tuning)]


def default_tuning(ranks: int) -> Tuning:
    """What the C core uses for a group of so many ranks on this machine if it isn't told."""
    sizes = _Sizes()
    ctypes.CDLL(library_path()).sl_comm_default_tuning(ranks, ctypes.byref(sizes))
    return Tuning(*(getattr(sizes, field.name) for field in fields(Tuning)))


def machine_name() -> str:
    """What the entry of this machine is called."""
    return f"{processor_name()}, {len(os.sched_getaffinity(0))} processors"


def tuning_path() -> Path | None:
    """Where the file is, or would be: ``SLUICE_COMM_TUNING`` if set (``off``: none), else the user's configuration."""
    named = os.environ.get(_VARIABLE)
    if named:
        return None if named == "off" else Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "torch_sluice" / "comm.json"


def load_tunings(path: Path | None) -> dict[int, Tuning]:
    """Those of this machine, by number of ranks; empty where there is no file.

    Raises:
        ValueError: the file is not what ``tune-comm`` writes.
    """
    if path is None or not path.is_file():
        return {}
    try:
        entry = json.loads(path.read_text()).get(machine_name(), {})
        return {_check_ranks(ranks): _parse(sizes) for ranks, sizes in entry.items()}
    except (OSError, ValueError, AttributeError, TypeError) as problem:
        raise ValueError(
            f"{path} is not a file of 'torch-sluice tune-comm' ({problem}): run that again, remove the file, or set "
            f"{_VARIABLE}=off"
        ) from problem


def _check_ranks(text: str) -> int:
    ranks = int(text)
    if not 1 <= ranks <= _LARGEST_GROUP:
        raise ValueError(f"there is an entry for {ranks} ranks, expected 1 to {_LARGEST_GROUP}")
    return ranks


def _parse(sizes: dict) -> Tuning:
    names = [field.name for field in fields(Tuning)]
    if sorted(sizes) != sorted(names):
        raise ValueError(f"an entry has {', '.join(sorted(sizes))}, expected {', '.join(names)}")
    for name, size in sizes.items():
        if size is not None and (type(size) is not int or not 0 <= size <= NEVER):
            raise ValueError(f"{name} is {size!r}, expected a number of bytes or null")
    return Tuning(**{name: NEVER if size is None else size for name, size in sizes.items()})


def save_tunings(path: Path, tunings: dict[int, Tuning]) -> None:
    """Adds them to the file, in place of what it had for these numbers of ranks on this machine, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        content = {}  # whoever measures again wants it replaced
    content = content if isinstance(content, dict) else {}
    entry = content.get(machine_name())
    entry = dict(entry) if isinstance(entry, dict) else {}
    entry.update({str(ranks): tuning.as_json() for ranks, tuning in tunings.items()})
    content[machine_name()] = entry
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    os.replace(file.name, path)


def apply_tunings(library) -> None:
    """Tells the backend what this machine's file says. A file that can't be used is warned of, and changes nothing."""
    try:
        for ranks, tuning in load_tunings(tuning_path()).items():
            set_tuning(library, ranks, tuning)
    except ValueError as problem:
        warnings.warn(f"process groups use the default sizes: {problem}", stacklevel=2)


def set_tuning(library, ranks: int, tuning: Tuning) -> None:
    """For groups of so many ranks on a host, made from now on; of the ranks, it is the first one's that counts."""
    library.sluice_c10d_set_tuning(ranks, *(getattr(tuning, field.name) for field in fields(Tuning)))
