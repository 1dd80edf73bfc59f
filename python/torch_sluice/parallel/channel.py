"""The way of one bucket of gradients from step to step: what it has left unsent, and how it is reduced."""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import distributed

from torch_sluice.accumulate.operators import BLOCK
from torch_sluice.parallel import compression
from torch_sluice.parallel.precision import Record, choose_format, measure

_SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Traffic:
    """What has been sent since it was made.

    Attributes:
        bytes_sent: bytes that this rank gave to other ranks: the messages, and the numbers that decisions rest on. A
            reduction of n bytes in float32 counts 2 n (ranks - 1) / ranks, the least that an all-reduce can do with.
        bytes_uncompressed: what the same gradients would have taken in their own dtype, by the same count.
        formats: buckets that were reduced, by format.
    """

    bytes_sent: float = 0.0
    bytes_uncompressed: float = 0.0
    formats: Counter = field(default_factory=Counter)


@dataclass
class Options:
    policy: object
    error_feedback: bool
    traffic: Traffic


def rescale(unsent: torch.Tensor, factor: float) -> None:
    """Multiplies a residual by the factor by which gradients grow; drops what float32 has no number for then."""
    unsent.mul_(factor).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


class Channel:
    """One bucket. ``residual``: float32 in the shape of the gradient, what other ranks have not yet been told of it."""

    def __init__(self, options: Options):
        self.options = options
        self.record = Record()
        self.residual: torch.Tensor | None = None
        self.format = ""  # of the last reduction
        self._underflow = 0

    def all_reduce(self, gradient: torch.Tensor, group) -> None:
        """Replaces the gradient, [elements], by its mean over ranks: the same bits on every rank."""
        ranks, rank = distributed.get_world_size(group), distributed.get_rank(group)
        traffic, elements = self.options.traffic, gradient.numel()
        share = 2 * (ranks - 1) / ranks
        traffic.bytes_uncompressed += share * gradient.nbytes
        if not self._may_compress(gradient, ranks):
            traffic.bytes_sent += share * gradient.nbytes
            self._note(gradient.dtype)
            distributed.all_reduce(gradient, group=group)
            gradient.div_(ranks)
            return
        part = compression.part_elements(elements, ranks)
        parts = torch.zeros(ranks, part, dtype=torch.float32, device=gradient.device)
        values = parts.view(-1)[:elements]
        if self._choose(gradient, values, parts, group, roundings=2) == "float32":
            traffic.bytes_sent += share * 4 * elements
            distributed.all_reduce(values, group=group)
            gradient.copy_(values.div_(ranks))
            return
        format = compression.FORMATS[self.format]
        total = self._reduce_scatter(values, parts, format, group)
        traffic.bytes_sent += (ranks - 1) * format.message_bytes(part)
        compression.all_gather(total, format, group, parts)
        if self.residual is not None:  # the second rounding is that of one rank alone, for each part
            mine = slice(rank * part, min((rank + 1) * part, elements))
            unsent = total.sub_(parts[rank])
            self.residual[mine] += unsent[: max(mine.stop - mine.start, 0)]
        gradient.copy_(values.div_(ranks))

    def reduce_scatter(self, output: torch.Tensor, gradient: torch.Tensor, group, op) -> None:
        """Writes this rank's part of the reduced gradient, [ranks * elements], to output, [elements]."""
        ranks, traffic, elements = distributed.get_world_size(group), self.options.traffic, output.numel()
        mean = op == distributed.ReduceOp.AVG
        known = mean or op == distributed.ReduceOp.SUM
        sent_plain = (ranks - 1) * output.nbytes
        traffic.bytes_uncompressed += sent_plain
        if not known or not self._may_compress(gradient, ranks):
            traffic.bytes_sent += sent_plain
            self._note(gradient.dtype)
            compression.plain_reduce_scatter(output, gradient, op, group=group)
            return
        part = compression.part_elements(ranks * elements, ranks)
        parts = torch.zeros(ranks, part, dtype=torch.float32, device=gradient.device)
        values = parts[:, :elements]
        if self._choose(gradient.view(ranks, elements), values, parts, group, roundings=1) == "float32":
            traffic.bytes_sent += (ranks - 1) * 4 * elements
            total = torch.empty(elements, dtype=torch.float32, device=gradient.device)
            compression.plain_reduce_scatter(total, values.reshape(-1), group=group)
        else:
            format = compression.FORMATS[self.format]
            total = self._reduce_scatter(values, parts, format, group)[:elements]
        output.copy_(total.div_(ranks) if mean else total)

    def _note(self, dtype: torch.dtype) -> None:
        self.format = str(dtype).removeprefix("torch.")
        self.options.traffic.formats[self.format] += 1

    def _may_compress(self, gradient: torch.Tensor, ranks: int) -> bool:
        """Whether there is something to choose. Less than a block for each rank is not worth it."""
        compressible = gradient.dtype in _SUPPORTED and gradient.numel() >= ranks * BLOCK
        return compressible and self.options.policy is not None

    def _choose(self, gradient, values, parts, group, roundings: int) -> str:
        """Puts what is to be sent into ``values``, a view of ``parts``, and names the format that all ranks take."""
        if self.residual is not None and self.residual.shape != gradient.shape:
            self.residual = None
        if self.residual is None and self.options.error_feedback:
            self.residual = torch.zeros(gradient.shape, dtype=torch.float32, device=gradient.device)
        if self.residual is None:
            values.copy_(gradient)
        else:
            torch.add(self.residual, gradient, out=values)
        ranks = distributed.get_world_size(group)
        row = measure(parts, self.record, self._underflow, ranks)
        self._underflow = 0
        rows = compression.gather_rows(row, group, gradient.device)
        self.options.traffic.bytes_sent += 8 * len(row) * (ranks - 1)
        self.format = choose_format(self.options.policy, self.record, rows, gradient.numel(), roundings)
        self.options.traffic.formats[self.format] += 1
        if self.format != "float32":
            return self.format
        if any(row[1] > 0 for row in rows):
            values.copy_(gradient)  # the residual waits for a gradient that is finite everywhere
        elif self.residual is not None:
            self.residual.zero_()
        return self.format

    def _reduce_scatter(self, values, parts, format, group) -> torch.Tensor:
        decoded = None if self.residual is None else torch.empty_like(parts)
        total, self._underflow = compression.reduce_scatter(parts, format, group, decoded)
        self.options.traffic.bytes_sent += (len(parts) - 1) * format.message_bytes(parts.shape[1])
        if decoded is not None:
            shown = decoded.as_strided(values.shape, values.stride())
            torch.sub(values, shown, out=self.residual)
        return total
