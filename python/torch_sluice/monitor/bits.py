"""Which widths a quantiser chooses: quantised modules report them here, and monitors listen."""

from collections.abc import Callable

import torch

listeners: list[Callable] = []  # called as listener(bits, module)


def record(bits: torch.Tensor, module: torch.nn.Module | None = None) -> None:
    """Says which widths a quantised operator has chosen. Costs nothing while no monitor listens.

    Args:
        bits: integers of any shape, the width of each row (or of the whole input) in bits, as
            ``sluice::linear_dynamic`` and ``sluice::conv2d_dynamic`` return them.
        module: the module that asks, so that a monitor tells its model's modules from another's; None: any model's.
    """
    if listeners and not torch.compiler.is_compiling():
        for listener in tuple(listeners):
            listener(bits, module)
