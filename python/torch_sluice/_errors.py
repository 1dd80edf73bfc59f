"""Errors of the operator library, the same under every torch."""

import torch


def check_tensors(**arguments) -> None:
    """Raises the ValueError of the operator library for an argument, by its name, that is no tensor."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} is {value if value is None else type(value).__name__}, expected a tensor")


def as_value_error(error: RuntimeError) -> Exception:
    """``error`` as the ValueError that it means, or as it is.

    From torch 2.15 on, a std::invalid_argument of the operator library arrives as a RuntimeError.
    """
    if type(error) is RuntimeError and ", expected " in str(error):
        return ValueError(str(error))
    return error
