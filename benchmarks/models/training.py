"""How the models that are trained here are trained: AdamW with one cycle of its rate, from a seed, kept in a cache."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.models.cache import train_once

Loss = Callable[[nn.Module, int], Tensor]  # (model, step) -> loss on training data that the step decides


def trained(
    name: str, recipe: str, build: Callable[[], nn.Module], loss: Loss, steps: int, rate: float = 2e-3
) -> nn.Module:
    """The model that ``build()`` gives, trained for so many steps now or earlier, in evaluation mode.

    Args:
        name: begins the cached file's name.
        recipe: what decides the result beside ``steps`` and ``rate``: sizes, and a fingerprint of the data.
        rate: the largest of the cycle.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = build()
        recipe = f"{name} 1: {recipe} {steps} {rate}"
        model.load_state_dict(train_once(name, recipe, lambda: _train(model, loss, steps, rate)))
    return model.eval()


def _train(model: nn.Module, loss: Loss, steps: int, rate: float) -> dict[str, Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        loss(model, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.state_dict()
