"""The buckets of a DistributedDataParallel module, followed while their layout changes.

DDP puts parameters into buckets in the reverse order of their registration, and again after the first backward pass, in
the order in which their gradients came. What is unsent belongs to a parameter and moves with it. Parameters are known
by the order of their first appearance, which is the same when the same model is wrapped again after a restart.
"""

import torch

from torch_sluice.parallel.channel import Channel, Options, rescale
from torch_sluice.parallel.precision import Record


class Buckets:
    """Channels of the buckets by index."""

    def __init__(self, options: Options):
        self.options = options
        self.channels: dict[int, Channel] = {}
        self._layouts: dict[int, list[tuple[int, int]]] = {}  # of each bucket: (number, elements) of its parameters
        self._numbers: dict[int, int] = {}  # of parameters by id
        self._unsent: dict[int, torch.Tensor] = {}  # by parameter: what belongs to no bucket at present
        self._records: dict[tuple, dict] = {}  # by layout: what a checkpoint says of buckets that have yet to come

    def channel(self, index: int, parameters: list[torch.Tensor]) -> Channel:
        """The channel of a bucket. Buckets come in the order of their indices."""
        layout = [(self._numbers.setdefault(id(p), len(self._numbers)), p.numel()) for p in parameters]
        if self._layouts.get(index) != layout:
            for changed in [i for i in self.channels if i >= index]:
                self._unsent.update(self._pieces(changed))
                del self.channels[changed], self._layouts[changed]
            self.channels[index], self._layouts[index] = self._make(layout, parameters[0].device), layout
        return self.channels[index]

    def _make(self, layout: list[tuple[int, int]], device: torch.device) -> Channel:
        channel = Channel(self.options)
        record = self._records.pop(tuple(layout), None)
        if record is not None:
            channel.record.load_state_dict(record)
        pieces = [self._unsent.pop(number, None) for number, _ in layout]
        if self.options.error_feedback and any(piece is not None for piece in pieces):
            channel.residual = torch.cat([
                torch.zeros(elements, device=device) if piece is None or piece.numel() != elements else piece.to(device)
                for piece, (_, elements) in zip(pieces, layout, strict=True)
            ])  # fmt: skip
        return channel

    def _pieces(self, index: int) -> dict[int, torch.Tensor]:
        residual = self.channels[index].residual
        if residual is None:
            return {}
        numbers, sizes = zip(*self._layouts[index], strict=True)
        return dict(zip(numbers, residual.split(sizes), strict=True))

    def rescale(self, factor: float) -> None:
        """Gradients are larger by this factor from now on, and so is what is unsent of them."""
        residuals = [channel.residual for channel in self.channels.values() if channel.residual is not None]
        for unsent in (*residuals, *self._unsent.values()):
            rescale(unsent, factor)

    def state_dict(self) -> dict:
        unsent = dict(self._unsent)
        for index in self.channels:
            unsent.update(self._pieces(index))
        records = dict(self._records)
        for index, channel in self.channels.items():
            records[tuple(self._layouts[index])] = channel.record.state_dict()
        return {"unsent": {number: piece.clone() for number, piece in unsent.items()}, "records": records}

    def load_state_dict(self, state: dict) -> None:
        self.channels.clear()
        self._layouts.clear()
        self._unsent = {int(number): piece.to(torch.float32, copy=True) for number, piece in state["unsent"].items()}
        for record in state["records"].values():
            Record().load_state_dict(record)  # raises where it is none
        self._records = {tuple(map(tuple, layout)): record for layout, record in state["records"].items()}
