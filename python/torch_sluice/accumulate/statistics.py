"""What the kernels have measured of gradients, kept on their device until somebody needs it."""

import math

import torch

from torch_sluice.accumulate.sharded import local_part


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


def real_values(grad: torch.Tensor | None) -> torch.Tensor | None:
    """This rank's elements of a gradient as real numbers; None where there are none."""
    if grad is None:
        return None
    grad = local_part(grad).detach()
    grad = grad.coalesce().values() if grad.is_sparse else grad
    return torch.view_as_real(grad) if grad.is_complex() else grad


def norms_of_all(tensors: list[torch.Tensor]) -> list[float]:
    """The Euclidean norm of each tensor, with a few calls for all; infinity or NaN where an element is."""
    norms: list = [None] * len(tensors)
    kinds = {}
    for place, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(place)
    for (_, dtype), places in kinds.items():
        group = [tensors[place] for place in places]
        if dtype in (torch.float32, torch.float64):
            measured = torch._foreach_norm(group, 2)
        else:  # the norm may be beyond the type
            measured = [torch.linalg.vector_norm(one, dtype=torch.float32) for one in group]
        for place, norm in zip(places, torch.stack(measured).tolist(), strict=True):
            if not 0 < norm < math.inf:  # its squares may be beyond the type
                norm = torch.linalg.vector_norm(tensors[place], dtype=torch.float64).item()
            norms[place] = norm
    return norms
