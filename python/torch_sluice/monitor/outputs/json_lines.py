"""JSON lines: one object for each step, in the file when the step has ended, and never half of one."""

import contextlib
import json
import math
import os
import stat
import time
from pathlib import Path


class JsonLines:
    """Appends to a file. Each line is written by one call, so a process that is killed leaves whole lines.

    A line has ``step``, ``time`` (seconds since 1970), ``monitor`` (its name) and the figures. A number that is not
    finite, which JSON does not have, is null.

    A file that already has lines is continued. What stands after its last line end, the rest of a line from a machine
    that failed, is removed.
    """

    def __init__(self, path: str | os.PathLike, name: str):
        self._name = name
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._regular = stat.S_ISREG(os.fstat(self._file).st_mode)
        if self._regular:
            _remove_unfinished_line(self._file)

    def write(self, step: int, figures: dict[str, float]) -> None:
        values = {name: _finite(value) for name, value in figures.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), "monitor": self._name, **values})
        data = line.encode() + b"\n"
        written = os.write(self._file, data)
        if written < len(data):
            if self._regular:  # the disk is full: rather no line than half of one
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(28, "No space left on device")

    def close(self) -> None:
        os.close(self._file)


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _remove_unfinished_line(file: int) -> None:
    size = end = os.fstat(file).st_size
    while end > 0:
        start = max(end - 65536, 0)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        os.ftruncate(file, end)


def keep_lines_up_to(path: str | os.PathLike, step: int) -> None:
    """Removes what a run wrote after the step that it is resumed from; those steps come again. Lines that are no JSON
    objects with a step are left. Does nothing where there is no file, or it can't be replaced."""
    path = Path(path)
    with contextlib.suppress(OSError):
        kept = [line for line in path.read_text("utf-8").splitlines(keepends=True) if not _is_later(line, step)]
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text("".join(kept), "utf-8")
        os.replace(unfinished, path)


def _is_later(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] > step
    except (ValueError, TypeError, KeyError):
        return False
