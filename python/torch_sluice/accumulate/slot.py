"""One parameter in a session: its sum, what is known about it, and whether its gradient can be seen in ``.grad``."""

from collections.abc import Callable

import torch

from torch_sluice.accumulate.accumulator import Accumulator, is_supported
from torch_sluice.accumulate.policy import Record
from torch_sluice.accumulate.sharded import like_parameter, local_part

_MASK = (1 << 63) - 1


class Slot:
    """A parameter and the sum of its gradients.

    While a window is open the sum is hidden and ``parameter.grad`` is None. ``show`` puts the averaged gradient into
    ``parameter.grad``, for the optimizer and for whatever else looks at gradients; should another gradient come after
    that, ``hide`` takes it back into the sum first, with whatever was done to it in between (all-reduce, clipping).
    """

    def __init__(self, index: int, name: str, parameter: torch.nn.Parameter):
        self.index, self.name, self.parameter = index, name, parameter
        local = local_part(parameter)  # of a DTensor each rank accumulates its part
        self.supported = is_supported(local)
        self.accumulator = Accumulator(local, "fp32" if self.supported else "torch")
        self.record = Record(local.numel())
        self.draws = 0  # gradients added so far, over all windows: each rounds with random numbers of its own
        self.shown: torch.Tensor | None = None  # what is, or was put, in parameter.grad
        self.divisor = 1.0  # of what is shown
        self._version = 0
        self._handle = None

    @property
    def pending(self) -> bool:
        """Whether there is a sum, shown or not."""
        return self.shown is not None or not self.accumulator.empty

    def draw(self, seed: int) -> int:
        """A number for the random rounding of the next gradient."""
        self.draws += 1
        return (seed * 0x9E3779B97F4A7C15 + self.index * 0xD1B54A32D192ED03 + self.draws * 0xAEF17502108EF2D9) & _MASK

    def show(self, divisor: float, before_gradient: Callable[["Slot"], None]) -> None:
        """Puts sum / divisor into ``parameter.grad``; ``before_gradient`` is called if another gradient comes."""
        self._watch(like_parameter(self.accumulator.take(1 / divisor), self.parameter), divisor, before_gradient)
        self.parameter.grad = self.shown

    def _watch(self, grad: torch.Tensor, divisor: float, before_gradient: Callable[["Slot"], None]) -> None:
        self.shown, self.divisor, self._version = grad, divisor, local_part(grad)._version
        self._handle = self.parameter.register_hook(lambda _: before_gradient(self))

    @property
    def _unchanged(self) -> bool:
        return self.parameter.grad is self.shown and local_part(self.shown)._version == self._version

    @property
    def dropped(self) -> bool:
        """Whether what was shown has been removed, as zero_grad() does."""
        return self.shown is not None and self.parameter.grad is None

    def hide(self) -> None:
        """Takes what is in ``parameter.grad`` back into the sum."""
        grad, same = self.parameter.grad, self.parameter.grad is self.shown
        self.accumulator.put_back(local_part(grad.detach()), self.divisor, same, self._unchanged)
        self.parameter.grad = None
        self._stop_showing()

    def unwatch(self) -> None:
        """No longer notices a gradient that comes after ``show``."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _stop_showing(self) -> None:
        self.shown = None
        self.unwatch()

    def leave(self, divisor: float) -> None:
        """Leaves sum / divisor in ``parameter.grad`` for good."""
        if self.shown is None:
            self.parameter.grad = like_parameter(self.accumulator.take(1 / divisor), self.parameter)
        self.start_window()

    def start_window(self) -> None:
        """Forgets the sum."""
        self._stop_showing()
        self.accumulator.start(self.accumulator.format)
        self.record.start_window()

    def state_dict(self) -> dict:
        state = {"draws": self.draws, "record": self.record.state_dict(), **self.accumulator.state_dict()}
        if self.shown is not None and self.parameter.grad is not None:
            state["shown"], state["divisor"] = local_part(self.parameter.grad), self.divisor
            if not self._unchanged:
                state["buffer"] = state["exponents"] = None  # what is shown now counts
        return state

    def load_state_dict(self, state: dict, before_gradient: Callable[["Slot"], None]) -> None:
        self.start_window()
        self.accumulator.load_state_dict(state)
        self.record.load_state_dict(state["record"])
        self.draws = int(state["draws"])
        self.parameter.grad = None
        if "shown" in state:
            grad = like_parameter(state["shown"].to(self.parameter.device, copy=True), self.parameter)
            self.parameter.grad = grad
            self._watch(grad, float(state["divisor"]), before_gradient)
