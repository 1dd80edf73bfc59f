"""The monitor under the Trainer of Hugging Face transformers."""

from transformers.trainer_callback import TrainerCallback

from torch_sluice.monitor.monitor import Monitor


class MonitorCallback(TrainerCallback):
    """Runs a ``Monitor`` over ``Trainer.train``::

        from torch_sluice.monitor.hugging_face import MonitorCallback

        Trainer(model, ..., callbacks=[MonitorCallback(jsonl="run.jsonl", report="run.html")]).train()

    A step is an optimizer step with all of its micro-batches. What the Trainer logs after it ("loss", "grad_norm",
    "learning_rate") becomes its figures: log every step (``logging_steps=1``) for a loss of every step. Tokens are
    those that the Trainer counts, if it is told to (``include_num_input_tokens_seen``).

    Args:
        monitor: one that you made, and will close; default: one made of ``arguments`` when training begins and closed
            when it ends.
        arguments: of ``Monitor``, by name.

    Attributes:
        monitor: the ``Monitor``; None before training begins, unless it was given.
    """

    def __init__(self, monitor: Monitor | None = None, **arguments):
        if monitor is not None and arguments:
            raise ValueError(f"monitor is given together with {', '.join(arguments)}, expected one or the other")
        self.monitor, self._arguments = monitor, arguments
        self._own = monitor is None
        self._tokens = 0
        self._figures: dict[str, float] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._leave()
        if self._own:
            self.monitor = Monitor(model, **self._arguments)
        self.monitor.steps = max(self.monitor.steps, state.global_step)  # of a resumed training
        self._tokens = state.num_input_tokens_seen

    def _leave(self) -> None:
        """Ends what an earlier training left: the Trainer tells nobody of one that failed, and begins another after it
        by itself (``auto_find_batch_size``)."""
        self._figures = {}
        if self.monitor is not None:
            self.monitor.abandon_step()
            if self._own:
                self.monitor.close(report=False)  # the page will be that of the training that begins

    def on_step_begin(self, args, state, control, **kwargs):
        self._record(state)
        self.monitor.begin_step()

    def on_step_end(self, args, state, control, **kwargs):
        self.monitor.pause_step()

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = ("loss", "grad_norm", "learning_rate")
        self._figures.update({name: logs[name] for name in names if name in (logs or {})})

    def on_train_end(self, args, state, control, **kwargs):
        self._record(state)
        if self._own:
            self.monitor.close()

    def _record(self, state) -> None:
        """Records the step that has ended, with what was logged since."""
        seen = state.num_input_tokens_seen
        figures, self._figures = self._figures, {}
        self.monitor.end_step(max(int(seen - self._tokens), 0), figures)
        self._tokens = seen
