"""One parameter's gradient while a session is open: hidden in a sum, or in sight as an ordinary ``.grad``.

Hidden, torch itself finds None in ``.grad`` and the Accumulator has the sum. In sight, ``.grad`` is the sum and the
Accumulator is empty; autograd adds to it as it always does. Whoever reads ``.grad`` brings it to sight (``look``), and
it is hidden again at the next gradient, unless somebody still holds what was read.

With windows or token counts gradients weigh something. The sum is then S = sum of weight x gradient, what a look shows
is S / divisor, and ``factor`` is by what the tensor in sight must be multiplied to give S.
"""

import math
import threading
from typing import TYPE_CHECKING

import torch

from torch_sluice.accumulate import operators
from torch_sluice.accumulate.access import read_grad, write_grad
from torch_sluice.accumulate.accumulator import FORMATS, Accumulator, is_supported
from torch_sluice.accumulate.holding import is_held
from torch_sluice.accumulate.modes import (
    compiled_autograd_runs,
    in_backward,
    is_for_autograd_grad,
    outside_inference_mode,
)
from torch_sluice.accumulate.policy import Record
from torch_sluice.accumulate.sharded import is_dtensor, like_parameter, local_gradient, local_part

if TYPE_CHECKING:
    from torch_sluice.accumulate.session import Session

_MASK = (1 << 63) - 1


class Gradient:
    """The gradient of one parameter of a session.

    Attributes:
        in_sight: ``.grad`` is the whole gradient. If it is not, what torch finds in ``.grad`` is one new gradient.
        fresh: a gradient came after the last call of ``step()``.
        arriving: threads whose backward pass is about to add to ``.grad``.
        blind: a look shows None, whatever there is: a call that must not touch this gradient is going on.
        reduction: the DistributedDataParallel passes that average this parameter's gradient; None without.
    """

    def __init__(self, session: "Session", index: int, name: str, parameter: torch.Tensor):
        self.session, self.index, self.name, self.parameter = session, index, name, parameter
        local = local_part(parameter)  # of a DTensor each rank accumulates its part
        self.sum = Accumulator(local, "fp32" if is_supported(local) else "torch")
        self.format = self.sum.format  # of this window's sum, or the last one's, as the policy has it
        self.record = Record(local.numel())
        self.draws = 0  # gradients added so far, over all windows: each rounds with random numbers of its own
        self.in_sight = read_grad(parameter) is not None
        self.factor = 1.0
        self.fresh = self.blind = False
        self.reduction = None
        self.arriving: set[int] = set()
        self._kind, self._supported = (local.dtype, local.device), is_supported(local)
        self._sharded = is_dtensor(parameter)
        self._aside: torch.Tensor | None = None  # what was in sight before the gradient that autograd adds now

    # ---- what somebody does to .grad

    def look(self) -> bool:
        """Brings the gradient to sight for whoever reads ``.grad``; False if it must not be seen."""
        if self.blind:
            return False
        if self._aside is None:
            if self.in_sight:
                if self.factor == 1.0 and self.session.weights.is_trivial:
                    return True
            elif self.sum.empty and read_grad(self.parameter) is None:
                return True
        with self.session.lock:
            weights = self.session.weights
            if not weights.is_trivial and self._sharded and in_backward():
                self._show(weights.weight)  # FSDP2 reads it to add the next gradient, which does not know its weight
            else:
                self._show(weights.divisor)
        return True

    def replace(self, value: torch.Tensor | None) -> None:
        """``.grad = value``."""
        if self.blind:
            return
        with self.session.lock:
            window = self.session.window
            if value is None and window.is_open and not self.fresh:
                return  # a zero_grad by hand after a call of step() that was held
            by_fsdp = self._sharded and in_backward() and self.is_empty
            if value is not None and not self.in_sight and compiled_autograd_runs():
                write_grad(
                    self.parameter, value
                )  # it adds to what it finds in .grad, None, and writes that from Python
                return
            write_grad(self.parameter, value)
            self._forget()
            if value is not None and not by_fsdp:
                self._note_sight(self.session.weights.divisor)

    def zero(self, set_to_none: bool) -> None:
        """What ``zero_grad`` does to this gradient."""
        if set_to_none or self.is_empty:
            self.drop()
            return
        self.fresh = False
        if not self.in_sight:
            with outside_inference_mode():
                zeros = torch.zeros_like(local_part(self.parameter), requires_grad=False)
            self.drop()
            write_grad(self.parameter, like_parameter(zeros, self.parameter))
            self._note_sight(self.session.weights.divisor)

    def drop(self) -> None:
        """There is no gradient any more."""
        write_grad(self.parameter, None)
        self._forget()
        self.fresh = False

    def multiply(self, factor: float) -> None:
        """Multiplies a hidden sum."""
        if factor == 0.0 or not math.isfinite(factor):
            self.look()
            local_part(read_grad(self.parameter)).mul_(factor)
        else:
            self.sum.scale *= factor

    def hidden_norm(self) -> float | None:
        """The Euclidean norm of a hidden float16 sum as a look would show it; None for any other gradient."""
        if self.in_sight or self.sum.empty or self.sum.format != "fp16" or self._sharded:
            return None
        self.session.statistics.read()
        return self.norm_of_sum()

    # ---- a gradient that autograd has finished

    def arrive(self, grad: torch.Tensor) -> torch.Tensor | None:
        """Called before autograd adds a gradient to ``.grad``. Returns what it shall add, or None: the same.

        Autograd adds at once, without weights, to what is in sight: so that goes aside until ``take``, which weighs
        both. Where it must stay, since somebody holds it, the gradient is weighed before, and later hooks of the user
        see it so. Several threads may come here at a time.
        """
        if is_for_autograd_grad():
            return None  # nothing will be added
        others = bool(self.arriving)
        self.arriving.add(threading.get_ident())
        weights = self.session.weights
        weights.unused = False
        if not self.in_sight or weights.is_trivial or self._aside is not None:
            return None
        ratio = weights.weight / self.factor
        if ratio == 1.0:
            return None
        keeps_graph = read_grad(self.parameter).requires_grad
        if others or keeps_graph or self._sharded or is_held(self.parameter):
            return grad * ratio
        self._aside = read_grad(self.parameter)
        write_grad(self.parameter, None)
        return None

    def _unite(self) -> None:
        """Adds what has come meanwhile to what is aside, and has that in sight again."""
        shown, self._aside = self._aside, None
        if shown is None:
            return
        come = read_grad(self.parameter)
        if come is not None:
            weight = self.session.weights.weight / self.factor
            shown = shown + come * weight if come.requires_grad else shown.add_(come, alpha=weight)
        write_grad(self.parameter, shown)

    def take(self, postponed: bool = False) -> None:
        """Adds the gradient that has just come to ``.grad`` to the sum, and hides it."""
        self.session.take_postponed()
        self.arriving.discard(threading.get_ident())
        if self.arriving or read_grad(self.parameter) is None:
            return  # another thread is adding to it: the last one hides all
        self.fresh = True
        self._unite()
        weights, reduction = self.session.weights, self.reduction
        if reduction is not None and reduction.expected:
            reduction.ran = True
            self._show(weights.divisor)  # the whole sum is what DistributedDataParallel averages over ranks
        elif reduction is not None and reduction.finds_unused and not postponed:
            self.session.postpone(self)  # DDP must find it in .grad, and our hook comes before its own
        elif read_grad(self.parameter).requires_grad:
            self._show_with_graph(weights)
        elif self.in_sight and is_held(self.parameter):
            pass  # autograd has added the new one, as ever
        else:
            self._hide(self.factor if self.in_sight else weights.weight)

    def _hide(self, weight: float) -> None:
        grad = read_grad(self.parameter)
        grad = (local_gradient(grad, self.parameter) if self._sharded else grad).detach()
        write_grad(self.parameter, None)
        if self.in_sight:
            self._stop_sight()
        self._fold(grad, weight)

    def _fold(self, grad: torch.Tensor, weight: float) -> None:
        session, record, total = self.session, self.record, self.sum
        if total.empty:
            local = local_part(self.parameter)
            kind = local.dtype, local.device
            if kind != self._kind:
                self._kind, self._supported = kind, is_supported(local)
            if not self._supported:
                self.format = "torch"
            elif record.folds == 0 or self.format == "torch":
                self.format = session.policy.choose(record)
            total.start(self.format, local)
        record.folds += 1
        if total.format == "fp16" and session.policy.wants_fp32(record, grad):
            record.promotions += not total.empty or record.folds > 1
            self.format = "fp32"
            total.promote()
        elif total.format == "fp16" and session.sums_exactly and not total.empty:
            total.promote()  # what comes last needs no rounding: the step reads float32
        seed = self._draw(session.options.seed) if session.options.rounding == "stochastic" else None
        self.measure()
        statistics = total.add(grad, weight, seed)
        if statistics is not None:
            session.statistics.note(record, statistics, is_sum=False)
        if total.format == "torch":  # a sparse gradient, or of another dtype
            self.format = "torch"

    def measure(self) -> None:
        """Measures a gradient that has become its sum by handing its memory over, if that was not done yet: it is not
        done before somebody asks, since a step looks at all of them in one call."""
        if not self.sum.is_measured:
            self.sum.is_measured = True
            self.session.statistics.note(self.record, operators.measure_gradient(self.sum.buffer), is_sum=True)

    def _draw(self, seed: int) -> int:
        """A number for the random rounding of the next gradient."""
        self.draws += 1
        return (seed * 0x9E3779B97F4A7C15 + self.index * 0xD1B54A32D192ED03 + self.draws * 0xAEF17502108EF2D9) & _MASK

    # ---- in sight or hidden

    @property
    def is_empty(self) -> bool:
        """Whether there is no gradient at all."""
        return self.sum.empty and self._aside is None and read_grad(self.parameter) is None

    def show(self) -> None:
        """Puts the gradient into ``.grad``, if there is one."""
        with self.session.lock:
            self._show(self.session.weights.divisor)

    def _show(self, divisor: float) -> None:
        """Has ``.grad`` be S / divisor, in the parameter's own dtype."""
        with outside_inference_mode():
            self._bring_to_sight(divisor)

    def _bring_to_sight(self, divisor: float) -> None:
        self._unite()
        grad = read_grad(self.parameter)
        if grad is not None and not self.in_sight:  # a gradient that take() has not seen yet
            if self.sum.empty:
                self._note_sight(self.session.weights.weight)
            elif grad.requires_grad:
                self._show_with_graph(self.session.weights)
            else:
                self._hide(self.session.weights.weight)
        if not self.sum.empty:
            self.measure()
            shown = like_parameter(self.sum.take(1 / divisor), self.parameter)
            self.sum.clear()
            write_grad(self.parameter, shown)
            self._note_sight(divisor)
        elif self.in_sight and self.factor != divisor:
            with torch.no_grad():
                local_part(read_grad(self.parameter)).mul_(self.factor / divisor)
            self.factor = divisor

    def _show_with_graph(self, weights) -> None:
        """Adds a gradient that has a graph of its own (create_graph=True) without losing that."""
        if self.in_sight:
            return
        grad = read_grad(self.parameter)
        if weights.weight != weights.divisor:
            grad = grad * (weights.weight / weights.divisor)
        if not self.sum.empty:
            grad = like_parameter(self.sum.take(1 / weights.divisor), self.parameter) + grad
            self.sum.clear()
        write_grad(self.parameter, grad)
        self._note_sight(weights.divisor)

    def _note_sight(self, factor: float) -> None:
        self.in_sight, self.factor = True, factor

    def _stop_sight(self) -> None:
        self.in_sight, self.factor = False, 1.0

    def _forget(self) -> None:
        self._stop_sight()
        self._aside = None
        self.arriving.clear()
        self.sum.clear()
        self.end_window()

    # ---- windows, and coming back

    def join(self) -> None:
        """A session begins: what is in ``.grad`` by now counts as it would without one."""
        if read_grad(self.parameter) is None:
            self._stop_sight()
        elif self.sum.empty:
            self._note_sight(self.session.weights.divisor)

    def settle(self) -> None:
        """A new window begins: what is still in ``.grad`` is what it looks like."""
        if self.in_sight:
            self.factor = self.session.weights.divisor

    def end_window(self) -> None:
        """The statistics of the next window begin."""
        if self.record.folds:
            self.record.start_window()

    @property
    def factor_of_sum(self) -> float:
        """By what a look multiplies what a hidden sum's memory holds."""
        return self.sum.scale / self.session.weights.divisor

    def norm_of_sum(self) -> float:
        """The Euclidean norm of a hidden sum as a look would show it, by the kernels' statistics."""
        return math.sqrt(self.record.sum_sumsq) * abs(self.factor_of_sum)

    def state_dict(self) -> dict:
        self._unite()
        shown = local_part(read_grad(self.parameter)).detach() if self.in_sight and not self.is_empty else None
        state = {"draws": self.draws, "record": self.record.state_dict(), "fresh": self.fresh, "kept_as": self.format}
        return {**state, **self.sum.state_dict(), "shown": shown, "factor": self.factor}

    def check_state_dict(self, state: dict) -> None:
        """Raises ValueError, KeyError or TypeError for a state that load_state_dict() can't take."""
        self.sum.check_state_dict(state)
        self.record.check_state_dict(state["record"])
        int(state["draws"]), bool(state["fresh"])
        if not 0 < float(state["factor"]) < math.inf:
            raise ValueError(f"factor is {state['factor']}, expected a finite number above 0")
        if state["kept_as"] not in FORMATS:
            raise ValueError(f"format is {state['kept_as']!r}, expected one of {', '.join(FORMATS)}")
        shape = self.sum.parameter.shape
        if state["shown"] is not None and state["shown"].shape != shape:
            raise ValueError(f"its gradient has shape {list(state['shown'].shape)}, expected {list(shape)}")

    def load_state_dict(self, state: dict) -> None:
        """Takes over a state that check_state_dict() has passed, in the place of the gradient that there is."""
        self.drop()
        self.sum.load_state_dict(state)
        self.record.load_state_dict(state["record"])
        self.draws, self.fresh, self.format = int(state["draws"]), bool(state["fresh"]), state["kept_as"]
        if state["shown"] is not None:
            grad = state["shown"].to(self.parameter.device, copy=True)
            write_grad(self.parameter, like_parameter(grad, self.parameter))
            self._note_sight(float(state["factor"]))
