"""What a model of ``benchmarks.compress_models`` brings along: its data in parts that share nothing, and its metric."""

import hashlib
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_sluice.attention import Gate

Batch = tuple[Any, Any]  # inputs of one call (a tensor, or a tuple of tensors), and what is right about them


class MissingPackageError(RuntimeError):
    """A package that holds a model's weights, or that reads them, is not installed."""


@dataclass
class Task:
    """One model with all that is needed to compress and to judge it.

    Attributes:
        name: for ``--model``; title: what it is, for people.
        metric_name: what ``metric`` returns, in [0, 1], higher is better.
        model: float32, in evaluation mode.
        selection: batches that ``compress()`` sees: it measures sensitivities and its stopping rule on them.
        heldout: batches of the final metric; nothing of what they hold is in ``selection`` or in training data.
        metric: (a model or any callable on its inputs, batches) -> float.
        draw_inputs: batch size -> inputs of one call, for timing.
        train_step: (model, step) -> loss: one step's loss on training data, with its graph; or None.
        train_steps, learning_rate: how long a round of fine-tuning goes on, and Adam's rate for it.
        train_mode: whether it is done in training mode, where dropout acts and batch norms follow the batch.
        dense: the same task's model with ordinary attention, if ``model`` has another: what peers can run.
        notes: sentences about the model or the data that belong under the table.
    """

    name: str
    title: str
    metric_name: str
    model: nn.Module
    selection: list[Batch]
    heldout: list[Batch]
    metric: Callable[[Callable, list[Batch]], float]
    draw_inputs: Callable[[int], Any]
    train_step: Callable[[nn.Module, int], Tensor] | None = None
    train_steps: int = 0
    learning_rate: float = 1e-3
    train_mode: bool = True
    dense: nn.Module | None = None
    notes: list[str] = field(default_factory=list)


def call(model: Callable, inputs: Any) -> Tensor:
    """The model on a tensor or a tuple of positional inputs, without gradients."""
    with torch.no_grad():
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def call_batches(model: Callable, batches: list[Batch]) -> Tensor:
    """The outputs of all batches, one after the other.

    Raises:
        ValueError: there is no batch, or an output is not finite.
    """
    if not batches:
        raise ValueError("batches is empty, expected at least one")
    outputs = torch.cat([call(model, inputs) for inputs, _ in batches])
    if not outputs.isfinite().all():
        raise ValueError("the model's outputs are not finite")
    return outputs


def targets_of(batches: list[Batch]) -> Tensor:
    return torch.cat([targets for _, targets in batches])


def make_batches(inputs: Any, targets: Tensor, size: int) -> list[Batch]:
    """Cuts a tensor, or a tuple of tensors, and its targets along the first dimension."""
    if isinstance(inputs, tuple):
        parts = zip(*(tensor.split(size) for tensor in inputs), strict=True)
    else:
        parts = inputs.split(size)
    return list(zip(parts, targets.split(size), strict=True))


def mean_cosine(model: Callable, reference: Callable, batches: list[Batch]) -> float:
    """How alike the outputs of two models are: the mean cosine between those of each input."""
    outputs, wanted = call_batches(model, batches), call_batches(reference, batches)
    return torch.cosine_similarity(outputs.flatten(1), wanted.flatten(1)).mean().item()


class FineTune:
    """``finetune`` of ``torch_sluice.compress``: Adam on a task's ``train_step``, its rate falling to zero in a round.

    Gates stay as they are, since their density would drift without its controller.
    """

    def __init__(self, task: Task):
        self.task = task

    def __call__(self, model: nn.Module, step: int) -> None:
        task = self.task
        if step == 0:
            gates = {id(p) for module in model.modules() if isinstance(module, Gate) for p in module.parameters()}
            trained = [p for p in model.parameters() if p.requires_grad and id(p) not in gates]
            self.optimizer = torch.optim.Adam(trained, task.learning_rate)
        model.train(task.train_mode)
        for group in self.optimizer.param_groups:
            group["lr"] = task.learning_rate * 0.5 * (1 + math.cos(math.pi * step / task.train_steps))
        loss = task.train_step(model, step)
        if not loss.isfinite():
            raise RuntimeError(f"the loss of {task.name}'s fine-tuning is {loss.item()} at step {step}")
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def split_by_name(names: list[str], shares: dict[str, float], seed: int = 0) -> dict[str, list[str]]:
    """Deals names out to parts by hash, so that a part holds no topic whole and stays the same when names are added."""
    parts = {part: [] for part in shares}
    for name in sorted(names):
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        place = random.Random(digest).random() * sum(shares.values())
        bounds = zip(shares, itertools.accumulate(shares.values()), strict=True)
        parts[next(part for part, bound in bounds if place < bound)].append(name)
    return parts
