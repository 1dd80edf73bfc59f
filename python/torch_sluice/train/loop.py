"""Trains all sides in lockstep: every step, each side takes the same batches, one side after the other.

Lockstep makes the comparison fair on a machine that is not quiet (whatever slows a stretch of the run slows all sides)
and keeps one position for a checkpoint: the step.
"""

import copy
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from torch_sluice.monitor import Monitor
from torch_sluice.monitor.outputs.json_lines import keep_lines_up_to
from torch_sluice.train.checkpoint import save_checkpoint
from torch_sluice.train.data import Corpus
from torch_sluice.train.errors import TrainError
from torch_sluice.train.evaluate import evaluate
from torch_sluice.train.folder import FolderLock
from torch_sluice.train.model import predict
from torch_sluice.train.settings import Settings
from torch_sluice.train.side import Side
from torch_sluice.train.sluice import SluiceSide, WindowSide

SAVE_EVERY_SECONDS = 60.0
STEPS_NAME = "steps.jsonl"


class Interrupted(Exception):
    """Training was asked to stop and has saved its state."""


SIDES: dict[str, type[Side]] = {"dense": Side, "sluice": SluiceSide, "window": WindowSide}


def make_sides(settings: Settings) -> dict[str, Side]:
    names = [name for name in SIDES if name != "window" or settings.with_window]
    return {name: SIDES[name](settings) for name in names}


class Run:
    """A comparison in progress: its settings, its text, its sides and the number of steps done."""

    def __init__(
        self, settings: Settings, corpus: Corpus, folder: Path, data: str | None, lock: FolderLock | None = None
    ):
        self.settings, self.corpus, self.folder, self.data, self.lock = settings, corpus, folder, data, lock
        self.step = 0
        self.closed = False
        self.saved = False  # whether the folder holds a checkpoint of this run
        self.sides = make_sides(settings)
        self.quick_windows = corpus.heldout_windows(settings.quick_windows, settings.context)

    def watch(
        self, tensorboard: bool = False, metrics_port: int | None = None, metrics_host: str | None = None
    ) -> None:
        """Gives each side a monitor that writes a line a step to ``steps.jsonl`` in the folder; with ``tensorboard``
        also scalars to ``tensorboard/SIDE``, with ``metrics_port`` Prometheus text on that port (0: any free one).

        The sides share a process, whose memory is no side's own, and ``compare`` judges MFU when the gate has closed:
        the monitors watch no limits. Operations are counted, in the first step, where somebody looks while it trains.
        """
        lines = self.folder / STEPS_NAME
        if self.step:
            keep_lines_up_to(lines, self.step)
        for name, side in self.sides.items():
            try:
                side.monitor = Monitor(
                    side.model,
                    name=name,
                    mfu_limit=None,
                    memory_ratio_limit=None,
                    count_first_step=tensorboard or metrics_port is not None,
                    jsonl=lines,
                    log_dir=self.folder / "tensorboard" / name if tensorboard else None,
                    metrics_port=metrics_port,
                    metrics_host=metrics_host or "127.0.0.1",
                )
            except ImportError as error:
                option, package = ("--metrics-port", "prometheus-client")
                if "log_dir" in str(error):
                    option, package = ("--tensorboard", "tensorboard")
                raise TrainError(f"{option} needs the package {package}: pip install {package}") from error
            except ValueError as error:
                text = str(error).replace("metrics_port", "--metrics-port").replace("metrics_host", "--metrics-host")
                raise TrainError(text) from error
            side.monitor.steps = self.step
            metrics_port = side.monitor.metrics_port

    def state_dict(self) -> dict:
        return {
            "settings": self.settings.to_dict(),
            "data": self.data,
            "fingerprint": self.corpus.fingerprint,
            "step": self.step,
            "sides": {name: side.state_dict() for name, side in self.sides.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        try:
            self.corpus.check_fingerprint(state["fingerprint"])
            for name, side in self.sides.items():
                side.load_state_dict(state["sides"][name])
            step = int(state["step"])
            if not 0 <= step <= self.settings.steps:
                raise ValueError(f"step is {step} of {self.settings.steps}")
            self.step = step
            self.saved = True
        except KeyError as error:
            raise TrainError(f"the checkpoint in '{self.folder}' lacks {error}; train anew") from error
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise TrainError(f"the checkpoint in '{self.folder}' does not fit its own settings; train anew") from error

    def save(self) -> None:
        save_checkpoint(self.folder, self.state_dict())
        self.saved = True

    def train(self, report: Callable[["Run"], None]) -> None:
        """Trains up to the last step; ``report`` is called after every step.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the step was finished and the state saved. A second signal ends the
                process at once, in the usual way.
        """
        settings = self.settings
        saved = time.monotonic()
        self._warm_up()
        with StopRequest() as stop:
            while self.step < settings.steps:
                batches = self.corpus.step_batches(settings, self.step)
                for name, side in self.sides.items():
                    side.train_step(batches, self.step)
                    self._check_finite(name, "loss", side.history.loss[-1])
                self.step += 1
                if self.step % settings.evaluate_every == 0 or self.step == settings.steps:
                    self._evaluate()
                report(self)
                if stop.requested:
                    self.save()
                    raise Interrupted
                if time.monotonic() - saved > SAVE_EVERY_SECONDS or self.step == settings.steps:
                    self.save()
                    saved = time.monotonic()

    def _warm_up(self) -> None:
        """One step of a copy of the model, so that what a process does once is in no side's time: the first one's."""
        model = copy.deepcopy(self.sides["dense"].model)
        predict(model, self.quick_windows[:1, :-1]).sum().backward()
        torch.optim.AdamW(model.parameters()).step()

    def _evaluate(self) -> None:
        for name, side in self.sides.items():
            figures = evaluate(side.model, self.quick_windows)
            self._check_finite(name, "held-out loss", figures["loss"])
            side.history.evaluated_steps.append(self.step)
            side.history.heldout_loss.append(figures["loss"])
            side.history.heldout_accuracy.append(figures["accuracy"])

    def _check_finite(self, name: str, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainError(f"the {what} of {name} became {value} at step {self.step}; try a smaller --learning-rate")

    def close(self) -> None:
        """Ends what the sides hold open, and gives the folder free. Does nothing the second time."""
        for side in () if self.closed else self.sides.values():
            side.close()
        self.closed = True
        if self.lock is not None:
            self.lock.close()


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag; a second one does what it always did."""

    def __enter__(self) -> "StopRequest":
        self.requested = False
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception) -> None:
        self._restore()


def set_threads(settings: Settings) -> int:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return torch.get_num_threads()
