"""Whose a figure's name is: the monitor's own ones, and those that become one metric of Prometheus."""

from collections.abc import Callable

from torch_sluice.monitor.outputs.prometheus import OWN, metric_of

_IN_A_LINE = {"step", "time", "monitor"}  # beside the figures, in JSON lines
_FIGURES = {
    "seconds", "tokens", "tokens_per_second", "flops", "flops_dense_equivalent", "mfu", "mfu_dense_equivalent",
    "communication_bytes", "overlapped_share",
}  # fmt: skip

# A loop's own figure cannot have one of these names. It may give "loss", "density" and "half_share".
RESERVED = frozenset({*_IN_A_LINE, *_FIGURES, *OWN})


class MetricNames:
    """Which figures are shown as metrics: of those that would become the same one, the first. The others are left out
    there, and warned of once.

    Args:
        warn_once: called as warn_once(kind, message).
    """

    def __init__(self, warn_once: Callable[[str, str], None]):
        self._warn_once = warn_once
        self._owners = {metric_of(name): name for name in (*RESERVED, "density", "half_share")}
        self._known: set[str] = set()
        self._left_out = {"seconds", "tokens"}  # which are shown as totals

    def claim(self, figures: dict) -> None:
        """Notes the names of a step's figures, in their order."""
        for name in [name for name in figures if name not in self._known]:
            self._known.add(name)
            metric = metric_of(name)
            owner = self._owners.setdefault(metric, name)
            if owner != name:
                self._left_out.add(name)
                whose = "a metric of the monitor's own" if owner in RESERVED else f"that of {owner!r}"
                self._warn_once(
                    f"metric {name}",
                    f"the figure {name!r} is left out of the Prometheus metrics: as {metric} it would be {whose}",
                )

    def shows(self, name: str) -> bool:
        return name not in self._left_out
