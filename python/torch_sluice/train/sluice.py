"""The sides that Sluice trains: the learning gate, and a plain sliding window of the same density."""

import bisect
import contextlib

import torch

from torch_sluice.attention import DensityController, Gate, parameter_groups
from torch_sluice.swap import swap_attention
from torch_sluice.train.settings import Settings, window_density
from torch_sluice.train.side import Side

GATE_RATE = 10.0  # the gates' learning rate / the model's


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
                self.model, settings.learning_rate, settings.weight_decay, gate_lr=GATE_RATE * settings.learning_rate
            ),
            settings.learning_rate,
            betas=(0.9, 0.98),
        )
        self.controller = DensityController(self.model, settings.target_density, settings.steps)
        self.open_accumulators()

    def open_accumulators(self) -> None:
        self._context = contextlib.ExitStack()
        self.accumulators = None
        try:
            from torch_sluice import accumulate
        except ImportError:
            return
        self.accumulators = self._context.enter_context(
            accumulate(self.model, self.optimizer, every=self.settings.micro_batches)
        )

    def run_micro_batches(self, batches: list[torch.Tensor]) -> float:
        total = 0.0
        for batch in batches:
            loss = self.loss_of(batch)
            (self.controller.loss(loss) / len(batches)).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.controller.step()
        return total / len(batches)

    @property
    def density(self) -> float:
        return self.controller.density

    def state_dict(self) -> dict:
        return {**super().state_dict(), "controller": self.controller.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.controller.load_state_dict(state["controller"])

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
