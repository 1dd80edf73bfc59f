"""Working together with DistributedDataParallel: which backward passes average gradients over ranks.

DDP copies ``.grad`` into its buckets in C++, right after our hook has run. So in a pass that averages, the hook leaves
the whole sum in sight. Which passes do is decided in DDP's forward pass, and whoever wrapped the model may have done so
after the session began (a Trainer does): hence ``forward`` of the class is replaced while a session is open.
"""

import functools

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from torch_sluice.accumulate.access import gradient_of

_sessions = set()
_original = None


class Reduction:
    """What one DistributedDataParallel module does in the coming backward pass.

    Attributes:
        expected: the pass averages gradients over ranks.
        ran: such a pass has begun since.
        finds_unused: DDP looks for parameters without a gradient, right after our hook, in other passes too.
    """

    def __init__(self, module: DistributedDataParallel):
        self.group = module.process_group
        self.device = next(module.parameters()).device
        self.finds_unused = module.find_unused_parameters
        self.expected = self.ran = False

    def note_forward(self, averages: bool) -> None:
        """As DDP does: a pass that was prepared for averaging averages, even if another forward came in between."""
        if averages:
            self.expected, self.ran = True, False
        elif self.ran:
            self.expected = False

    def average(self, tokens: float) -> float:
        """Tokens of all ranks / number of ranks: DDP divides by the latter itself."""
        total = torch.tensor([tokens], dtype=torch.float64, device=self.device)
        distributed.all_reduce(total, group=self.group)
        return total.item() / distributed.get_world_size(self.group)


def attach(session) -> None:
    """Watches the forward passes of all DistributedDataParallel modules while the session is open."""
    global _original
    if not _sessions:
        _original = DistributedDataParallel.forward
        DistributedDataParallel.forward = _around_forward(_original)
    _sessions.add(session)


def detach(session) -> None:
    global _original
    _sessions.discard(session)
    if not _sessions and _original is not None:
        DistributedDataParallel.forward, _original = _original, None


def watched(model: torch.nn.Module) -> None:
    """Prepares for a model whose forward pass came before the session."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            _reduction_of(module, _gradients_of(module)).note_forward(module.require_forward_param_sync)


def _gradients_of(module) -> list:
    return [gradient for one in module.parameters() if (gradient := gradient_of(one)) is not None]


def _reduction_of(module, gradients) -> Reduction:
    reduction = next((one.reduction for one in gradients if one.reduction is not None), None)
    if reduction is None or reduction.group is not module.process_group:
        reduction = Reduction(module)
    for gradient in gradients:
        gradient.reduction = reduction
    return reduction


@torch._disable_dynamo
def _before_forward(module) -> tuple[Reduction, bool] | None:
    gradients = _gradients_of(module)
    if not gradients or not torch.is_grad_enabled():
        return None
    # A static graph must average from its first pass on, so it does in each micro-batch of a window.
    full = module.static_graph or any(not gradient.session.window.is_held for gradient in gradients)
    averages = module.require_backward_grad_sync and full
    if averages and (module.find_unused_parameters or module.static_graph):
        for gradient in gradients:  # of a parameter without use in this pass DDP takes the sum at the end of forward
            gradient.session.take_postponed()
            gradient.show()
    return _reduction_of(module, gradients), averages


def _around_forward(original):
    @functools.wraps(original)
    def forward(self, *inputs, **kwargs):
        coming = _before_forward(self)
        if coming is None:
            return original(self, *inputs, **kwargs)
        reduction, averages = coming
        asked = self.require_backward_grad_sync
        self.require_backward_grad_sync = averages
        try:
            output = original(self, *inputs, **kwargs)
        finally:
            self.require_backward_grad_sync = asked
        reduction.note_forward(averages)
        return output

    return forward
