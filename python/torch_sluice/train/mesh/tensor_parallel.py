"""Tensor parallel by DTensor plans: heads and feed-forward units are divided over the ranks.

Embedding, norms and output layer are whole on every rank: over a vocabulary of bytes they are small.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.utils import parametrize

_WHOLE = Replicate()


class GateParallel(ParallelStyle):
    """Divides a ``torch_sluice.attention.Gate`` by heads: a and b come out for the heads of this rank."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def shard(_, gate, mesh):
            for name, parameter in list(gate.named_parameters(recurse=False)):
                part = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
                gate.register_parameter(name, nn.Parameter(part))

        def whole_inputs(_, inputs, mesh):
            return tuple(x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [_WHOLE]) for x in inputs)

        def own_logits(_, outputs, mesh):
            return tuple(logits.to_local() for logits in outputs)

        return distribute_module(module, device_mesh, shard, whole_inputs, own_logits)


def parallelize_layer(layer: nn.Module, mesh: DeviceMesh) -> None:
    """Divides a decoder layer of a Llama, before its attention is swapped.

    The inputs of attention and feed-forward become DTensors once, so that the gradients that reach them from several
    projections are summed over the ranks in one all_reduce.
    """
    plan = {
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": _WHOLE}, desired_input_kwarg_layouts={"hidden_states": _WHOLE}
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp": PrepareModuleInput(input_layouts=(_WHOLE,), desired_input_layouts=(_WHOLE,)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    # The seed gives every rank the same weights, so none has to send them.
    parallelize_module(layer, mesh, plan, src_data_rank=None)


def parallelize_gate(layer: nn.Module, mesh: DeviceMesh) -> None:
    """Divides the gate of a swapped layer."""
    parallelize_module(layer, mesh, {"self_attn.sluice_gate": GateParallel()}, src_data_rank=None)


class _AsDTensor(nn.Module):
    """Makes the DTensor of a parameter from this rank's part of it."""

    def __init__(self, like: DTensor):
        super().__init__()
        self.mesh, self.placements, self.size, self.strides = (
            like.device_mesh,
            like.placements,
            like.shape,
            like.stride(),
        )

    def forward(self, local: torch.Tensor) -> DTensor:
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.size, stride=self.strides
        )


def localize(module: nn.Module) -> None:
    """Turns parameters that are DTensors into plain ones, of which the DTensors are made when they are used.

    DistributedDataParallel takes plain parameters only, and an optimizer that steps plain tensors is many times faster.
    """
    for child in list(module.modules()):
        for name, parameter in list(child.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                delattr(child, name)
                child.register_parameter(name, nn.Parameter(parameter.detach().to_local().clone()))
                parametrize.register_parametrization(child, name, _AsDTensor(parameter), unsafe=True)


def layout_of(module: nn.Module, name: str) -> _AsDTensor | None:
    """What makes the DTensor of the parameter of this name (as in ``named_parameters``), None for a whole one."""
    owner, _, last = name.rpartition(".")
    return module.get_submodule(owner)[0] if last == "original" else None
