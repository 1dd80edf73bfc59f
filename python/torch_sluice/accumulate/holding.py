"""Whether anybody but a parameter itself holds its ``.grad`` or memory of it."""

import functools
import sys
from types import SimpleNamespace

import torch

from torch_sluice.accumulate.access import read_grad, write_grad
from torch_sluice.accumulate.sharded import is_dtensor

_storage_uses = getattr(torch._C, "_storage_Use_Count", None)


def is_held(parameter: torch.Tensor) -> bool:
    """Whether hiding ``parameter.grad`` could be noticed: somebody has the tensor, a view, or an array of its memory.

    Who has one sees later gradients in it, since autograd adds in place; so it must stay where it is.
    """
    if _storage_uses is None or not hasattr(torch.Tensor, "_use_count"):
        return True
    grad = read_grad(parameter)
    if is_dtensor(grad):
        return (sys.getrefcount(grad), *_count(grad._local_tensor)) != _counts_if_alone()[1]
    return grad.layout != torch.strided or (sys.getrefcount(grad), *_count(grad)) != _counts_if_alone()[0]


def _count(tensor: torch.Tensor) -> tuple[int, int, int]:
    return sys.getrefcount(tensor), tensor._use_count(), _storage_uses(tensor.untyped_storage()._cdata)


@functools.cache
def _counts_if_alone() -> tuple[tuple, tuple]:
    """The counts of a gradient that nobody else holds, as this torch and this Python count: plain, and sharded."""
    parameter = torch.zeros(1, requires_grad=True)
    write_grad(parameter, torch.zeros(1))
    grad = read_grad(parameter)
    references = sys.getrefcount(grad)
    plain = (references, *_count(grad))
    holder = SimpleNamespace(_local_tensor=torch.zeros(1))  # as a DTensor holds its part
    return plain, (references, *_count(holder._local_tensor))
