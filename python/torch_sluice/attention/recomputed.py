"""Re-entrant activation checkpointing: its forward runs without gradients, and once more, with them, in backward.

What a controller adds to the loss, the mean gate of each call, has no graph then. So the loss writes down the gradient
that it is given, and the call that is run again adds the mean's gradient, scaled by that, to its own.
"""

import sys

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from torch_sluice.attention.density import sample_gate


def in_backward() -> bool:
    """Whether autograd runs in this thread: what is called then is run again."""
    return torch._C._current_graph_task_id() != -1


def in_checkpoint() -> bool:
    """Whether this is the forward of a re-entrant checkpoint: code that an autograd function runs without gradients,
    for which it will be asked. Reads the call stack."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    frame = sys._getframe(1)
    while frame is not None:
        names = frame.f_code.co_varnames
        context = (
            frame.f_locals.get(names[0]) if frame.f_code.co_argcount and frame.f_code.co_name == "forward" else None
        )
        if isinstance(context, FunctionCtx) and any(context.needs_input_grad):
            return True
        frame = frame.f_back
    return False


class Owed:
    """The gradient of one call's mean gate, that is given when the call is run again."""

    def __init__(self, weight: float):
        self.weight = weight  # of the mean gate in the loss
        self.upstream: Tensor | None = None  # the gradient of the loss, once backward has begun


class _Remember(torch.autograd.Function):
    """A loss unchanged; its gradient, which comes first of all in backward, is written down for those who are owed."""

    @staticmethod
    def forward(ctx, loss, owed):
        ctx.owed = owed
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, upstream):
        for each in ctx.owed:
            each.upstream = upstream.detach()
        return upstream, None


class _AlsoBackward(torch.autograd.Function):
    """x unchanged; mean gets a gradient of its own beside that of x."""

    @staticmethod
    def forward(ctx, x, mean, gradient):
        ctx.save_for_backward(gradient)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        (gradient,) = ctx.saved_tensors
        return dx, gradient, None


def remember(loss: Tensor, owed: list[Owed]) -> Tensor:
    return _Remember.apply(loss, owed) if owed else loss


def note_call(gate, record) -> Tensor:
    """Leaves the record of a call with a gate that is listened to; returns a, to go on with.

    Of a call that is run again the loss already knows. Backward goes from the last call to the first, and so do those
    who are owed. One that has checkpoints within a checkpoint is run again without gradients first.
    """
    if torch.compiler.is_compiling() or not in_backward():
        gate.record.append(record)
        return record.a
    due = [owed for owed in gate.owed if owed.upstream is not None] if torch.is_grad_enabled() else ()
    if not due:
        return record.a
    owed = due[-1]
    gate.owed.remove(owed)
    # What is run again must draw the random numbers that it drew before, and this call didn't sample then.
    with torch.random.fork_rng(devices=[record.a.device] if record.a.is_cuda else []):
        mean = sample_gate(record.a, record.b, tau=record.tau, **record.near)[0]
    return _AlsoBackward.apply(record.a, mean, (owed.weight * owed.upstream).to(mean))
