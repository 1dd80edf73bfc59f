"""Which parameters a session has, and the hooks on them."""

import torch
from torch.nn.parameter import is_lazy

from torch_sluice.accumulate import access
from torch_sluice.accumulate.gradient import Gradient
from torch_sluice.accumulate.names import names_of_parameters
from torch_sluice.accumulate.sharded import is_dtensor


class Parameters:
    """The parameters of the session's optimizer, whatever joins it or leaves it, frozen ones included.

    Attributes:
        gradients: parameter -> its Gradient.
    """

    def __init__(self, session):
        self._session = session
        self.gradients: dict[torch.Tensor, Gradient] = {}
        self._handles: dict[torch.Tensor, list] = {}
        self._open = False

    def open(self) -> None:
        """Hooks all parameters. Raises RuntimeError, and hooks none, if another session has one of them."""
        self._open = True
        try:
            for gradient in self.gradients.values():
                self._hook(gradient)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """All parameters are as they were."""
        self._open = False
        for gradient in self.gradients.values():
            self._unhook(gradient)

    def adopt(self) -> None:
        """Takes in parameters that are new to the optimizer, and lets go of those that have left it.

        Raises:
            ValueError: the session can't accumulate one of them.
            RuntimeError: another session does.
        """
        session, names, present = self._session, None, set()
        for number, group in enumerate(session.optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                present.add(parameter)
                differentiable = parameter.is_floating_point() or parameter.is_complex()
                if parameter in self.gradients or not parameter.is_leaf or not differentiable:
                    continue
                names = names_of_parameters(session.model) if names is None else names
                name = names.get(parameter, f"optimizer.{number}.{place}")
                if is_lazy(parameter):
                    raise ValueError(
                        f"parameter {name} has no shape yet, expected a model whose lazy modules have run once"
                    )
                if is_dtensor(parameter) and session.options.low_memory:
                    raise ValueError(
                        f"low_memory=True and parameter {name} is a DTensor, expected plain tensors: a step that goes "
                        "through sharded parameters one by one can't agree with the other ranks"
                    )
                gradient = Gradient(session, len(self.gradients), name, parameter)
                if self._open:
                    self._hook(gradient)
                    gradient.join()
                self.gradients[parameter] = gradient
        for parameter in [one for one in self.gradients if one not in present]:
            gradient = self.gradients.pop(parameter)
            if self._open:
                gradient.show()
                self._unhook(gradient)

    def _hook(self, gradient: Gradient) -> None:
        session, parameter = self._session, gradient.parameter
        access.attach(gradient)

        @torch._disable_dynamo
        def arrive(grad):
            with session.lock:
                return gradient.arrive(grad)

        @torch._disable_dynamo
        def take(_):
            with session.lock:
                gradient.take()

        frozen = not parameter.requires_grad
        if frozen:  # hooks can't be registered on it, but stay when it is frozen and thawed again
            parameter.requires_grad_(True)
        try:
            self._handles[parameter] = [
                parameter.register_hook(arrive),
                parameter.register_post_accumulate_grad_hook(take),
            ]
        finally:
            if frozen:
                parameter.requires_grad_(False)

    def _unhook(self, gradient: Gradient) -> None:
        access.detach(gradient)
        for handle in self._handles.pop(gradient.parameter, ()):
            handle.remove()
