"""Makes candidates, the model pruned, folded and quantised as far as a plan says, for as long as they are measured."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_sluice.compress import quantization, widths
from torch_sluice.compress.folding import Pair, fold_pairs
from torch_sluice.compress.pruning import Plan, Pruner
from torch_sluice.compress.quantization import Candidate


@dataclass
class Stage:
    """A pruned model that keeps enough: units kept by group, and its weights where it was trained since."""

    kept: Plan
    trained: nn.Module | None = None


@dataclass
class Layers:
    """What is done to a stage's layers: batch norms that are folded, and layers that are quantised."""

    pairs: Sequence[Pair] = ()
    chosen: Sequence[Candidate] = ()
    options: dict[str, Any] | None = None
    target_sqnr: float | None = None  # in place of the options' where it is lower
    finer: frozenset[str] = frozenset()  # names of those whose activations take more bits (widths.FINER_SQNR)
    packed: bool = True  # the weights of ``chosen`` are the stage's, fitted to all data


class Workshop:
    """The original, and what cuts it. ``made`` changes models in place where it can, and puts everything back."""

    def __init__(self, original: nn.Module, pruner: Pruner | None):
        self.original, self.pruner = original, pruner

    def is_fitted(self, stage: Stage) -> bool:
        """Whether a candidate's weights depend on the data, so that it takes one for each fold to measure it."""
        return stage.trained is None and self.pruner is not None and self.pruner.is_fitted(stage.kept)

    @contextlib.contextmanager
    def made(self, stage: Stage, left_out: int | None, layers: Layers | None = None) -> Iterator[nn.Module]:
        """Within it, the candidate, fitted to all data, or to all but a fold."""
        with contextlib.ExitStack() as stack:
            model = self.original if stage.trained is None else stage.trained
            if stage.trained is None and stage.kept:
                model = stack.enter_context(self.pruner.pruned(stage.kept, left_out))
            if layers is not None:
                stack.callback(fold_pairs(model, layers.pairs))
                packed = layers.packed and left_out is None
                stack.enter_context(_quantized(model, layers, packed))
            yield model

    def build(self, stage: Stage) -> nn.Module:
        """A model of its own, fitted to all data."""
        if stage.trained is not None or self.pruner is None:
            return copy.deepcopy(self.original if stage.trained is None else stage.trained)
        return self.pruner.build(stage.kept)


@contextlib.contextmanager
def _quantized(model: nn.Module, layers: Layers, packed: bool) -> Iterator[None]:
    weights = [quantization.repacked(model, c, layers.options) if not packed else c for c in layers.chosen]
    with contextlib.ExitStack() as stack:
        if layers.target_sqnr is not None:
            stack.enter_context(widths.with_sqnr(weights, lambda width: min(width, layers.target_sqnr)))
        finer = [candidate for candidate in weights if candidate.name in layers.finer]
        stack.enter_context(widths.with_sqnr(finer, lambda width: widths.FINER_SQNR))
        stack.enter_context(quantization.placed(model, weights))
        yield
