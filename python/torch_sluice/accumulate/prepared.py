"""Optimizers and models that Accelerate or Lightning have wrapped: which optimizer a session works on."""

import torch
from torch import nn


def inner_optimizer(optimizer, every: int | None) -> torch.optim.Optimizer:
    """The optimizer inside of Accelerate's and Lightning's wrappers, which decide for themselves when to call it.

    Raises:
        TypeError: it is no optimizer.
        ValueError: Accelerate accumulates itself, and ``every`` was given too.
    """
    while True:
        package = type(optimizer).__module__.partition(".")[0]
        if package == "accelerate":
            _check_accelerate(optimizer, every)
        elif package not in ("lightning", "lightning_fabric", "pytorch_lightning"):
            break
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer) or inner is optimizer:
            break
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    return optimizer


def _check_accelerate(optimizer, every: int | None) -> None:
    steps = getattr(getattr(optimizer, "gradient_state", None), "num_steps", 1)
    if every is not None and every > 1 and steps > 1:
        raise ValueError(
            f"every is {every} and Accelerate's gradient_accumulation_steps is {steps}, expected one of the two: "
            "Accelerate divides the loss and holds its optimizer back, which accumulate() without every leaves to it"
        )


def refuse_model(model: nn.Module) -> None:
    """Raises ValueError for a model whose gradients can't be taken one by one."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"model{'.' * bool(name)}{name} is a FullyShardedDataParallel, which keeps gradients in flat "
                "parameters of its own, expected torch.distributed.fsdp.fully_shard or DistributedDataParallel"
            )
