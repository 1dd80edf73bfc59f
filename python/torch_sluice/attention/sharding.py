"""Gates under FSDP2: each a group of parameters of its own."""

from torch import nn

from torch_sluice.attention.gate import Gate


def shard_gates(model: nn.Module, **options) -> nn.Module:
    """Applies FSDP2 to each gate of ``model``. Call it before ``fully_shard`` of the layers that hold them::

        torch_sluice.attention.shard_gates(model, mesh=mesh)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    A gate is float32 whatever its layer is, and ``fully_shard`` takes parameters of one dtype. Gates that are sharded
    already stay as they are; a model without gates does, too. Under a ``MixedPrecisionPolicy`` of the layers the gates
    keep computing in float32.

    Args:
        model: any module; its gates are found by their class, ``torch_sluice.attention.Gate``.
        options: of ``torch.distributed.fsdp.fully_shard``, as the layers get them, but for ``mp_policy``. By default
            ``reshard_after_forward=False``: a gate is small, and so needn't be gathered again for the backward pass.

    Returns:
        model.

    Raises:
        ValueError: a module that holds a gate is sharded already, or options has ``mp_policy``.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if "mp_policy" in options:
        raise ValueError(f"mp_policy is {options['mp_policy']}, expected none: gates are computed in float32")
    gates = []
    for name, module in model.named_modules():
        if not isinstance(module, Gate) or isinstance(module, FSDPModule):
            continue
        above = ["", *(name[:i] for i, letter in enumerate(name) if letter == ".")] if name else []
        for holder in above:
            if isinstance(model.get_submodule(holder), FSDPModule):
                raise ValueError(
                    f"{holder or 'model'} is sharded already, expected its gate {name} to be sharded before: call "
                    "shard_gates before fully_shard"
                )
        gates.append(module)
    for gate in gates:
        fully_shard(gate, **{"reshard_after_forward": False, **options})
    return model
