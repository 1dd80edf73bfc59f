"""What the user sees of a run on a mesh: its shape, a bar or a line now and then, and the figures at the end."""

import statistics

from rich.console import Console

from torch_sluice.train.mesh.loop import MeshRun
from torch_sluice.train.progress import RECENT, StepProgress


class MeshProgress(StepProgress):
    """Use as ``with MeshProgress(run, console) as progress: run.train(progress.update)``."""

    def __init__(self, run: MeshRun, console: Console):
        super().__init__(run, console)
        settings, layout = run.settings, run.layout
        pipeline = f", {layout.schedule} over {layout.stages} stages" if layout.pp > 1 else ""
        data = f", {layout.data_parallel}" if layout.dp > 1 else ""
        side = "dense" if layout.dense else "Sluice's attention and accumulation"
        if not layout.dense and run.side.session is None:
            side = "Sluice's attention; gradients are accumulated by torch, as zero-bubble schedules hide them"
        console.print(
            f"Mesh: {layout}{data}{pipeline}; {layout.ranks} ranks, backend {layout.backend}; {side}\n"
            f"Model: {settings.layers} layers, width {settings.width}, {settings.heads} heads, context "
            f"{settings.context}; {settings.steps} steps of {settings.micro_batches} micro-batches, "
            f"{settings.tokens_per_step} bytes",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def describe(self, run: MeshRun) -> str:
        recent = statistics.median(step["seconds"] for step in run.steps[-RECENT:])
        minutes, seconds = divmod(round(recent * (run.settings.steps - run.step)), 60)
        density = "" if run.layout.dense else f" at {run.side.density:.0%} of pairs"
        return (
            f"loss {run.steps[-1]['loss']:.3f}{density}, {recent:.2f} s, "
            f"{run.settings.tokens_per_step / recent:.0f} bytes/s  |  {minutes}:{seconds:02d} left"
        )

    def summarise(self, results: dict) -> None:
        """The end of the run, in a few lines."""
        self._console.print(
            f"Loss {results['loss']:.4f}, held-out loss {results['heldout_loss']:.4f} nats a byte, "
            f"{results['heldout_accuracy']:.1%} of bytes right\n"
            f"A step took {results['seconds_per_step']:.3f} s (median), {results['tokens_per_second']:.0f} tokens/s",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
