"""Training on a mesh from step to step: batches, figures, evaluations, checkpoints, and stopping."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from torch import distributed

from torch_sluice.train.data import Corpus
from torch_sluice.train.errors import TrainError
from torch_sluice.train.loop import SAVE_EVERY_SECONDS, Interrupted, StopRequest
from torch_sluice.train.mesh.checkpoint import load_checkpoint, save_checkpoint
from torch_sluice.train.mesh.layout import Layout
from torch_sluice.train.mesh.side import MeshSide
from torch_sluice.train.settings import Settings

METRICS = "metrics.jsonl"


class MeshRun:
    """A run on a mesh in progress. Every rank has one; rank 0 writes ``metrics.jsonl``.

    Args:
        save_every: steps between checkpoints; None: a minute or so.
    """

    def __init__(
        self, settings: Settings, layout: Layout, corpus: Corpus, folder: Path, data: str | None,
        save_every: int | None = None, **options,
    ):  # fmt: skip
        self.settings, self.layout, self.corpus, self.folder, self.data = settings, layout, corpus, folder, data
        self.save_every = save_every
        self.step = 0
        self.side = MeshSide(settings, layout, **options)
        self.leads = distributed.get_rank() == 0
        self.steps: list[dict] = []  # figures of each step
        self.quick_windows = corpus.heldout_windows(settings.quick_windows, settings.context)

    def resume(self, path: Path, state: dict) -> None:
        """Goes on from a checkpoint of this run."""
        load_checkpoint(path, self.side, state)
        self.step = int(state["step"])
        if self.leads:
            self.steps = self._read_metrics(self.step)

    def _read_metrics(self, steps: int) -> list[dict]:
        """The figures of the steps up to the checkpoint; the file loses what came after it."""
        file = self.folder / METRICS
        try:
            lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
        except FileNotFoundError:
            lines = []
        lines = [line for line in lines if line["step"] <= steps]
        self._write_metrics("w", "".join(json.dumps(line) + "\n" for line in lines))
        return [line for line in lines if "loss" in line]

    def save(self) -> None:
        state = {
            "settings": self.settings.to_dict(),
            "layout": self.layout.to_dict(),
            "data": self.data,
            "fingerprint": self.corpus.fingerprint,
            "step": self.step,
        }
        save_checkpoint(self.folder, self.side, state)

    def train(self, report: Callable[["MeshRun"], None]) -> None:
        """Trains up to the last step; ``report`` is called after every step.

        Raises:
            Interrupted: SIGINT or SIGTERM came to any rank; all have finished the step and saved.
        """
        settings, side = self.settings, self.side
        if self.leads and not self.step:
            self._write_metrics("w", "")
        saved = time.monotonic()
        with StopRequest() as stop:
            while self.step < settings.steps:
                batches = [
                    self.corpus.batch(settings.seed, self.step, micro, settings.micro_size, settings.context)
                    for micro in range(side.position.first_micro, side.position.first_micro + side.micro_batches)
                ]
                due = self.leads and self.save_every is None and time.monotonic() - saved > SAVE_EVERY_SECONDS
                loss, seconds, (stops, saves) = side.train_step(batches, self.step, (float(stop.requested), float(due)))
                self.step += 1
                self._note(loss=loss, seconds=seconds)
                if self.step % settings.evaluate_every == 0 and self.step < settings.steps:
                    self.evaluate(self.quick_windows)
                report(self)
                if stops and self.step < settings.steps:
                    self.save()
                    raise Interrupted
                last = self.step == settings.steps
                if saves or last or (self.save_every and self.step % self.save_every == 0):
                    self.save()
                    saved = time.monotonic()

    def _note(self, *, loss: float, seconds: float) -> None:
        figures = {"step": self.step, "loss": loss, "seconds": seconds}
        figures["tokens_per_second"] = self.settings.tokens_per_step / seconds
        figures["density"] = self.side.density
        self.steps.append(figures)
        self._write(figures)

    def _write(self, figures: dict) -> None:
        if self.leads:
            self._write_metrics("a", json.dumps(figures) + "\n")

    def _write_metrics(self, mode: str, text: str) -> None:
        path = self.folder / METRICS
        try:
            with path.open(mode) as file:
                file.write(text)
        except OSError as error:
            raise TrainError(f"cannot write {path}: {error.strerror or error}") from error

    def evaluate(self, windows) -> dict[str, float]:
        """Loss and accuracy on held-out text, noted as well."""
        figures = self.side.evaluate(windows)
        figures = {"step": self.step, "heldout_loss": figures["loss"], "heldout_accuracy": figures["accuracy"]}
        self._write(figures)
        return figures

    def results(self) -> dict:
        """The figures of the finished run; every rank takes part, and rank 0 has them all."""
        settings = self.settings
        heldout = self.evaluate(self.corpus.heldout_windows(settings.heldout_windows, settings.context))
        seconds = statistics.median(step["seconds"] for step in self.steps) if self.steps else None
        return {
            "loss": self.steps[-1]["loss"] if self.steps else None,
            "heldout_loss": heldout["heldout_loss"],
            "heldout_accuracy": heldout["heldout_accuracy"],
            "seconds_per_step": seconds,
            "tokens_per_second": settings.tokens_per_step / seconds if seconds else None,
            "density": self.side.density,
            "half_share": None if self.side.session is None else self.side.session.stats().fp16_share,
            "layout": self.layout.to_dict(),
            "settings": settings.to_dict(),
            "history": {name: [step[name] for step in self.steps] for name in ("loss", "seconds", "density")},
        }

    def close(self) -> None:
        self.side.close()
