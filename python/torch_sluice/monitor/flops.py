"""Counts the floating-point operations of a step: as executed, as dense-equivalent, and by the dtype they ran in."""

import contextlib
import functools
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from torch_sluice.monitor import formulas


@dataclass
class FlopCount:
    """Operations of matrix products, convolutions and attention in one step; a multiply-add counts as two.

    Attributes:
        executed: what was computed: kept pairs of a gated attention, half of the square under a causal mask, both
            passes of an int16 product.
        dense_equivalent: what the same step would have computed with every pair that the causal mask and the key
            range allow, and one pass for each product.
        by_dtype: executed operations by the name of the dtype that they ran in, as "float32" or "int8".
        gated: executed operations of gated attention alone.
        gated_dense_equivalent: the same with every pair.
    """

    executed: int = 0
    dense_equivalent: int = 0
    by_dtype: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    gated: int = 0
    gated_dense_equivalent: int = 0

    def at_density(self, density: float | None) -> "FlopCount":
        """The count of a step like this one whose gates keep another share of the pairs.

        Exact where all gated attentions have the same shape, since the operations are proportional to the kept pairs.
        """
        if density is None or not self.gated_dense_equivalent:
            return self
        change = round(density * self.gated_dense_equivalent) - self.gated
        by_dtype = dict(self.by_dtype)
        gated_dtype = max((name for name in by_dtype if name != "int8"), key=by_dtype.get)
        by_dtype[gated_dtype] += change
        return FlopCount(
            self.executed + change, self.dense_equivalent, by_dtype, self.gated + change, self.gated_dense_equivalent
        )


class StepFlopCounter:
    """``with StepFlopCounter() as counter: step()``, then ``counter.count``. Works around compiled models too."""

    def __init__(self):
        self.count = FlopCount()
        self.problem: Exception | None = None  # the first failure of a formula; what it should have counted is missing
        self._pairs = formulas.PairCache()
        mapping = {**flop_registry, **formulas.OVERRIDES}
        self._mode = FlopCounterMode(
            display=False, custom_mapping={operator: self._tally(operator, mapping[operator]) for operator in mapping}
        )
        self._stack = contextlib.ExitStack()

    def _tally(self, operator, formula):
        """The formula, with what it returns noted in the count as well."""

        def count(*args, out_val=None, **options):
            try:
                return add(*args, out_val=out_val, **options)
            except Exception as error:  # it must not become one of the operator's, in the midst of the model
                self.problem = self.problem or error
                return 0

        def add(*args, out_val, **options):
            if operator in formulas.GATED:
                executed, dense = formula(*args, pairs=self._pairs, **options)
                self.count.gated += executed
                self.count.gated_dense_equivalent += dense
            elif operator in formulas.QUANTISED:
                executed, dense = formula(*args, out_val=out_val, **options)
            else:
                executed = dense = formula(*args, out_val=out_val, **options)
            self.count.executed += executed
            self.count.dense_equivalent += dense
            self.count.by_dtype[formulas.dtype_name(operator, args)] += executed
            return executed

        count._get_raw = True  # what register_flop_formula(get_raw=True) sets: pass tensors, not shapes
        return count

    def __enter__(self) -> "StepFlopCounter":
        self._stack.enter_context(warnings.catch_warnings())
        # The counter follows modules by global hooks, of which a compiled module warns; they count nothing twice.
        warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks")
        self._stack.enter_context(self._mode)
        return self

    def __exit__(self, *exception) -> None:
        self._stack.__exit__(*exception)


@functools.cache
def load_counter() -> None:
    """Loads what torch's counter loads at its first use: a second or two, and some 60 MB that are not the model's."""
    with StepFlopCounter():
        torch.mm(torch.zeros(1, 1), torch.zeros(1, 1))


def measure_flops(function: Callable[[], object]) -> FlopCount:
    """Runs the function once and returns the operations of its matrix products, convolutions and attention."""
    with StepFlopCounter() as counter:
        function()
    if counter.problem is not None:
        raise counter.problem
    return counter.count


def count_flops(function: Callable[[], object]) -> int:
    """Runs the function once and returns the operations that it executed.

    Attention counts the pairs that are computed: half of them under a causal mask, the kept ones under a gate.
    """
    return measure_flops(function).executed
