"""The session behind ``torch_sluice.accumulate``: which parameters it has, and what the loop does to all of them."""

import threading
import warnings
import weakref
from collections.abc import Set

import torch
from torch import nn

from torch_sluice.accumulate import data_parallel, grad_scaler, state
from torch_sluice.accumulate.agreement import Agreement
from torch_sluice.accumulate.gradient import Gradient
from torch_sluice.accumulate.optimizer_step import OptimizerStep
from torch_sluice.accumulate.parameters import Parameters
from torch_sluice.accumulate.policy import make_policy
from torch_sluice.accumulate.report import SessionStats, make_stats
from torch_sluice.accumulate.sharded import is_dtensor
from torch_sluice.accumulate.statistics import Statistics
from torch_sluice.accumulate.weights import Weights
from torch_sluice.accumulate.window import Window

open_sessions: "weakref.WeakSet[Session]" = weakref.WeakSet()  # those that are entered and not left


class Session:
    """What ``with torch_sluice.accumulate(...) as session`` gives; see there for the arguments.

    Attributes:
        steps: steps that the optimizer has made.
        skipped_steps: steps left out because a gradient was not finite.
        held_steps: calls of ``step()`` that were held back by ``every=N``.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, options):
        self.model, self.optimizer, self.options = model, optimizer, options
        self.policy = make_policy(options.policy, options.tolerance, options.every)
        self.window = Window(options.every)
        self.weights = Weights(options.every, options.reduction, self._average)
        self.agreement = Agreement()
        self.lock = threading.RLock()  # backward passes may run in several threads
        self.parameters = Parameters(self)
        self.steps = self.skipped_steps = self.held_steps = 0
        self._step = OptimizerStep(self)
        self.statistics = Statistics()
        self._postponed: Gradient | None = None
        self._averaged: tuple[float, float] | None = None  # tokens of this rank, and what _average made of them
        self._zeroed = True  # whether zero_grad() was called since the last call of step()
        self._open = self._left = False
        self._warned_of_error = False
        self.adopt_parameters()
        if not any(parameter.requires_grad for parameter in self.gradients):
            raise ValueError("the optimizer has no parameter that requires a gradient")

    # ---- opening and closing

    def __enter__(self) -> "Session":
        if self._open:
            raise RuntimeError("the session is open already, expected one that was left or not entered yet")
        grad_scaler.attach(self.optimizer, self)
        try:
            self.parameters.open()
        except BaseException:
            grad_scaler.detach(self.optimizer, self)
            raise
        self._open = True
        open_sessions.add(self)
        if self._left:  # and not loaded since: a window begins
            self.window.start()
            self.weights.start()
            self._averaged = None
        self._left, self._zeroed = False, True
        for gradient in self.gradients.values():
            gradient.join()
        data_parallel.attach(self)
        self._step.wrap()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Does nothing if the session is not open."""
        if not self._open:
            return
        problem = None
        with self.lock:
            self.take_postponed()
            for gradient in self.gradients.values():
                try:
                    gradient.show()
                except Exception as failure:  # memory may be what ended the loop: the sum stays where it is
                    problem = failure
            self.statistics.read()
        self._open, self._left = False, True
        open_sessions.discard(self)
        self._step.unwrap()
        self.parameters.close()
        grad_scaler.detach(self.optimizer, self)
        data_parallel.detach(self)
        self.agreement.close(kind is None)
        if problem is not None:
            warnings.warn(
                f"some gradients could not be put into .grad ({problem}); session.state_dict() has them", stacklevel=2
            )
        elif self.window.is_open and kind is None:
            warnings.warn(
                f"accumulation ended after {self.window.held} of {self.window.every} calls of step(): no step was made "
                "with their gradients, they are left in .grad",
                stacklevel=2,
            )

    @property
    def gradients(self) -> dict[torch.Tensor, Gradient]:
        """The Gradient of each parameter of the optimizer."""
        return self.parameters.gradients

    def adopt_parameters(self) -> None:
        """Takes in parameters that are new to the optimizer."""
        self.parameters.adopt()

    # ---- what gradients ask of their session

    @property
    def sums_exactly(self) -> bool:
        """Whether a float16 sum that gets a gradient now goes on in float32, because the step comes next."""
        return self.window.comes_last and not self.options.low_memory

    def postpone(self, gradient: Gradient) -> None:
        """Has a gradient stay where it is until the next one has come."""
        self._postponed = gradient

    def take_postponed(self) -> None:
        gradient, self._postponed = self._postponed, None
        if gradient is not None:
            gradient.take(postponed=True)

    def _average(self, tokens: float) -> float:
        """Tokens of all ranks / ranks, where DistributedDataParallel averages gradients in this pass."""
        if self._averaged is None or self._averaged[0] != tokens:
            reductions = (one.reduction for one in self.gradients.values())
            averaging = next((one for one in reductions if one is not None and one.expected), None)
            if averaging is None:
                return tokens
            self._averaged = tokens, averaging.average(tokens)
        return self._averaged[1]

    # ---- what the loop does

    def count(self, tokens: float) -> None:
        """Says how many tokens (or samples) the coming micro-batch has, before its backward pass.

        The gradient is then the sum over micro-batches of tokens x gradient, divided by the sum of tokens
        (``reduction="mean"``), or the sum of gradients divided by that sum (``reduction="sum"``). Under
        DistributedDataParallel tokens of all ranks are added up. Once in a window means in each of its micro-batches;
        a window ends where a step is made, or where ``zero_grad()`` drops it.

        Raises:
            ValueError: tokens is negative or not finite.
            RuntimeError: earlier micro-batches of this window were not counted; or parameters are DTensors, whose
                gradients are averaged over ranks before they are weighed.
        """
        if any(is_dtensor(parameter) for parameter in self.gradients):
            raise RuntimeError("count() was called and parameters are DTensors, expected plain tensors")
        with self.lock:
            self.take_postponed()
            began = self.window.is_open or any(gradient.fresh for gradient in self.gradients.values())
            self.weights.count(tokens, began)

    def reset(self) -> None:
        """Drops all gradients, as after a micro-batch that failed; a new window begins."""
        with self.lock:
            self.adopt_parameters()
            for gradient in self.gradients.values():
                gradient.drop()
            self.start_window()

    def zero_gradients(self, gradients: list[Gradient], set_to_none: bool) -> None:
        """What ``zero_grad`` of an optimizer or a module does to these gradients; those that it must leave alone are
        blind when it returns.

        Raises:
            RuntimeError: with ``every=N``, in mid-window: gradients of calls of step() that were held back can't be
                told from those that came since, which zero_grad() has been left to drop.
        """
        with self.lock:
            if self.window.is_open:
                if not any(gradient.fresh for gradient in gradients):
                    self._zeroed = True
                    for gradient in gradients:
                        gradient.blind = True  # they wait for the call of step() that acts
                    return
                if not self._zeroed:
                    raise RuntimeError(
                        "zero_grad() would drop gradients that came after the last step() without a zero_grad() "
                        f"between, and with every={self.window.every} they can't be told from those of earlier "
                        "micro-batches, which wait for their step; expected accumulate() without every, in a loop that "
                        "steps itself"
                    )
                warnings.warn(
                    "zero_grad() has dropped a window of accumulated gradients, because it came after a backward pass "
                    "that no step() followed; a new window begins",
                    stacklevel=4,
                )
            for gradient in gradients:
                gradient.zero(set_to_none)
            self.note_zero_grad(set(gradients))

    def note_zero_grad(self, zeroed: Set[Gradient] = frozenset()) -> None:
        """``zero_grad`` has ended, and has set these gradients to zero; where nothing is left a window begins."""
        with self.lock:
            self._zeroed = True
            if self.window.is_open and not zeroed:
                return
            if all(gradient in zeroed or gradient.is_empty for gradient in self.gradients.values()):
                self.window.start()
                self.weights.restart()
                self._averaged = None

    def hold_step(self) -> None:
        """Notes a call of step() that does nothing, because the window is not full."""
        self._step.hold()

    def skip_step(self) -> None:
        """Notes a step that was left out because a gradient is not finite."""
        self._step.skip()

    def end_micro_batch(self) -> None:
        """A call of step() was held back, left out or made: what comes next belongs to the next micro-batch."""
        self.take_postponed()
        self.weights.end_micro_batch()
        self._zeroed = False
        for gradient in self.gradients.values():
            gradient.fresh = False

    def end_window(self) -> None:
        """A step was made or left out. Gradients are in ``.grad`` until the loop drops them, as ever."""
        self.statistics.read()
        for gradient in self.gradients.values():
            self.policy.end_window(gradient.record)
            gradient.end_window()
        self.end_micro_batch()
        gradients = list(self.gradients.values())
        self.agreement.hear_formats(gradients)
        self.agreement.ask_formats(gradients)
        self.start_window()

    def start_window(self) -> None:
        self.window.start()
        self.weights.start()
        self._averaged = None
        for gradient in self.gradients.values():
            gradient.settle()

    def warn_of_error(self) -> None:
        """Says once that rounding has cost a sum more than was allowed."""
        tolerance = self.policy.allowed_error
        worst = max(self.gradients.values(), key=lambda gradient: gradient.record.error)
        error = worst.record.error
        if not self._warned_of_error and error > tolerance:
            self._warned_of_error = True
            warnings.warn(
                f"rounding to float16 made the gradient of parameter {worst.name} {error:.2g} wrong, relative to its "
                f"norm, and tolerance is {tolerance}: large gradients have cancelled in this window. Its next sums are "
                "in float32; policy='fp32' keeps all of them there",
                stacklevel=5,
            )

    # ---- looking in, and coming back

    @property
    def fp16_share(self) -> float:
        """Elements whose sum is float16 / elements: what ``stats()`` has, without the rest."""
        elements = {"fp16": 0, "fp32": 0, "torch": 0}
        for parameter, gradient in self.gradients.items():
            if parameter.requires_grad:
                elements[gradient.format] += gradient.record.elements
        return elements["fp16"] / max(sum(elements.values()), 1)

    def stats(self) -> SessionStats:
        """Formats, bytes, norms and errors, in all and by parameter."""
        with self.lock:
            self._measure()
            return make_stats(self)

    def _measure(self) -> None:
        for gradient in self.gradients.values():
            gradient.measure()
        self.statistics.read()

    def state_dict(self) -> dict:
        """Everything that a later session needs to go on exactly from here, in the middle of a window too.

        Tensors in it are the session's own, as in other state_dicts of torch: save or copy it before training goes on.
        """
        with self.lock:
            self.adopt_parameters()
            self.take_postponed()
            self._measure()
            self.agreement.collect()
            return state.make(self)

    def load_state_dict(self, saved: dict) -> None:
        """Goes on where another session stood when its ``state_dict()`` was taken. Gradients are replaced too.

        Raises:
            ValueError: the state has another version, window or set of parameters; the message names the difference,
                and nothing was changed.
        """
        with self.lock:
            self.adopt_parameters()
            state.check(self, saved)
            self.statistics.clear()
            self._postponed = None
            state.load(self, saved)
            self._left = False
