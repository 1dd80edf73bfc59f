"""``torch.nn.utils.clip_grad_norm_`` and ``clip_grad_value_`` for gradients that a session keeps.

They are found by whatever name a program imported them under: what is replaced is the function inside of torch's own
wrapper. Float16 sums are not brought to light for their norm, which the kernels have measured already, and clipping
multiplies one number. In a window of ``every=N`` that is not in its last micro-batch, both leave the sums as they are.
"""

import functools
import math

import torch
from torch.nn import utils

from torch_sluice.accumulate.sharded import is_dtensor

_originals = []  # (the closure cell of the wrapper, torch's function)


def replace(gradients: dict) -> None:
    """Has both functions know these gradients, id(parameter) -> Gradient."""
    for function, make in ((utils.clip_grad_norm_, _clip_norm), (utils.clip_grad_value_, _clip_value)):
        cell = _cell_of(function)
        if cell is not None:  # else they see gradients as everybody does, by reading .grad
            _originals.append((cell, cell.cell_contents))
            cell.cell_contents = make(cell.cell_contents, gradients)


def restore() -> None:
    """Both are torch's own again."""
    for cell, original in _originals:
        cell.cell_contents = original
    _originals.clear()


def _cell_of(function):
    """Where torch's ``_no_grad`` wrapper keeps the function that it calls."""
    inner = getattr(function, "__wrapped__", None)
    for cell in getattr(function, "__closure__", None) or ():
        if inner is not None and cell.cell_contents is inner:
            return cell
    return None


def _as_list(parameters) -> list[torch.Tensor]:
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


def _clip_norm(original, gradients):
    def clip_grad_norm_(parameters, max_norm, norm_type=2.0, error_if_nonfinite=False, foreach=None):
        parameters = _as_list(parameters)
        if not parameters:
            return original((one for one in ()), max_norm, norm_type, error_if_nonfinite, foreach)
        known = {id(parameter): gradients.get(id(parameter)) for parameter in parameters}
        held = {key for key, gradient in known.items() if gradient is not None and gradient.session.window.is_held}
        measured = {}
        distinct = len(known) == len(parameters) and not any(is_dtensor(parameter) for parameter in parameters)
        if float(norm_type) == 2.0 and distinct:
            for key, gradient in known.items():
                norm = gradient.hidden_norm() if gradient is not None else None
                if norm is not None:
                    measured[key] = norm
        if not held and not measured:
            return original(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
        with_gradient = [one for one in parameters if id(one) in measured or one.grad is not None]
        others = [parameter for parameter in parameters if id(parameter) not in measured]
        grads = [parameter.grad for parameter in others if parameter.grad is not None]
        total = utils.get_total_norm(grads, norm_type, False, foreach)
        if measured:
            total = (total.double().square() + math.fsum(norm**2 for norm in measured.values())).sqrt()
        if error_if_nonfinite and not held and not torch.isfinite(total):
            return original(parameters, max_norm, norm_type, error_if_nonfinite, foreach)  # which raises
        utils.clip_grads_with_norm_([one for one in others if id(one) not in held], max_norm, total, foreach)
        factor = min(1.0, float(max_norm) / (float(total) + 1e-6))
        for key in measured.keys() - held:
            known[key].multiply(factor)
        return _as_that_of(with_gradient, total)

    return clip_grad_norm_


def _as_that_of(parameters: list[torch.Tensor], total: torch.Tensor) -> torch.Tensor:
    """The norm in the dtype and on the device that torch gives it for gradients of these parameters."""
    if not parameters:
        return total
    dtype = functools.reduce(torch.promote_types, {parameter.dtype for parameter in parameters})
    return total.to(parameters[0].device, torch.zeros((), dtype=dtype).abs().dtype)  # of complex numbers a real one


def _clip_value(original, gradients):
    def clip_grad_value_(parameters, clip_value, foreach=None):
        def is_held(parameter):
            gradient = gradients.get(id(parameter))
            return gradient is not None and gradient.session.window.is_held

        parameters = [one for one in _as_list(parameters) if not is_held(one) and one.grad is not None]
        return original(parameters, clip_value, foreach) if parameters else None

    return clip_grad_value_
