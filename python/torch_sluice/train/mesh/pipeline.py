"""Runs micro-batches through the stages: by a schedule of torch.distributed.pipelining, or one after the other."""

import torch
from torch import distributed, nn
from torch.distributed import pipelining
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from torch_sluice.train.mesh.layout import Layout
from torch_sluice.train.mesh.stage import Stage
from torch_sluice.train.settings import Settings

_SCHEDULES = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
    "interleaved-zero-bubble": pipelining.ScheduleInterleavedZeroBubble,
    "zero-bubble": pipelining.ScheduleZBVZeroBubble,
}


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats a byte, of logits [B, N, 256] and the bytes int64 [B, N] that came."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Pipeline:
    """The stages of this rank, each wrapped for data parallel or not, and their neighbours on other ranks.

    Args:
        stages: what is in ``modules``, without wrappers.
        modules: the stages as they are called.
        group: the ranks of this pipeline.
        micro_batches: of this pipeline in a step.
    """

    def __init__(
        self, settings: Settings, layout: Layout, stages: list[Stage], modules: list[nn.Module], group,
        micro_batches: int,
    ):  # fmt: skip
        self.layout, self.stages, self.modules, self.group = layout, stages, modules, group
        self.micro_batches, self.width = micro_batches, settings.width
        self.rank = group.rank()
        self.first, self.last = any(s.first for s in stages), any(s.last for s in stages)
        self._schedule = self._make_schedule(settings) if layout.pp > 1 else None

    def _make_schedule(self, settings: Settings):
        tokens = torch.empty(settings.micro_size, settings.context, dtype=torch.int64, device="meta")
        sizes = (settings.micro_size, settings.context)
        dtype = next(self.stages[0].parameters()).dtype
        parts = []
        for number, stage, module in zip(self.layout.stages_of(self.rank), self.stages, self.modules, strict=True):
            width = 256 if stage.last else settings.width
            between = torch.empty(*sizes, settings.width, device="meta", dtype=dtype, requires_grad=True)
            outputs = torch.empty(*sizes, width, device="meta", dtype=dtype, requires_grad=True)
            parts.append(
                pipelining.PipelineStage(
                    module, number, self.layout.stages, torch.device("cpu"), group=self.group,
                    input_args=tokens if stage.first else between, output_args=outputs,
                )
            )  # fmt: skip
        kind = _SCHEDULES[self.layout.schedule]
        single = issubclass(kind, pipelining.schedules.PipelineScheduleSingle)
        return kind(parts[0] if single else parts, self.micro_batches, loss_fn=self._loss, scale_grads=False)

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits, targets) / self.micro_batches

    def train(self, batches: list[torch.Tensor]) -> float:
        """Forward and backward of the micro-batches, int64 [size, context + 1] each.

        Returns the mean loss on ranks with the last stage, 0 on others.
        """
        for stage in self.stages:
            stage.micro = 0
        losses = []
        if self._schedule is None:
            for number, batch in enumerate(batches):
                losses.append(self._train_alone(batch, number == len(batches) - 1))
        else:
            whole = torch.cat(batches)
            inputs = (whole[:, :-1].contiguous(),) if self.first else ()
            targets = whole[:, 1:].contiguous() if self.last else None
            self._schedule.step(*inputs, target=targets, losses=losses if self.last else None, return_outputs=False)
        return float(sum(loss.detach() for loss in losses)) if self.last else 0.0

    def _train_alone(self, batch: torch.Tensor, last: bool) -> torch.Tensor:
        (module,) = self.modules
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = last
        loss = self._loss(module(batch[:, :-1]), batch[:, 1:])
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def predict(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Logits [B, N, 256] of tokens int64 [B, N] on the rank with the last stage, None on others."""
        hidden, own = tokens, dict(zip(self.layout.stages_of(self.rank), self.modules, strict=True))
        for number in range(self.layout.stages):
            if number not in own:
                continue
            if number and number - 1 not in own:
                hidden = torch.empty(*tokens.shape, self.width, dtype=next(own[number].parameters()).dtype)
                distributed.recv(hidden, group=self.group, group_src=self._rank_of(number - 1))
            hidden = own[number](hidden)
            if number + 1 < self.layout.stages and number + 1 not in own:
                distributed.send(hidden.contiguous(), group=self.group, group_dst=self._rank_of(number + 1))
        return hidden if self.last else None

    def _rank_of(self, stage: int) -> int:
        return next(rank for rank in range(self.layout.pp) if stage in self.layout.stages_of(rank))
