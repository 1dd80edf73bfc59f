"""Training with sparsity under the Trainer of Hugging Face transformers."""

from transformers.trainer_callback import ExportableState, TrainerCallback

from torch_sluice.attention.controller import DensityController


class GateCallback(TrainerCallback, ExportableState):
    """Runs a ``DensityController`` over ``Trainer.train``::

        torch_sluice.swap_attention(model, target_density=0.1)
        groups = torch_sluice.attention.parameter_groups(model, lr=1e-4, weight_decay=0.1)
        Trainer(model, ..., optimizers=(torch.optim.AdamW(groups), None), callbacks=[GateCallback()]).train()

    The mean gate is added to the loss that the model returns, so the model must compute its loss itself (be given
    ``labels``). The controller goes on from a checkpoint of the Trainer.

    Args:
        target_density: share in (0, 1] of the query-key pairs; default: what the model was swapped with.
        arguments: further arguments of ``DensityController``, by name.

    Attributes:
        controller: the ``DensityController``, from the beginning of the training on.
    """

    def __init__(self, target_density=None, **arguments):
        self.target_density, self.arguments = target_density, arguments
        self.controller = self._hook = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.controller = DensityController(model, self.target_density, state.max_steps, **self.arguments)
        # A resumed Trainer has read this from its checkpoint, whether or not it makes callbacks from it.
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, dict) and saved["attributes"]["saved"] is not None:
            self.controller.load_state_dict(saved["attributes"]["saved"])
        micro_batches = args.gradient_accumulation_steps

        def add_mean_gate(module, inputs, named_inputs, output):
            if not module.training:
                return output
            loss = output[0] if isinstance(output, tuple) else output["loss"]
            # Given the number of items of all micro-batches, the model divides by it; else the Trainer divides later.
            share = micro_batches if named_inputs.get("num_items_in_batch") is not None else 1
            loss = self.controller.loss(loss * share) / share
            if isinstance(output, tuple):
                return (loss, *output[1:])
            output["loss"] = loss
            return output

        self._hook = model.register_forward_hook(add_mean_gate, with_kwargs=True)

    def on_step_end(self, args, state, control, **kwargs):
        self.controller.step()

    def on_train_end(self, args, state, control, **kwargs):
        self._hook.remove()
        self.controller.close()

    def state(self):
        """What the Trainer saves with a checkpoint."""
        saved = None if self.controller is None else self.controller.state_dict()
        return {
            "args": {"target_density": self.target_density, **self.arguments},
            "attributes": {"saved": saved},
        }
