"""Working together with DistributedDataParallel: which backward passes average gradients over ranks.

DDP copies ``.grad`` into its buckets in C++, right after our hook has run. So in a pass that averages, the hook leaves
the whole sum in sight. Which passes do is what DDP's reducer is told, in DDP's forward pass or by a pipeline schedule;
and whoever wrapped the model may have done so after the session began, as a Trainer does. Hence, while a session is
open, two methods are replaced: ``forward`` of the class, and ``prepare_for_backward`` of its reducer.
"""

import functools
import weakref

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from torch_sluice.accumulate.access import gradient_of

_sessions = set()
_originals = []  # (class, name, what stood there)
_reductions = {}  # id(reducer of a module) -> Reduction


class Reduction:
    """What one DistributedDataParallel module does in the coming backward pass.

    Attributes:
        expected: the pass averages gradients over ranks.
        ran: such a pass has begun since.
        finds_unused: DDP looks for parameters without a gradient, right after our hook, in other passes too.
    """

    def __init__(self, module: DistributedDataParallel, gradients: list):
        self.module, self.gradients = weakref.ref(module), gradients
        self.group = module.process_group
        self.device = next(module.parameters()).device
        self.finds_unused = module.find_unused_parameters
        self._takes_early = module.find_unused_parameters or module.static_graph
        self.expected = self.ran = False

    def prepare(self) -> None:
        """The next backward pass averages, whatever forward passes come before it."""
        if self._takes_early:
            for gradient in self.gradients:  # of a parameter without use in this pass DDP takes the sum now
                gradient.session.take_postponed()
                gradient.show()
        self.expected, self.ran = True, False

    def note_quiet_forward(self) -> None:
        """A forward pass whose backward pass does not average, unless one that does is still to come."""
        self.expected = self.expected and not self.ran

    def average(self, tokens: float) -> float:
        """Tokens of all ranks / number of ranks: DDP divides by the latter itself."""
        total = torch.tensor([tokens], dtype=torch.float64, device=self.device)
        distributed.all_reduce(total, group=self.group)
        return total.item() / distributed.get_world_size(self.group)


def attach(session) -> None:
    """Watches all DistributedDataParallel modules while the session is open."""
    if not _sessions:
        for owner, name, around in (
            (DistributedDataParallel, "forward", _around_forward),
            (distributed.Reducer, "prepare_for_backward", _around_prepare),
        ):
            _originals.append((owner, name, getattr(owner, name)))
            setattr(owner, name, around(getattr(owner, name)))
    _sessions.add(session)
    for module in session.model.modules():
        if isinstance(module, DistributedDataParallel):
            reduction = _reduction_of(module)
            had_forward = getattr(module, "_lazy_init_ran", True)
            if reduction is not None and had_forward and module.require_forward_param_sync:
                reduction.prepare()  # the backward pass of that may still come


def detach(session) -> None:
    """Forgets the session; after the last one all is as it was."""
    _sessions.discard(session)
    if not _sessions:
        for owner, name, original in _originals:
            setattr(owner, name, original)
        _originals.clear()
        _reductions.clear()


def _reduction_of(module) -> Reduction | None:
    """That of a module with parameters of a session; None where there are none."""
    gradients = [gradient for one in module.parameters() if (gradient := gradient_of(one)) is not None]
    reduction = _reductions.get(id(module.reducer))
    if reduction is None or reduction.module() is not module:
        reduction = Reduction(module, gradients)
        if gradients:
            _reductions[id(module.reducer)] = reduction
    reduction.gradients = gradients
    for gradient in gradients:
        gradient.reduction = reduction
    return reduction if gradients else None


@torch._disable_dynamo
def _before_forward(module) -> bool | None:
    """Whether the coming pass shall average; None where that is nothing to us."""
    reduction = _reduction_of(module) if torch.is_grad_enabled() else None
    if reduction is None:
        return None
    # A static graph must average from its first pass on, so it does in each micro-batch of a window.
    full = module.static_graph or any(not gradient.session.window.is_held for gradient in reduction.gradients)
    averages = module.require_backward_grad_sync and full
    if not averages:
        reduction.note_quiet_forward()
    return averages


def _around_forward(original):
    @functools.wraps(original)
    def forward(self, *inputs, **kwargs):
        averages = _before_forward(self)
        if averages is None:
            return original(self, *inputs, **kwargs)
        asked = self.require_backward_grad_sync
        self.require_backward_grad_sync = averages
        try:
            return original(self, *inputs, **kwargs)
        finally:
            self.require_backward_grad_sync = asked

    return forward


def _around_prepare(original):
    @functools.wraps(original)
    def prepare_for_backward(reducer, outputs):
        reduction = _reductions.get(id(reducer))
        if reduction is not None:
            reduction.prepare()
        return original(reducer, outputs)

    return prepare_for_backward
