"""Which widths a quantiser chooses: quantised layers report them here, and monitors listen."""

from collections.abc import Callable

import torch

listeners: list[Callable] = []  # called as listener(bits, source)


def record(bits: torch.Tensor, source: torch.nn.Module | torch.Tensor | None = None) -> None:
    """Says which widths a quantised operator has chosen. Costs nothing while no monitor listens.

    Args:
        bits: integers of any shape, the width of each row (or of the whole input) in bits, as
            ``sluice::linear_dynamic`` and ``sluice::conv2d_dynamic`` return them.
        source: the module that asks, or the parameter that it multiplies by, so that a monitor tells its model's from
            another's; None: any model's.
    """
    if listeners and not torch.compiler.is_compiling():
        for listener in tuple(listeners):
            listener(bits, source)
