"""The sides that Sluice trains: the learning gate, and a plain sliding window of the same density."""

import bisect
import contextlib

import torch

from torch_sluice.accumulate import accumulate
from torch_sluice.attention import DensityController, Gate, parameter_groups
from torch_sluice.swap import swap_attention
from torch_sluice.train.settings import Settings, window_density
from torch_sluice.train.side import Side


class SluiceSide(Side):
    """The same model with its attention swapped and its gradients accumulated by Sluice."""

    title = "Sluice"
    gated = True

    def prepare(self) -> None:
        settings = self.settings
        swap_attention(
            self.model,
            target_density=settings.target_density,
            window=settings.local_window,
            sinks=settings.sinks,
        )
        self.optimizer = torch.optim.AdamW(
            parameter_groups(
                self.model, settings.learning_rate, settings.weight_decay, gate_lr=settings.gate_learning_rate
            ),
            settings.learning_rate,
            betas=(0.9, 0.98),
        )
        # While the goal falls, the gate also learns from pairs that it drops; after that it only keeps its density.
        self.controller = DensityController(self.model, steps=settings.steps, ramp=0.5, hard=0.5)
        self._context = contextlib.ExitStack()
        self.session = self._context.enter_context(accumulate(self.model, self.optimizer, seed=settings.seed))

    def add_penalty(self, loss: torch.Tensor) -> torch.Tensor:
        return self.controller.loss(loss)

    def after_step(self) -> None:
        self.controller.step()

    @property
    def density(self) -> float:
        return self.controller.density

    @property
    def half_share(self) -> float:
        return self.session.stats().fp16_share

    def state_dict(self) -> dict:
        return {
            **super().state_dict(),
            "controller": self.controller.state_dict(),
            "accumulators": self.session.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.controller.load_state_dict(state["controller"])
        self.session.load_state_dict(state["accumulators"])

    def close(self) -> None:
        self._context.close()
        self.controller.close()
        super().close()


class WindowSide(Side):
    """Keeps the nearest keys only: as many as give Sluice's target density. Sluice's operator skips the rest."""

    title = "window"
    gated = True

    def prepare(self) -> None:
        settings = self.settings
        swap_attention(
            self.model, target_density=settings.target_density, window=window_of(settings), sinks=settings.sinks
        )
        for gate in (module for module in self.model.modules() if isinstance(module, Gate)):
            gate.learn = False
            for parameter in gate.parameters():
                parameter.requires_grad_(False)
            gate.query_bias.fill_(-40.0)
            gate.key_bias.fill_(-40.0)
        super().prepare()

    @property
    def density(self) -> float:
        return self.settings.target_density


def window_of(settings: Settings) -> int:
    """The widest window that, with the sinks, keeps at most ``target_density`` of the causal pairs."""

    def density(window: int) -> float:
        return window_density(settings.context, window, settings.sinks)

    return max(1, bisect.bisect_right(range(1, settings.context + 1), settings.target_density, key=density))
