"""What a module's class says in its code: the names that its methods use, and what these names stand for."""

import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

_BASES = ("torch", "transformers.modeling_utils", "transformers.modeling_layers")


def functions_of(cls: type[nn.Module]) -> list[types.FunctionType]:
    """Every method of a class and its bases, without decorators, but for those of torch and of every HF model."""
    found = []
    for base in cls.__mro__:
        if base.__module__.split(".")[0] == "torch" or base.__module__ in _BASES or base is object:
            break
        for member in vars(base).values():
            function = inspect.unwrap(getattr(member, "__func__", member)) if callable(member) else member
            function = getattr(function, "__func__", function)
            if hasattr(function, "__code__"):
                found.append(function)
    return found


def codes_of(cls: type[nn.Module]) -> list[tuple]:
    """(code, globals) of the functions of a class."""
    return [(function.__code__, function.__globals__) for function in functions_of(cls)]


def names_of(code) -> set[str]:
    """All global and attribute names in a code object and those nested in it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            names |= names_of(constant)
    return names


def values_in(function: types.FunctionType) -> Iterator[Any]:
    """What the names in a function stand for outside of it: globals, members of modules, variables around it."""
    names = names_of(function.__code__)
    for name in sorted(names & function.__globals__.keys()):
        value = function.__globals__[name]
        if isinstance(value, types.ModuleType):
            yield from (vars(value)[member] for member in sorted(names & vars(value).keys()))
        yield value
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # assigned later
            continue
