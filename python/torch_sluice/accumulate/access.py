"""Who looks at ``.grad``: while a session is open, every look from Python goes through here.

The classes of the session's parameters get a ``grad`` property that shows a hidden sum to whoever reads it, and that
drops or replaces it where somebody writes. So optimizers, clipping, hooks, GradScaler, FSDP2 and a user's own lines see
what plain PyTorch would show. Calls that touch all gradients at once, ``zero_grad`` and the ``clip_grad_`` functions,
are replaced too: they would bring every sum to light only to drop it, or clip a window that is not full. After the last
session everything is as it was.
"""

import functools

import torch
from torch import nn

from torch_sluice.accumulate import clipping

_real = torch._C.TensorBase.grad
_gradients = {}  # id(parameter) -> its Gradient; that one keeps the parameter, so the number stays its own
_patches = []  # (object, name, what stood there itself or _inherited), in the order in which they were made
_inherited = object()


def read_grad(parameter: torch.Tensor) -> torch.Tensor | None:
    """What is in ``.grad`` for torch itself: None while the sum is hidden."""
    return _real.__get__(parameter)


def write_grad(parameter: torch.Tensor, value: torch.Tensor | None) -> None:
    """Puts a tensor into the ``.grad`` that torch itself sees."""
    _real.__set__(parameter, value)


def gradient_of(parameter: torch.Tensor):
    """The Gradient of a parameter that a session accumulates, else None."""
    return _gradients.get(id(parameter))


def attach(gradient) -> None:
    """Lets looks at the ``.grad`` of this Gradient's parameter go through it.

    Raises:
        RuntimeError: another session accumulates this parameter.
    """
    other = _gradients.get(id(gradient.parameter))
    if other is not None:
        raise RuntimeError(
            f"parameter {gradient.name} is accumulated by another open session already, expected one session for each "
            "parameter; leave that one first"
        )
    if not _patches:
        _patch_functions()
    kind = type(gradient.parameter)
    if not _is_patched(kind, "grad"):
        _patch(kind, "grad", property(_get, _set, _delete))
    for owner in (*type(gradient.session.optimizer).__mro__, *type(gradient.session.model).__mro__):
        if "zero_grad" in vars(owner) and not _is_patched(owner, "zero_grad"):
            _patch(owner, "zero_grad", _around_own_zero_grad(owner.zero_grad))
    _gradients[id(gradient.parameter)] = gradient


def detach(gradient) -> None:
    """Looks at ``.grad`` of this parameter are torch's own again."""
    if _gradients.get(id(gradient.parameter)) is gradient:
        del _gradients[id(gradient.parameter)]
    if not _gradients:
        for owner, name, before in reversed(_patches):
            if before is _inherited:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        _patches.clear()
        clipping.restore()


def _is_patched(owner, name: str) -> bool:
    return any(patched is owner and known == name for patched, known, _ in _patches)


def _patch(owner, name: str, replacement) -> None:
    _patches.append((owner, name, vars(owner).get(name, _inherited)))
    setattr(owner, name, replacement)


@torch._disable_dynamo  # a compiler would make one program of it for each parameter
def _get(self):
    gradient = _gradients.get(id(self))
    if gradient is not None and not gradient.look():
        return None
    return _real.__get__(self)


def _set(self, value):
    gradient = _gradients.get(id(self))
    if gradient is None:
        _real.__set__(self, value)
    else:
        gradient.replace(value)


def _delete(self):
    _set(self, None)


def _patch_functions() -> None:
    for owner in (torch.optim.Optimizer, nn.Module):
        _patch(owner, "zero_grad", _around_zero_grad(owner.zero_grad))
    clipping.replace(_gradients)


def _around_zero_grad(original):
    """For torch's own."""

    @torch._disable_dynamo
    @functools.wraps(original)
    def zero_grad(self, set_to_none: bool = True):
        touched = _touched_by(self)
        try:
            for session, gradients in touched.items():
                session.zero_gradients(gradients, set_to_none)
            return original(self, set_to_none)
        finally:
            _see_again(touched)

    return zero_grad


def _around_own_zero_grad(original):
    """For a class that has one of its own, which may do it in another way, or to some gradients only: what it does to
    ``.grad`` counts, but for gradients that it must leave alone."""

    @functools.wraps(original)
    def zero_grad(self, *args, **kwargs):
        touched = _touched_by(self)
        try:
            for session, gradients in touched.items():
                if session.window.is_open:
                    session.zero_gradients(gradients, True)
            result = original(self, *args, **kwargs)
            for session in touched:
                session.note_zero_grad()
            return result
        finally:
            _see_again(touched)

    return zero_grad


def _touched_by(owner) -> dict:
    """Session -> those of its gradients that ``owner.zero_grad()`` is about. Within another zero_grad, those that it
    may touch."""
    if isinstance(owner, nn.Module):
        parameters = list(owner.parameters())
    else:
        parameters = [parameter for group in owner.param_groups for parameter in group["params"]]
    touched = {}
    for parameter in parameters:
        gradient = _gradients.get(id(parameter))
        if gradient is not None and not gradient.blind:
            touched.setdefault(gradient.session, []).append(gradient)
    return touched


def _see_again(touched: dict) -> None:
    for gradients in touched.values():
        for gradient in gradients:
            gradient.blind = False
