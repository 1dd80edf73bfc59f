"""Parameters that are DTensors (FSDP2, tensor parallel): what is accumulated is this rank's part of them."""

import sys

import torch


def is_dtensor(tensor: torch.Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there are none
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, in the memory that it has there; any other tensor as it is."""
    return tensor.detach().to_local() if is_dtensor(tensor) else tensor


def local_gradient(grad: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a gradient of ``parameter``, divided over the ranks as the parameter is.

    Operators may leave sums over ranks open in the gradient of a DTensor ("partial"): they are made here, before the
    gradient is rounded to the format of its accumulator. All ranks of the mesh come here in the same order, that of
    their backward passes.
    """
    if is_dtensor(parameter) and is_dtensor(grad) and grad.placements != parameter.placements:
        grad = grad.detach().redistribute(placements=parameter.placements)
    return local_part(grad)


def like_parameter(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A gradient for ``parameter`` of this rank's part of it."""
    if not is_dtensor(parameter):
        return local
    # Not from_local(), whose gradient is a view and so keeps another tensor alive.
    return type(parameter)(local, parameter._spec, requires_grad=False)
