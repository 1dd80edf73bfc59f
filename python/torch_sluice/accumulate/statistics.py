"""What the kernels have measured of gradients, kept on their device until somebody needs it."""

import torch


class Statistics:
    """Statistics on their way to the records of their parameters. One transfer for each device brings them all."""

    def __init__(self):
        self._waiting = []  # (record, its window, whether the gradient is the sum, the six numbers as a tensor)

    def note(self, record, statistics: torch.Tensor, is_sum: bool) -> None:
        """Keeps the statistics of an added gradient; ``is_sum``: it is all that its sum is made of."""
        if self._waiting and record is self._waiting[0][0]:
            self.read()  # the next backward pass has begun, and the policy decides by what the last one brought
        self._waiting.append((record, record.windows, is_sum, statistics))

    def read(self) -> None:
        """Brings all statistics to their records, but for those of gradients that were dropped since."""
        waiting, self._waiting = self._waiting, []
        by_device = {}
        for record, window, is_sum, statistics in waiting:
            if window == record.windows:
                by_device.setdefault(statistics.device, []).append((record, is_sum, statistics))
        for group in by_device.values():
            numbers = torch.stack([statistics for _, _, statistics in group]).tolist()
            for (record, is_sum, _), six in zip(group, numbers, strict=True):
                record.note(six, is_sum)

    def clear(self) -> None:
        """Forgets them."""
        self._waiting.clear()
