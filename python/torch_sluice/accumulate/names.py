"""Names of parameters that stay the same whatever the model is wrapped in."""

import torch
from torch import nn

# Modules put between a model and its layers by torch.compile, activation checkpointing, FSDP1 and Lightning's Fabric.
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module"}
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "_FabricModule", "OptimizedModule")


def names_of_parameters(model: nn.Module) -> dict[torch.Tensor, str]:
    """Parameter -> its name in the model that is inside of all wrappers."""
    while type(model).__name__ in _WRAPPERS:
        inner = [module for name, module in model.named_children() if name == "module" or name in _WRAPPED]
        if not inner:
            break
        model = inner[0]
    return {
        parameter: ".".join(part for part in name.split(".") if part not in _WRAPPED)
        for name, parameter in model.named_parameters()
    }
