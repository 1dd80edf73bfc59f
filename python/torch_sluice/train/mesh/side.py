"""A side of the main job spread over a mesh: stages, optimizer, gate controller and accumulators of this rank."""

import contextlib
import math
import time

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from torch_sluice.accumulate import accumulate
from torch_sluice.attention import parameter_groups
from torch_sluice.swap import swap_attention
from torch_sluice.train.errors import TrainError
from torch_sluice.train.mesh.layout import Layout
from torch_sluice.train.mesh.parameters import Parameters
from torch_sluice.train.mesh.pipeline import Pipeline
from torch_sluice.train.mesh.stage import Position, Stage, StageController
from torch_sluice.train.mesh.tensor_parallel import localize, parallelize_gate, parallelize_layer
from torch_sluice.train.settings import Settings
from torch_sluice.train.side import learning_rate


class MeshSide:
    """Trains one model on all ranks of the default process group. Every rank makes the same calls.

    Args:
        policy: of ``torch_sluice.accumulate``.
        rows: of ``DensityController``: share of the query rows that teach the gate about pairs it drops.
    """

    def __init__(self, settings: Settings, layout: Layout, *, policy: str = "auto", rows: float = 0.03125):
        self.settings, self.layout = settings, layout
        self.mesh = init_device_mesh("cpu", (layout.pp, layout.dp, layout.tp), mesh_dim_names=("pp", "dp", "tp"))
        self.position = Position(settings.seed)
        self.micro_batches = settings.micro_batches // layout.dp
        self.position.first_micro = self._coordinate("dp") * self.micro_batches
        self.stages = [self._make_stage(number) for number in layout.stages_of(self._coordinate("pp"))]
        self.fsdp = layout.data_parallel == "fsdp" and layout.dp > 1
        for stage in self.stages:
            self._shard(stage)
        self.model = nn.ModuleList(self.stages)
        self.controller = None if layout.dense else self._make_controller(rows)
        # A zero-bubble schedule computes the gradients of weights where no hook of DDP sees them.
        self.wraps = layout.dp > 1 and not self.fsdp and not layout.splits_backward
        modules = [self._wrap(stage) for stage in self.stages]
        self._called = nn.ModuleList(modules)
        self.pipeline = Pipeline(settings, layout, self.stages, modules, self.mesh.get_group("pp"), self.micro_batches)
        self.parameters = Parameters(self.stages, self.mesh)
        self._make_optimizer()
        self._context = contextlib.ExitStack()
        self.session = None
        if not layout.dense and not layout.splits_backward:
            session = accumulate(self._called, self.optimizer, policy=policy, seed=settings.seed)
            self.session = self._context.enter_context(session)

    def _coordinate(self, axis: str) -> int:
        return self.mesh.get_local_rank(axis)

    # ---- building

    def _make_stage(self, number: int) -> Stage:
        layout, settings = self.layout, self.settings
        stage = Stage(settings, self.position, layout.layers_of(number, settings.layers))
        tp = self.mesh["tp"]
        if layout.tp > 1:
            for layer in stage.layers.values():
                parallelize_layer(layer, tp)
        if not layout.dense:
            swap_attention(
                stage, target_density=settings.target_density, window=settings.local_window, sinks=settings.sinks
            )
        if layout.tp > 1 and not layout.dense:
            for layer in stage.layers.values():
                parallelize_gate(layer, tp)
        return stage

    def _shard(self, stage: Stage) -> None:
        if self.fsdp:
            for layer in stage.layers.values():
                fully_shard(layer, mesh=self.mesh["dp"])
            fully_shard(stage, mesh=self.mesh["dp"])
        else:
            localize(stage)

    def _wrap(self, stage: Stage) -> nn.Module:
        if not self.wraps:
            return stage
        # The frequencies of the rotary embedding are constants: nothing to keep alike.
        constants = [name for name, _ in stage.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(stage, constants)
        return DistributedDataParallel(stage, process_group=self.mesh.get_group("dp"), bucket_cap_mb=4)

    def _make_controller(self, rows: float) -> StageController:
        controller = StageController(self.model, steps=self.settings.steps, ramp=0.5, hard=0.5, rows=rows)
        for stage in self.stages:
            stage.controller = controller
            # Of all gates: one layer's of all, and of that this rank's share of the heads.
            stage.penalty_share = 1 / (self.settings.layers * self.layout.tp)
            stage.penalty_scale = 1 / self.micro_batches
        return controller

    def _make_optimizer(self) -> None:
        settings = self.settings
        groups = parameter_groups(
            self.model, settings.learning_rate, settings.weight_decay, gate_lr=settings.gate_learning_rate
        )
        self.optimizer = torch.optim.AdamW(groups, settings.learning_rate, betas=(0.9, 0.98))
        for group in self.optimizer.param_groups:
            group["rate_factor"] = group["lr"] / settings.learning_rate

    # ---- training

    def train_step(self, batches: list[torch.Tensor], step: int, flags: tuple[float, ...] = ()) -> tuple:
        """One optimizer step over this rank's micro-batches, int64 [size, context + 1] each.

        Returns (mean loss of all ranks, seconds, flags added up over the ranks).
        """
        self.position.step = step
        rate = learning_rate(self.settings, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        start = time.perf_counter()
        loss = self.pipeline.train(batches)
        if self.layout.dp > 1 and not self.fsdp and not self.wraps:
            self.parameters.average_gradients(self.mesh.get_group("dp"))
        self.parameters.tie_gradients()
        loss, norm, *flags = self._add_up(loss / (self.layout.dp * self.layout.tp), *flags)
        self._check(loss, norm, step)
        self.parameters.scale_gradients(min(1.0, self.settings.clip / (norm + 1e-6)))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.controller is not None:
            self.controller.step()
        return loss, time.perf_counter() - start, tuple(flags)

    def _add_up(self, loss: float, *flags: float) -> tuple[float, ...]:
        """(loss, norm of all gradients, flags), the same on all ranks."""
        numbers = torch.tensor([loss, self.parameters.sum_of_squares(), *flags], dtype=torch.float64)
        distributed.all_reduce(numbers)
        loss, squares, *flags = numbers.tolist()
        return loss, math.sqrt(squares) if squares >= 0 else math.nan, *flags

    def _check(self, loss: float, norm: float, step: int) -> None:
        for name, value in (("loss", loss), ("norm of the gradients", norm)):
            if not math.isfinite(value):
                raise TrainError(f"the {name} became {value} at step {step + 1}; try a smaller --learning-rate")

    @property
    def density(self) -> float:
        """Kept pairs / causal pairs while training, at the latest step, of all ranks."""
        return 1.0 if self.controller is None else self.controller.density

    @torch.no_grad()
    def evaluate(self, windows: torch.Tensor) -> dict[str, float]:
        """Loss in nats a byte and accuracy of the likeliest next byte, on int64 windows [W, context + 1]."""
        dp, rank = self.layout.dp, self._coordinate("dp")
        sums = torch.zeros(3, dtype=torch.float64)
        self._called.eval()
        for number in range(rank, math.ceil(len(windows) / dp) * dp, dp):
            # FSDP2 wants as many forwards on every rank: some read a window twice, and count it once.
            window = windows[number % len(windows)]
            logits = self.pipeline.predict(window[None, :-1])
            if logits is not None and number < len(windows) and self._coordinate("tp") == 0:
                loss = nn.functional.cross_entropy(logits[0], window[1:], reduction="sum")
                correct = (logits[0].argmax(-1) == window[1:]).sum()
                sums += torch.tensor([loss.item(), correct.item(), len(window) - 1], dtype=torch.float64)
        self._called.train()
        distributed.all_reduce(sums)
        loss, correct, count = sums.tolist()
        return {"loss": loss / count, "accuracy": correct / count}

    def close(self) -> None:
        self._context.close()
        if self.controller is not None:
            self.controller.close()
