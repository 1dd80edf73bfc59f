"""The C core's planning functions, as ctypes sees them, and checks of what goes to them."""

import ctypes
import functools
import operator

from torch_sluice import _library

_OUT_OF_MEMORY = 3
_INTERNAL = 5


@functools.cache
def library() -> ctypes.CDLL:
    """libsluice_torch.so, which holds the C core."""
    _library.load()
    loaded = ctypes.CDLL(_library.library_path())
    loaded.sl_last_error.restype = ctypes.c_char_p
    return loaded


def call(name: str, *arguments) -> None:
    """Calls a function of the C core that returns a status.

    Raises ``ValueError`` with the core's own text for bad input, ``MemoryError`` where memory is too small, and
    ``RuntimeError`` for a mistake of the core.
    """
    status = getattr(library(), name)(*arguments)
    if status:
        text = library().sl_last_error().decode(errors="replace")
        raise {_OUT_OF_MEMORY: MemoryError, _INTERNAL: RuntimeError}.get(status, ValueError)(text)


def whole_number(argument: str, value) -> int:
    """``value`` as an int of 64 bits; else a ValueError that names the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{argument} is {value!r}, expected a whole number") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{argument} is {number}, expected a number of 64 bits")
    return number


def number(argument: str, value) -> float:
    """``value`` as a float; else a ValueError that names the argument."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{argument} is {value!r}, expected a number") from None
