"""The parameters of this rank under the names of the whole model, and what has to be done to them over ranks."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from torch_sluice.train.mesh.stage import Stage
from torch_sluice.train.mesh.tensor_parallel import layout_of

_TIED = "embed_tokens.weight"  # is also the weight of the output layer


@dataclass
class Entry:
    """A parameter: its name in the whole model, and what makes the DTensor of this rank's part (None: is whole)."""

    name: str
    parameter: nn.Parameter
    layout: nn.Module | None
    replicas: int  # ranks of its stage that hold the same numbers
    copy: bool  # of the tied weight, of which the first stage holds the original

    @property
    def local_grad(self) -> torch.Tensor | None:
        grad = self.parameter.grad
        return grad.to_local() if isinstance(grad, DTensor) else grad

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """The DTensor that a tensor of this parameter's kind is a part of; the tensor itself where it is whole."""
        return tensor if self.layout is None else self.layout(tensor)


def whole_name(name: str) -> str:
    """The parameter's name in the whole model, from its name in a stage."""
    name = re.sub(r"\.parametrizations\.(\w+)\.original$", r".\1", name)
    return _TIED if name == "lm_head.weight" else name


class Parameters:
    """The parameters of the stages of this rank."""

    def __init__(self, stages: list[Stage], mesh):
        self._group = mesh.get_group("pp")
        ranks = mesh["dp"].size() * mesh["tp"].size()
        self.entries: list[Entry] = []
        for stage in stages:
            for name, parameter in stage.named_parameters():
                layout = layout_of(stage, name)
                parts = _count_parts(parameter if layout is None else layout)
                copy = name == "lm_head.weight"
                self.entries.append(Entry(whole_name(name), parameter, layout, ranks // parts, copy))
        self._tied = [entry for entry in self.entries if entry.name == _TIED]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    @torch.no_grad()
    def average_gradients(self, group) -> None:
        """Over data-parallel ranks, in one message."""
        grads = [entry.local_grad for entry in self.entries if entry.local_grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        distributed.all_reduce(flat, distributed.ReduceOp.AVG, group)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    @torch.no_grad()
    def tie_gradients(self) -> None:
        """Gives both copies of the tied weight, that of the first stage and that of the last, the sum of gradients."""
        if self._group.size() == 1:
            return
        total = sum(entry.local_grad for entry in self._tied) if self._tied else None
        total = self._sum_over_pipeline(total)
        for entry in self._tied:
            entry.local_grad.copy_(total)

    def _sum_over_pipeline(self, total: torch.Tensor | None) -> torch.Tensor | None:
        """Over the ranks of the pipeline that hold a copy: the first and the last, or one alone."""
        if not hasattr(self, "_holders"):
            holds = [None] * self._group.size()
            distributed.all_gather_object(holds, bool(self._tied), group=self._group)
            self._holders = [rank for rank, yes in enumerate(holds) if yes]
        if total is None or len(self._holders) == 1:
            return total
        other = next(rank for rank in self._holders if rank != self._group.rank())
        theirs, mine = torch.empty_like(total), total.contiguous()
        send = distributed.P2POp(distributed.isend, mine, group=self._group, group_peer=other)
        receive = distributed.P2POp(distributed.irecv, theirs, group=self._group, group_peer=other)
        for work in distributed.batch_isend_irecv([send, receive]):
            work.wait()
        return mine + theirs if self._group.rank() < other else theirs + mine

    def sum_of_squares(self) -> float:
        """Of all gradients, each counted once over all ranks when this is added up over them."""
        total = 0.0
        for entry in self.entries:
            grad = entry.local_grad
            if grad is not None and not entry.copy:
                total += float(torch.linalg.vector_norm(grad, dtype=torch.float64)) ** 2 / entry.replicas
        return total

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        if factor < 1.0:
            for entry in self.entries:
                if entry.local_grad is not None:
                    entry.local_grad.mul_(factor)


def _count_parts(holder) -> int:
    """Into how many parts a parameter is divided over the ranks of its stage."""
    parts = 1
    for axis, placement in enumerate(getattr(holder, "placements", ())):
        if not placement.is_replicate():
            mesh = holder.device_mesh if isinstance(holder, DTensor) else holder.mesh
            parts *= mesh.size(axis)
    return parts
