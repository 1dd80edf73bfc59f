"""Gated attention under torch.func: ``grad``, ``vjp`` and ``vmap``, alone and in one another.

torch.library's own derivative of an operator has no form that function transforms take. This one computes the same, and
maps over a dimension by folding it into the batch. Forward mode and second order are refused by name.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

_FORWARD = torch.ops.sluice.gated_attention.default
_BACKWARD = torch.ops.sluice.gated_attention_backward.default
ARGUMENTS, TENSORS = 20, 13  # of the forward: how many there are, and how many are tensors
MASK, OUTPUT_GATE, SEED = 9, 11, 12  # their places
FORWARD_MODE = (
    "sluice::gated_attention has no forward-mode derivative (torch.func.jvp, jacfwd, torch.autograd.forward_ad): use "
    "reverse mode (torch.func.grad, vjp, jacrev)"
)
SECOND_ORDER = "sluice::gated_attention_backward has no derivative: gated attention supports first-order gradients only"


def map_operator(operator, info, in_dims: tuple, *arguments) -> tuple[tuple, tuple]:
    """(outputs, dimensions) of ``operator`` over a mapped dimension, folded into the batch: a rule for vmap."""
    seed = SEED if len(arguments) == ARGUMENTS else SEED + 2  # of the backward dout and dlse go first
    if arguments[seed] is not None:
        raise NotImplementedError(
            "sluice::gated_attention has no dropout under torch.func.vmap, expected dropout_p = 0"
        )
    size, folded, batch = info.batch_size, [], None
    for argument, dim in zip(arguments, in_dims, strict=True):
        if isinstance(argument, Tensor):
            argument = argument.unsqueeze(0).expand(size, *argument.shape) if dim is None else argument.movedim(dim, 0)
            if batch is None:  # the first has the whole batch, a mask may be broadcast over it
                batch = argument.shape[1]
            argument = argument.expand(size, batch, *argument.shape[2:]).flatten(0, 1)
        folded.append(argument)
    outputs = operator(*folded)
    # What is left out is an empty tensor of one dimension.
    outputs = tuple(out.unflatten(0, (size, batch if out.dim() > 1 else 0)) for out in outputs)
    return outputs, (0,) * len(outputs)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return _BACKWARD(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(SECOND_ORDER)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(FORWARD_MODE)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return map_operator(_Backward.apply, info, in_dims, *arguments)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return _FORWARD(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, ctx.options = inputs[:TENSORS], inputs[TENSORS:]
        ctx.set_materialize_grads(False)
        out, lse, kept = output
        ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(*tensors, out, lse)

    @staticmethod
    def backward(ctx, dout, dlse, _):
        saved = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(saved[-2])
        *tensors, out, lse = saved
        mask, wants_mask = tensors[MASK], ctx.needs_input_grad[MASK]
        if wants_mask and not mask.is_cpu:  # there, sums over what it is broadcast over have no order of their own
            tensors[MASK] = mask.expand(*tensors[0].shape[:3], tensors[1].shape[2])
        *gradients, dmask, dgate = _Backward.apply(dout, dlse, *tensors, out, lse, *ctx.options, wants_mask)
        dmask = dmask.sum_to_size(mask.shape).to(mask.dtype) if wants_mask else None
        dgate = None if tensors[OUTPUT_GATE] is None else dgate
        return *gradients, *(None,) * (MASK - 5), dmask, None, dgate, None, *(None,) * len(ctx.options)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(FORWARD_MODE)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return map_operator(_Forward.apply, info, in_dims, *arguments)


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._are_functorch_transforms_active()


def transformed(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The operator within transforms of torch.func, which ask for it in this form."""
    return _Forward.apply(*arguments)


def _differentiate(function, operator, arguments: tuple):
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(FORWARD_MODE)  # the tangent would be lost without a word
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        if is_transformed():
            raise NotImplementedError(f"{operator.name()} under torch.func: call torch_sluice.gated_attention instead")
        return function.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's kernel for autograd."""
    return _differentiate(_Forward, _FORWARD, arguments)


def backward(*arguments) -> tuple[Tensor, ...]:
    """That of its backward pass, of which there is no derivative."""
    return _differentiate(_Backward, _BACKWARD, arguments)
