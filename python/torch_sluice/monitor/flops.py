"""Counts the floating-point operations of a step: as executed, as dense-equivalent, and by the dtype they ran in."""

from collections import defaultdict
from dataclasses import dataclass, field, replace


@dataclass
class FlopCount:
    """Operations of matrix products, convolutions, attention and recurrent layers in one step; a multiply-add is two.

    Attributes:
        executed: what was computed: kept pairs of a gated attention, half of the square under a causal mask, both
            passes of an int16 product.
        dense_equivalent: what the same step would have computed with every pair that the causal mask and the key
            range allow, and one pass for each product.
        by_dtype: executed operations by the name of the dtype that they ran in, as "float32" or "int8".
        gated: executed operations of gated attention alone.
        gated_dense_equivalent: the same with every pair.
        unknown: operators that computed and could not be counted, by their names, as "aten::_cdist_forward", and why.
            Where there are any, the figures above are those of the others, and too low.
    """

    executed: int = 0
    dense_equivalent: int = 0
    by_dtype: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    gated: int = 0
    gated_dense_equivalent: int = 0
    unknown: dict[str, str] = field(default_factory=dict)

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
        return replace(self, executed=self.executed + change, by_dtype=by_dtype, gated=self.gated + change)

    def why_unknown(self) -> str | None:
        """A sentence that names the operators that could not be counted; None: there were none."""
        if not self.unknown:
            return None
        names = ", ".join(f"{name} (its formula failed: {why})" if why else name for name, why in self.unknown.items())
        return (
            f"FLOPs and MFU are not known, since these operators compute and have no formula: {names}. "
            "torch.utils.flop_counter.register_flop_formula takes one"
        )
