"""What compression did: figures before and after, a decision for each layer, and what it could not do."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn


def count_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers as they are stored, shared ones once."""
    tensors = [part for tensor in (*model.parameters(), *model.buffers()) for part in _stored(tensor)]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def _stored(tensor: Tensor) -> list[Tensor]:
    """What a tensor holds: itself, or the parts of one that wraps others."""
    if type(tensor) in (Tensor, nn.Parameter, nn.Buffer) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


@dataclass
class LayerDecision:
    """One group of channels, or one layer that could be quantised."""

    name: str
    action: str  # "pruned", "kept", "quantized", "float"; "folded": a batch norm
    reason: str
    before: int | None = None  # channels or heads
    after: int | None = None
    latency_saved: float | None = None  # seconds of one call, predicted or measured as `reason` says
    output_error: float | None = None  # 1 - fidelity that it brings alone, see measure.py


@dataclass
class CompressionReport:
    """Hangs on a compressed model as ``model.compression_report``. Seconds, bytes, and the user's metric."""

    keep: float
    policy: str
    metric_name: str
    metric_before: float
    metric_after: float
    latency_before: float
    latency_after: float
    latency_p95_before: float
    latency_p95_after: float
    bytes_before: int
    bytes_after: int
    threads: int
    kept: float  # share of the metric, measured on data that the weights were not fitted to
    kept_low: float  # what is kept at least, with 95 % confidence, on other data of the same kind
    samples: int  # behind both
    uncertainty_known: bool = True  # False: kept_low is kept
    layers: list[LayerDecision] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    evaluations: int = 0
    changes: dict[str, Any] = field(default_factory=dict, repr=False)  # what load() needs; see changes.py

    @property
    def kept_text(self) -> str:
        """What is kept, and how well that is known, in words."""
        count = f"{self.samples} sample{'s' if self.samples != 1 else ''}"
        if not self.uncertainty_known:
            return f"{self.kept:.1%} kept ({count}, uncertainty not known)"
        # Rounded down: what is said to be kept at least must be.
        low = math.floor(self.kept_low * 1000) / 1000
        return f"{self.kept:.1%} kept, at least {low:.1%} (95 %, {count})"

    @property
    def improved(self) -> bool:
        return self.latency_after < self.latency_before or self.bytes_after < self.bytes_before

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = asdict(self)
        del plain["changes"]
        return plain

    def shares(self) -> list[float]:
        """What is left of each of the rows: after / before."""
        pairs = (
            (self.latency_before, self.latency_after),
            (self.latency_p95_before, self.latency_p95_after),
            (self.bytes_before, self.bytes_after),
        )
        return [self.kept, *(after / before if before else 1.0 for before, after in pairs)]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(what, before, after, change) for a table."""

        def change(before, after):
            return f"{(after / before - 1) * 100:+.1f} %" if before else ""

        return [
            (
                self.metric_name,
                f"{self.metric_before:.4f}",
                f"{self.metric_after:.4f}",
                self.kept_text,
            ),
            (
                "latency, median",
                f"{self.latency_before * 1e3:.2f} ms",
                f"{self.latency_after * 1e3:.2f} ms",
                change(self.latency_before, self.latency_after),
            ),
            (
                "latency, p95",
                f"{self.latency_p95_before * 1e3:.2f} ms",
                f"{self.latency_p95_after * 1e3:.2f} ms",
                change(self.latency_p95_before, self.latency_p95_after),
            ),
            (
                "bytes",
                f"{self.bytes_before:,}",
                f"{self.bytes_after:,}",
                change(self.bytes_before, self.bytes_after),
            ),
        ]

    def __str__(self) -> str:
        lines = [f"{what:<16} {before:>14} -> {after:>14}  {text}" for what, before, after, text in self.rows()]
        for layer in self.layers:
            size = f" {layer.before} -> {layer.after}" if layer.after is not None else ""
            lines.append(f"  {layer.action:<9} {layer.name}{size}: {layer.reason}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])
