"""What ranks decide alike: whether a step is skipped, and which sums go on in float32.

The ranks are those that reduce gradients together: the process group of DistributedDataParallel, or the mesh of a
DTensor (FSDP2, tensor parallel). After DDP has averaged, every rank has the same gradients before it, so looking at
them gives the same answer without a word. Parts of DTensors differ, so there the ranks ask each other.

Formats are agreed on while training goes on: at each step a rank tells the others which of its sums it wants in float32
and does not wait; at the next step the answers have come, behind that step's own reductions. A sum goes to float16 when
no rank is against it, on all ranks in the same window. It leaves float16 at once where its error asks for that, and a
window later on the others.
"""

import torch
from torch import distributed

from torch_sluice.accumulate.sharded import is_dtensor


class Agreement:
    """Small reductions over the ranks that share gradients; without such ranks nothing is sent."""

    def __init__(self):
        self._asked = []  # (work, values on the device, the gradients that they are about)

    def skips(self, spoiled: bool, gradients) -> bool:
        """Whether any rank that holds a part of these gradients has found one that is not finite."""
        for group, device in _mesh_groups(gradients).values():
            value = torch.tensor(float(spoiled), device=device)
            distributed.all_reduce(value, distributed.ReduceOp.MAX, group)
            spoiled = bool(value)
        return spoiled

    def ask_formats(self, gradients) -> None:
        """Tells the other ranks which sums this one wants in float32."""
        gradients = [one for one in gradients if one.session.policy.is_measured]
        groups = _mesh_groups(gradients)
        for gradient in gradients:
            reduction = gradient.reduction
            if reduction is not None:
                groups.setdefault(reduction.group.group_name, (reduction.group, reduction.device))
        for name, (group, device) in groups.items():
            if distributed.get_world_size(group) == 1:
                continue
            about = [one for one in gradients if name in _group_names(one)]
            for gradient in about:
                if not gradient.record.heard:
                    gradient.record.others_want_fp32 = True  # until they have said otherwise
            wishes = torch.tensor([one.record.prefers_fp32 for one in about], dtype=torch.uint8, device=device)
            work = distributed.all_reduce(wishes, distributed.ReduceOp.MAX, group, async_op=True)
            self._asked.append((work, wishes, about))

    def close(self, in_peace: bool) -> None:
        """Ends what is under way; after an exception nobody waits, since other ranks may be gone."""
        if in_peace:
            self.collect()
        self._asked.clear()

    def collect(self) -> None:
        """Waits for the answers to ask_formats(), and keeps them with the records: they are part of a saved state."""
        asked, self._asked = self._asked, []
        for work, wishes, about in asked:
            work.wait()
            for gradient, wanted in zip(about, wishes.tolist(), strict=True):
                gradient.record.answer = max(gradient.record.answer, int(wanted))

    def hear_formats(self, gradients) -> None:
        """Follows the answers to ask_formats()."""
        self.collect()
        for record in (gradient.record for gradient in gradients):
            if record.answer >= 0:
                record.others_want_fp32 = record.answer > 0 and not record.prefers_fp32
                record.answer, record.heard = -1, True


def _group_names(gradient) -> set[str]:
    names = set()
    if gradient.reduction is not None:
        names.add(gradient.reduction.group.group_name)
    if is_dtensor(gradient.parameter):
        names.update(group.group_name for group in gradient.parameter.device_mesh.get_all_groups())
    return names


def _mesh_groups(gradients) -> dict:
    """Name -> (process group, kind of device) of the meshes that the parameters are divided over, each once, in an
    order that all ranks have."""
    meshes = {one.parameter.device_mesh for one in gradients if is_dtensor(one.parameter)}
    groups = {}  # the same ranks may be reached by several meshes
    for mesh in sorted(meshes, key=lambda mesh: (mesh.ndim, str(mesh.mesh_dim_names))):
        for group in mesh.get_all_groups():
            groups.setdefault(group.group_name, (group, mesh.device_type))
    return groups
