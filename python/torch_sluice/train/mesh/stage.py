"""A stage of the pipeline: some layers of the model, the first with the embedding, the last with the output layer."""

import numpy as np
import torch
from torch import nn

from torch_sluice.attention import DensityController
from torch_sluice.attention.recomputed import remember
from torch_sluice.train.model import VOCABULARY, build_model
from torch_sluice.train.settings import Settings


class _AddPenalty(torch.autograd.Function):
    """Passes activations on, and gives a penalty the gradient that it would have as part of the loss.

    Only the last stage of a pipeline computes the loss, and the gates are in all of them.
    """

    @staticmethod
    def forward(ctx, hidden, penalty, scale):
        ctx.scale = scale
        return hidden.clone()  # zero-bubble schedules detach the outputs of stages, which views can't be

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient.new_full((), ctx.scale), None


class StageController(DensityController):
    """A controller for the gates of this rank, whose layers report one by one. Pairs are counted over all ranks."""

    def penalty(self) -> torch.Tensor:
        """strength * mean gate of the attention calls since the last one."""
        mean, owed = self._listen(torch.zeros((), dtype=torch.float64))
        return remember(self.strength * mean, owed)


class Position:
    """Where in the training this rank is: what a layer draws at random depends on that and on nothing else."""

    def __init__(self, seed: int):
        self.seed, self.step, self.first_micro = seed, 0, 0

    def reseed(self, micro: int, layer: int) -> None:
        """Random numbers for a layer in the micro-batch with this number on this rank."""
        key = np.random.SeedSequence([self.seed, self.step, self.first_micro + micro, layer])
        # torch.manual_seed would also note the seed, with a stack trace, for each kind of device that there might be.
        torch.default_generator.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))


class Stage(nn.Module):
    """Layers ``layers`` of the model, from tokens int64 [B, N] or activations [B, N, width] to activations or logits.

    Parameters have the names that they have in the whole model, without "model.".
    """

    def __init__(self, settings: Settings, position: Position, layers: range):
        super().__init__()
        whole = build_model(settings)
        self.first, self.last = layers.start == 0, layers.stop == settings.layers
        self.position, self.width, self.micro = position, settings.width, 0
        self.controller: StageController | None = None
        self.penalty_share = self.penalty_scale = 0.0
        self.rotary_emb = whole.model.rotary_emb
        self.layers = nn.ModuleDict({str(index): whole.model.layers[index] for index in layers})
        if self.first:
            self.embed_tokens = whole.model.embed_tokens
        if self.last:
            self.norm = whole.model.norm
            if not self.first:  # the weight that the embedding has on the first stage
                self.lm_head = nn.Linear(settings.width, VOCABULARY, bias=False)
                self.lm_head.weight = whole.model.embed_tokens.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        training = self.training and torch.is_grad_enabled()
        if self.first:
            hidden = self.embed_tokens(hidden)
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        rotation = self.rotary_emb(hidden, position_ids=positions)
        penalty = 0.0
        for index, layer in self.layers.items():
            if training:
                self.position.reseed(self.micro, int(index))
            hidden = layer(
                hidden, attention_mask=None, position_ids=positions, position_embeddings=rotation, use_cache=False
            )
            if training and self.controller is not None:
                penalty = penalty + self.controller.penalty() * self.penalty_share
        if training and self.controller is not None:
            hidden = _AddPenalty.apply(hidden, penalty, self.penalty_scale)
        if training:
            self.micro += 1
        if not self.last:
            return hidden
        return nn.functional.linear(self.norm(hidden), (self.embed_tokens if self.first else self.lm_head).weight)
