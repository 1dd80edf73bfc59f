"""One of the trained sides: a model, its optimizer and, for Sluice, the gate controller and the accumulators."""

import contextlib
import math
import time
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from torch_sluice.monitor import Monitor
from torch_sluice.train.model import build_model, predict
from torch_sluice.train.settings import Settings


@dataclass
class History:
    """What happened at each step, and at the steps where held-out text was read."""

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    evaluated_steps: list[int] = field(default_factory=list)
    heldout_loss: list[float] = field(default_factory=list)
    heldout_accuracy: list[float] = field(default_factory=list)


class Side:
    """Trains one model. Each side has random numbers of its own, so that sides do not disturb each other."""

    title = "dense"
    gated = False

    def __init__(self, settings: Settings):
        self.settings = settings
        self.history = History()
        self.monitor: Monitor | None = None
        self.model = build_model(settings)
        self._random_state = torch.Generator().manual_seed(settings.seed).get_state()
        self.prepare()
        for group in self.optimizer.param_groups:
            group["rate_factor"] = group["lr"] / settings.learning_rate

    def prepare(self) -> None:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, self.settings.learning_rate, betas=(0.9, 0.98), weight_decay=self.settings.weight_decay
        )

    def train_step(self, batches: list[torch.Tensor], step: int) -> None:
        """One optimizer step over the micro-batches, int64 [size, context + 1] each; its figures go to the history."""
        rate = learning_rate(self.settings, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        with self.own_random_numbers():
            if self.monitor is not None:
                self.monitor.begin_step()
            start = time.perf_counter()
            loss = self.run_micro_batches(batches)
            seconds = time.perf_counter() - start
            if self.monitor is not None:
                self.monitor.pause_step()
        self.history.loss.append(loss)
        self.history.seconds.append(seconds)
        self.history.density.append(self.density)
        if self.monitor is not None:
            self.monitor.end_step(self.settings.tokens_per_step, {"loss": loss, "density": self.density})

    def run_micro_batches(self, batches: list[torch.Tensor]) -> float:
        """An ordinary loop with gradient accumulation, the same for every side. Returns the mean loss."""
        total = 0.0
        for batch in batches:
            loss = self.loss_of(batch)
            (self.add_penalty(loss) / len(batches)).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after_step()
        return total / len(batches)

    def add_penalty(self, loss: torch.Tensor) -> torch.Tensor:
        """What is trained on, for the loss of a micro-batch."""
        return loss

    def after_step(self) -> None:
        """Called after each optimizer step."""

    def loss_of(self, batch: torch.Tensor) -> torch.Tensor:
        logits = predict(self.model, batch[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    @property
    def density(self) -> float:
        """Kept pairs / causal pairs while training, at the latest step."""
        return 1.0

    @property
    def half_share(self) -> float:
        """Share of the gradient elements that are accumulated in 16 bits."""
        return 0.0

    @contextlib.contextmanager
    def own_random_numbers(self):
        outside = torch.get_rng_state()
        torch.set_rng_state(self._random_state)
        try:
            yield
        finally:
            self._random_state = torch.get_rng_state()
            torch.set_rng_state(outside)

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random_state": self._random_state,
            "history": dict(vars(self.history)),
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._random_state = torch.Generator().set_state(state["random_state"]).get_state()  # set_state checks it
        self.history = History(**{name: list(state["history"][name]) for name in vars(self.history)})

    def close(self) -> None:
        """Ends what the side holds open."""
        if self.monitor is not None:
            self.monitor.close()


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return settings.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
