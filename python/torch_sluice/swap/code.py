"""What a module's class says in its code: the names that its methods use."""

import inspect

from torch import nn

_BASES = ("torch", "transformers.modeling_utils", "transformers.modeling_layers")


def codes_of(cls: type[nn.Module]) -> list[tuple]:
    """(code, globals) of every method of a class and of its bases, but for those of torch and of every HF model."""
    found = []
    for base in cls.__mro__:
        if base.__module__.split(".")[0] == "torch" or base.__module__ in _BASES or base is object:
            break
        for member in vars(base).values():
            function = inspect.unwrap(getattr(member, "__func__", member)) if callable(member) else member
            function = getattr(function, "__func__", function)
            if hasattr(function, "__code__"):
                found.append((function.__code__, function.__globals__))
    return found


def names_of(code) -> set[str]:
    """All global and attribute names in a code object and those nested in it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            names |= names_of(constant)
    return names
