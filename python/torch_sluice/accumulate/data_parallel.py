"""Working together with DistributedDataParallel: when it averages over ranks, and by how many tokens of all ranks."""

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


class DataParallel:
    """The DistributedDataParallel modules in a model; nothing happens where there are none.

    DDP copies ``parameter.grad`` into its buckets right after our hook has run, so a sum that is shown in the hook is
    what it averages over ranks: once a window, if it synchronises only in the window's last micro-batch. In a loop that
    calls step() after each micro-batch the session sees to that, once it knows that it is such a loop; other loops say
    ``with model.no_sync()`` themselves. Where DDP averages more often, so do the sums, which is as right and slower.
    """

    def __init__(self, model: nn.Module):
        self.modules = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
        self._planned = False
        self._average: tuple[float, float] | None = None  # tokens of this rank -> tokens of all ranks / ranks

    def __bool__(self) -> bool:
        return bool(self.modules)

    @property
    def reduces_now(self) -> bool:
        """Whether the backward pass in progress averages over ranks."""
        return any(module.require_forward_param_sync for module in self.modules)

    def plan(self, window) -> None:
        """Has the next forward and backward pass average over ranks, or not."""
        self._average = None
        if not self.modules:
            return
        if window.kind != "each":
            self.restore()
            return
        self._planned = True
        for module in self.modules:
            module.require_backward_grad_sync = window.comes_last

    def restore(self) -> None:
        """Leaves it to the loop when to average over ranks."""
        if self._planned:
            for module in self.modules:
                module.require_backward_grad_sync = True
        self._planned = False

    def average(self, tokens: float) -> float:
        """Tokens of all ranks / number of ranks: DDP divides by the latter itself."""
        if not self.modules or not self.reduces_now:
            return tokens
        if self._average is None or self._average[0] != tokens:
            group = self.modules[0].process_group
            device = next(self.modules[0].parameters()).device
            total = torch.tensor([tokens], dtype=torch.float64, device=device)
            distributed.all_reduce(total, group=group)
            self._average = tokens, total.item() / distributed.get_world_size(group)
        return self._average[1]
