"""The first run of a model over all data: what its layers read is recorded, and what it returns is remembered, so that
the metric, which looks at the model next, need not run it again."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from torch_sluice.compress.calling import call_model, evaluating, seeded
from torch_sluice.compress.latency import time_call
from torch_sluice.compress.moments import MomentRecorder, Moments, join
from torch_sluice.compress.norm_scale import NormRecorder, NormScale
from torch_sluice.compress.remember import Calls, remembering
from torch_sluice.compress.samples import Piece, fold_numbers

_SCALED = 16  # pieces of data that say how large a norm's channels are: one number for each norm
_ENOUGH = 16  # rows for each unknown, in all, beyond which more are not worth their time
PLENTY = 8  # rows for each unknown, of which half are as good


@dataclass
class FirstPass:
    """What a model's layers read, by the folds of the data as they were when it ran."""

    folds: dict[int, Moments] = field(default_factory=dict)
    norms: dict[str, NormScale] = field(default_factory=dict)

    def by_folds(self, count: int) -> dict[int, Moments]:
        """The moments by folds that were made of these since, ``count`` of them: each of those with the same number
        modulo that."""
        parts = [[moments for fold, moments in self.folds.items() if fold % count == own] for own in range(count)]
        return {own: part[0] if len(part) == 1 else join(part) for own, part in enumerate(parts)}


def moment_seconds(model: nn.Module, readers: Sequence[str]) -> float:
    """That taking moments will add to a run over data with rows enough, by the time of one product."""
    rows, channels = torch.ones(256, 512), [model.get_submodule(path).weight.shape[1] for path in readers]
    each = min(time_call(lambda: rows.T @ rows, 3)) / (256 * 512 * 512)
    return each * _ENOUGH * sum(count**3 for count in channels)


def run_first(
    model: nn.Module,
    pieces: Sequence[Piece],
    readers: Sequence[str],
    norms: Sequence[str],
    calls: Calls,
    report: Callable[[str], None] = lambda text: None,
) -> FirstPass:
    """Runs the model once over all pieces.

    Args:
        readers: layers of which moments are taken.
        norms: modules of which, if they are norms, scales are taken.
        calls: which remembers what the model returned.
    """
    numbers, recorded = fold_numbers(pieces), {}
    scales, scaled = NormRecorder(model, norms), -(-_SCALED // len(numbers))
    with remembering(model, calls), evaluating(model), torch.no_grad():
        for fold in numbers:
            own = [piece for piece in pieces if piece.fold == fold]
            with MomentRecorder(model, readers, len(own), _ENOUGH / len(numbers)) as recorder:
                for number, piece in enumerate(own):
                    report("activations")
                    with scales if number < scaled else contextlib.nullcontext(), seeded():
                        call_model(model, piece.inputs)
                    recorder.end_call()
            recorded[fold] = recorder.finish()
    return FirstPass(recorded, scales.finish())
