"""Parameters that are DTensors (FSDP2, tensor parallel): what is accumulated is this rank's part of them."""

import sys

import torch
from torch import distributed


def is_dtensor(tensor: torch.Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there are none
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, in the memory that it has there; any other tensor as it is."""
    return tensor.detach().to_local() if is_dtensor(tensor) else tensor


def local_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of ``parameter.grad``, divided over the ranks as the parameter is.

    Operators may leave sums over ranks open in the gradient of a DTensor ("partial"): they are made here, before the
    gradient is rounded to the format of its accumulator. All ranks of the mesh come here in the same order, that of
    their backward passes.
    """
    grad = parameter.grad
    if is_dtensor(parameter) and is_dtensor(grad) and grad.placements != parameter.placements:
        grad = grad.detach().redistribute(placements=parameter.placements)
    return local_part(grad)


def like_parameter(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A gradient for ``parameter`` of this rank's part of it."""
    if not is_dtensor(parameter):
        return local
    return type(parameter).from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip


def any_rank(flag: bool, parameters) -> bool:
    """Whether the flag is set on any rank that holds a part of the parameters: all of them must do the same."""
    meshes = {parameter.device_mesh for parameter in parameters if is_dtensor(parameter)}
    groups = {}  # the same ranks may be reached by several meshes
    for mesh in sorted(meshes, key=lambda mesh: (mesh.ndim, str(mesh.mesh_dim_names))):
        for group in mesh.get_all_groups():
            groups.setdefault(group.group_name, (group, mesh.device_type))
    for group, device in groups.values():
        value = torch.tensor(float(flag), device=device)
        distributed.all_reduce(value, distributed.ReduceOp.MAX, group)
        flag = bool(value)
    return flag
