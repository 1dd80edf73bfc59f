"""Quantities with their units, as in ``3.35 TB/s``: a number without a unit says nothing about which it has."""

import math
import re

_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def _table():
    table = {"flops": {f"{prefix}FLOP/s": scale for prefix, scale in _PREFIXES.items()}}
    table["bytes"] = {f"{prefix}B": scale for prefix, scale in (_PREFIXES | _BINARY).items()}
    table["rate"] = {f"{unit}/s": scale for unit, scale in table["bytes"].items()}
    table["rate"] |= {f"{prefix}bit/s": scale / 8 for prefix, scale in _PREFIXES.items()}
    table["seconds"] = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
    return table


UNITS = _table()
_QUANTITY = re.compile(r"\s*([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)\s*(\S*)\s*")


def parse_quantity(name: str, value: object, kind: str) -> float:
    """``value``, text such as ``"80 GiB"``, in the base unit of ``kind``: FLOP/s, bytes, bytes/s or seconds.

    Raises ValueError, with the name, for a number without a unit and for a unit of another kind.
    """
    known = ", ".join(list(UNITS[kind])[:6])
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ValueError(f'{name} is {value} without a unit, expected text with one of {known}, as in "1 {known[:2]}"')
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{name} is {value!r}, expected text of a number and a unit ({known}, ...)")
    number, unit = match.groups()
    if unit not in UNITS[kind]:
        missing = "has no unit" if not unit else f"has the unit {unit!r}"
        raise ValueError(f"{name} is {value!r}, which {missing}, expected one of {known}, ...")
    result = float(number) * UNITS[kind][unit]
    if not math.isfinite(result):
        raise ValueError(f"{name} is {value!r}, expected a finite number")
    return result
