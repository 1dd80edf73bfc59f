"""The monitor under the Trainer of Lightning."""

import torch

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError:
    from pytorch_lightning.callbacks import Callback

from torch_sluice.monitor.monitor import Monitor


class MonitorCallback(Callback):
    """Runs a ``Monitor`` over ``Trainer.fit``::

        from torch_sluice.monitor.lightning import MonitorCallback

        Trainer(..., callbacks=[MonitorCallback(jsonl="run.jsonl", report="run.html")]).fit(model, data)

    A step is an optimizer step with all of its micro-batches (``accumulate_grad_batches``); its "loss" is the mean of
    what ``training_step`` returned.

    Args:
        monitor: one that you made, and will close; default: one made of ``arguments`` when the fit begins and closed
            when it ends.
        arguments: of ``Monitor``, by name.

    Attributes:
        monitor: the ``Monitor``; None before the fit begins, unless it was given.
    """

    def __init__(self, monitor: Monitor | None = None, **arguments):
        if monitor is not None and arguments:
            raise ValueError(f"monitor is given together with {', '.join(arguments)}, expected one or the other")
        self.monitor, self._arguments = monitor, arguments
        self._own = monitor is None
        self._losses: list[torch.Tensor] = []
        self._steps = 0
        self._running = False

    def on_train_start(self, trainer, pl_module):
        self._finish()  # an earlier fit that was told no end
        if self._own:
            self.monitor = Monitor(pl_module, **self._arguments)
        self._steps = trainer.global_step
        self.monitor.steps = max(self.monitor.steps, self._steps)  # of a resumed training
        self._running = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self._running:
            self._running = True
            self._losses.clear()
            self.monitor.begin_step()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs if isinstance(outputs, torch.Tensor) else (outputs or {}).get("loss")
        if loss is not None:
            self._losses.append(loss.detach())  # Lightning has divided it by the number of micro-batches
        if trainer.global_step != self._steps:
            self._steps, self._running = trainer.global_step, False
            self.monitor.pause_step()
            self.monitor.end_step(0, {"loss": sum(self._losses).item()} if self._losses else {})

    def on_train_end(self, trainer, pl_module):
        self._finish()

    def on_exception(self, trainer, pl_module, exception):
        self._finish()

    def _finish(self) -> None:
        if self.monitor is not None:
            self.monitor.abandon_step()
            if self._own:
                self.monitor.close()
