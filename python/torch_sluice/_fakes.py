"""What tracing needs of every sluice:: operator: the checks and the counting that its kernel does on the tensors."""

from collections.abc import Callable

import torch


def _check(argument: torch.Argument, tensor) -> None:
    if tensor is None:
        raise ValueError(f"{argument.name} is None, expected a tensor")
    if tensor.layout != torch.strided:
        raise ValueError(f"{argument.name} has the layout {tensor.layout}, expected a dense tensor, torch.strided")


def register_fake(name: str) -> Callable:
    """Decorator for the function that gives the results' shapes of the operator ``sluice::name``.

    Before it, tensor arguments are checked as torch_bindings/operator.h does, for all operators: each is there, dense,
    and on the device of the first. After it, those that the schema says are written have their version counters raised.
    Raises ValueError, which names the argument.
    """
    arguments = getattr(torch.ops.sluice, name).default._schema.arguments

    def decorate(function: Callable) -> Callable:
        def run(*values):
            tensors = []
            for argument, value in zip(arguments, values, strict=True):
                kind = str(argument.type)
                if kind == "Tensor" or (kind == "Optional[Tensor]" and value is not None):
                    _check(argument, value)
                    tensors.append((argument, value))
            for argument, tensor in tensors[1:]:
                first, like = tensors[0]
                if tensor.device != like.device:
                    raise ValueError(
                        f"{argument.name} is on {tensor.device}, expected the device of {first.name}, which is "
                        f"{like.device}"
                    )
            results = function(*values)
            for argument, tensor in tensors:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    torch.autograd.graph.increment_version(tensor)
            return results

        torch.library.register_fake(f"sluice::{name}", run)
        return function

    return decorate
