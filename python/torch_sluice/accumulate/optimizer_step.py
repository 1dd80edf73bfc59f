"""What a call of ``optimizer.step()`` does while a session is open: it is held back, left out, or made."""

import contextlib
import functools
import math
import types
import warnings

import torch

from torch_sluice.accumulate.access import read_grad
from torch_sluice.accumulate.statistics import norms_of_all, real_values

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")  # where torch keeps them


class _LeftOut(Exception):
    """A step is left out after its closure was evaluated."""


class OptimizerStep:
    """Stands in the place of one optimizer's ``step``."""

    def __init__(self, session):
        self._session = session
        self._optimizer = session.optimizer

    def wrap(self) -> None:
        before = self._optimizer.__dict__.get("step")
        original = self._original = self._optimizer.step
        alive = self._alive = [True]

        @torch._disable_dynamo  # which would take what it saw of the gradients in one step for what they always are
        @functools.wraps(original)
        def step(optimizer, *args, **kwargs):
            return self._call(args, kwargs) if alive else original(*args, **kwargs)

        # A bound method, as the step that it stands for: learning rate schedulers look for its __func__.
        self._inside, self._before = types.MethodType(step, self._optimizer), before
        self._optimizer.step = self._inside
        adopting = _adopting(self._optimizer.add_param_group, self._session)
        self._optimizer.add_param_group = types.MethodType(adopting, self._optimizer)
        self._running = False
        self._hooks = []
        if hasattr(self._optimizer, _HOOKS[0]):  # lookalikes that never called torch's __init__ have none
            self._hooks.append(self._optimizer.register_step_pre_hook(self._before_step))
            self._hooks.append(self._optimizer.register_step_post_hook(self._after_step))

    def unwrap(self) -> None:
        """``step`` is what it was. Where somebody wrapped ours in between, ours hands calls on."""
        self._alive.clear()
        for hook in self._hooks:
            hook.remove()
        self._optimizer.__dict__.pop("add_param_group", None)
        if self._optimizer.__dict__.get("step") is self._inside:
            del self._optimizer.step
            if self._before is not None:
                self._optimizer.step = self._before

    @torch._disable_dynamo
    def _before_step(self, optimizer, args, kwargs) -> None:
        """A step by somebody who got hold of it before the session, as torch.compile(optimizer.step) may have."""
        every = self._session.window.every
        if not self._running and every is not None and every > 1:
            raise RuntimeError(
                f"somebody calls a step() of {type(optimizer).__name__} that was taken before the session began, and "
                f"every is {every}, so windows can't be told; expected accumulate() without every, or the session to "
                "begin first"
            )

    @torch._disable_dynamo
    def _after_step(self, optimizer, args, kwargs) -> None:
        if not self._running:
            self._count(getattr(optimizer, "found_inf", None))

    def _call(self, args: tuple, kwargs: dict):
        session, optimizer = self._session, self._optimizer
        closure = args[0] if args else kwargs.get("closure")
        closure = closure if callable(closure) else None
        if closure is not None and not self._evaluates_first() and session.window.every not in (None, 1):
            raise RuntimeError(
                f"step() was called with a closure on {type(optimizer).__name__}, which may evaluate it several times, "
                f"and every is {session.window.every}, expected accumulate() without every"
            )
        if session.window.is_held:
            with torch.enable_grad():
                loss = None if closure is None else closure()
            self.hold()
            return loss
        if closure is None:
            return None if self._leaves_out() else self._step(args, kwargs)
        if session.options.low_memory:  # which calls the optimizer for each parameter
            with torch.enable_grad():
                loss = closure()
            return loss if self._leaves_out() else self._step(*_with_closure(args, kwargs, lambda: loss))
        if not self._evaluates_first():
            return self._step(args, kwargs)
        return self._step_with_closure(closure, args, kwargs)

    def _step_with_closure(self, closure, args: tuple, kwargs: dict):
        """Looks at the gradients after the closure has made them, and before the optimizer changes anything."""
        evaluated = []

        def look_first():
            loss = closure()
            if not evaluated:
                evaluated.append(loss)
                if self._leaves_out():
                    raise _LeftOut
            return loss

        try:
            return self._step(*_with_closure(args, kwargs, look_first))
        except _LeftOut:
            return evaluated[0]

    def _evaluates_first(self) -> bool:
        """Whether step(closure) evaluates it before it does anything else: so do torch's own."""
        owner = next(one for one in type(self._optimizer).__mro__ if "step" in vars(one))
        return owner.__module__.startswith("torch.optim.")

    def hold(self) -> None:
        """A call that does nothing, because the window is not full."""
        session = self._session
        with session.lock:
            session.adopt_parameters()
            session.window.hold()
            session.held_steps += 1
            session.end_micro_batch()
        self._optimizer._opt_called = True  # what learning rate schedulers ask for: step() was called before theirs

    def _leaves_out(self) -> bool:
        """Puts gradients into ``.grad``; True if one is not finite, and the step was left out and counted as such."""
        session = self._session
        with session.lock:
            session.adopt_parameters()
            session.take_postponed()
            session.statistics.read()
            gradients = list(session.gradients.values())
            spoiled = self._measure(gradients)
            if not session.options.low_memory:
                for gradient in gradients:
                    gradient.show()
            by_scaler = hasattr(self._optimizer, "found_inf")  # then GradScaler has looked, and a fused step obeys it
            if not by_scaler and session.agreement.skips(bool(spoiled), gradients):
                self._skip(spoiled, gradients)
                return True
            session.warn_of_error()
        return False

    def _step(self, args: tuple, kwargs: dict):
        session = self._session
        found_inf = getattr(self._optimizer, "found_inf", None)
        self._running = True
        try:
            result = (self._step_one_by_one if session.options.low_memory else self._original)(*args, **kwargs)
        finally:
            self._running = False
        self._count(found_inf)
        return result

    def _count(self, found_inf: torch.Tensor | None) -> None:
        """A call of the optimizer has ended. A fused one makes no step where GradScaler has found infinities."""
        session = self._session
        with session.lock:
            session.adopt_parameters()
            if found_inf is not None and float(found_inf) != 0:
                session.skipped_steps += 1
            else:
                session.steps += 1
            session.end_window()

    def skip(self) -> None:
        """The step was left out because of what is in the gradients."""
        with self._session.lock:
            self._session.skipped_steps += 1
            if self._session.options.low_memory:
                for gradient in self._session.gradients.values():
                    gradient.drop()
            self._session.end_window()

    def _skip(self, spoiled, gradients) -> None:
        names = ", ".join(gradient.name for gradient in spoiled[:3]) + (", ..." if len(spoiled) > 3 else "")
        warnings.warn(
            f"step skipped: {len(spoiled)} of {len(gradients)} gradients are not finite "
            f"({names or 'on another rank'}); parameters and the optimizer's state stay as they are",
            stacklevel=5,
        )
        self._optimizer._opt_called = True
        self.skip()

    def _measure(self, gradients) -> list:
        """Notes the norm of each gradient, and returns those that are not finite: of sums by what the kernels have
        measured, of the others by looking at all of them together."""
        spoiled, to_look_at = [], []
        for gradient in gradients:
            record, total = gradient.record, gradient.sum
            record.step_norm = 0.0
            if total.empty or (gradient.parameter.dtype == torch.float16 and not self._session.options.low_memory):
                gradient.show()
                to_look_at.append((gradient, real_values(read_grad(gradient.parameter)), 1.0))
            elif not total.is_measured:
                to_look_at.append((gradient, total.buffer, gradient.factor_of_sum))
            else:
                record.step_norm = gradient.norm_of_sum()
                spoiled += [gradient] if record.sum_sumsq == math.inf else []
        looked_at = [one for one in to_look_at if one[1] is not None and one[1].numel() > 0]
        norms = norms_of_all([values for _, values, _ in looked_at])
        for (gradient, _, factor), norm in zip(looked_at, norms, strict=True):
            gradient.record.step_norm = norm * abs(factor)
            if not gradient.sum.is_measured:
                gradient.sum.is_measured = True
                gradient.record.grad_norm = norm
            spoiled += [] if math.isfinite(norm) else [gradient]
        return spoiled

    def _step_one_by_one(self, *args, **kwargs):
        """Reads, averages, clips and steps one parameter at a time: no two averaged gradients exist at once."""
        session, result, scale = self._session, None, 1.0
        gradients = [one for one in session.gradients.values() if not one.is_empty]
        if session.options.max_norm is not None:
            norm = math.sqrt(sum(gradient.record.step_norm**2 for gradient in gradients))
            scale = min(1.0, session.options.max_norm / (norm + 1e-6))
        if not gradients:
            return self._original(*args, **kwargs)
        for gradient in gradients:
            gradient.blind = True
        try:
            for gradient in gradients:
                gradient.blind = False
                if scale != 1.0:
                    gradient.multiply(scale)
                gradient.show()
                with self._without_hooks(before=gradient is not gradients[0], after=gradient is not gradients[-1]):
                    result = self._original(*args, **kwargs)
                gradient.drop()
                gradient.blind = True
        finally:
            for gradient in gradients:
                gradient.blind = False
        return result

    @contextlib.contextmanager
    def _without_hooks(self, before: bool, after: bool):
        """One step is one for the user's hooks, however often the optimizer is called for it."""
        names = [name for name, is_out in zip(_HOOKS, (before, after), strict=True) if is_out]
        kept = {name: hooks for name in names if (hooks := vars(self._optimizer).get(name))}
        for name in kept:
            setattr(self._optimizer, name, type(kept[name])())
        try:
            yield
        finally:
            for name, hooks in kept.items():
                setattr(self._optimizer, name, hooks)


def _adopting(original, session):
    @functools.wraps(original)
    def add_param_group(optimizer, param_group):
        original(param_group)
        with session.lock:
            session.adopt_parameters()

    return add_param_group


def _with_closure(args: tuple, kwargs: dict, closure) -> tuple[tuple, dict]:
    """The same arguments with another closure."""
    return ((closure, *args[1:]), kwargs) if args else (args, {**kwargs, "closure": closure})
