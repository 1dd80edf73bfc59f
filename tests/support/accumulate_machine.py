"""One side of a random program: a small model, its optimizer and, on one of two sides, a session over them.

Each method without an underscore is an operation that a program may hold. What an operation lets a user see goes to
``observed``. The side without a session also keeps ``scale``: a norm for every parameter, relative to which a sum that
is rounded to float16 may be wrong.
"""

import contextlib
import copy
import io

import torch

from support.accumulate_gradients import GradientOperations
from support.accumulate_model import LAYERS, OPTIMIZERS, Net


class _Skipped(Exception):
    """Leaves a step with a closure out."""


class Machine(GradientOperations):
    """``open_session(model, optimizer)`` gives a context manager; without it the side is plain PyTorch. ``two``: head b
    has an optimizer, and a session, of its own."""

    def __init__(self, optimizer="sgd", tolerance=0.0, two=False, open_session=None):
        self.kind, self.tolerance, self.open_session = optimizer, tolerance, open_session
        self.model, self.session, self.saved = Net(), None, None
        self.steps = self.skipped = 0  # counted without a session
        self.calls = self.total = 0  # calls of step(), and tokens, in this window, for loops that have windows
        self.observed, self.held, self.hooks, self.scale = [], [], [], {}
        self.peak = self.highest = 0.0  # of the sum of ``scale``: in this operation, and ever
        self.two, self.grouped = two, [layer for layer in LAYERS if layer != "late" and not (two and layer == "b")]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
        self.other_session = None
        self._make_optimizer()
        self.enter()

    # ---- what a program does not call

    def _make_optimizer(self):
        groups = [{"params": list(getattr(self.model, layer).parameters())} for layer in self.grouped]
        self.optimizer = OPTIMIZERS[self.kind](groups)
        self.optimizer.register_step_post_hook(self._note_step)
        if self.two:
            self.other = OPTIMIZERS["sgd"](self.model.b.parameters())
            if self.open_session:
                self._close_other()
                self.other_session = self.open_session(self.model, self.other)
                self.other_session.__enter__()

    def _close_other(self):
        if self.other_session is not None:
            self.other_session.__exit__(None, None, None)

    def _note_step(self, *_):
        self.steps += 1

    def _parameter(self, name):
        return self.model.get_parameter(name)

    def _note(self, value):
        """Keeps what a user has seen, and how wrong it may be: of each parameter, and of all."""
        if isinstance(value, torch.Tensor):  # in a hook the books don't have what has just come
            self.peak = max(self.peak, sum(self.scale.values()) + value.norm().item())
        each = [self.tolerance * self.scale.get(name, 0.0) for name, _ in self.model.named_parameters()]
        self.observed.append((value, each, self.tolerance * max(self.peak, sum(self.scale.values()))))

    def _in_session(self):
        """The parameters that the session looks after."""
        return {n: p for n, p in self.model.named_parameters() if n.split(".")[0] in self.grouped}

    def _is_spoiled(self, parameters=None):
        parameters = self._in_session().values() if parameters is None else parameters
        return not all(p.grad.isfinite().all() for p in parameters if p.grad is not None)

    @contextlib.contextmanager
    def _changing(self, how):
        """Keeps ``scale`` right around what adds to gradients, shrinks them, replaces them or keeps their error."""
        if not self.tolerance or self.open_session:
            yield
            return
        before = {n: None if p.grad is None else p.grad.detach().clone() for n, p in self.model.named_parameters()}
        try:
            yield
        finally:
            rest = sum(self.scale.get(n, 0.0) for n in before)
            for name, parameter in self.model.named_parameters():
                old, new, scale = before[name], parameter.grad, self.scale.get(name, 0.0)
                if new is None or (how == "shrink" and old is None):
                    scale = 0.0
                elif how == "add":
                    scale += (new - (0 if old is None else old)).norm().item()
                elif how == "replace" and (old is None or not torch.equal(old, new)):
                    scale = new.norm().item()
                elif how in ("shrink", "clip") and old is not None and old.norm() > 0:
                    if how == "clip":  # the factor is of the norm of all, which is wrong too
                        scale += rest
                    scale *= new.norm().item() / old.norm().item()
                self.scale[name] = scale
            self.peak = max(self.peak, sum(self.scale.values()))
            self.highest = max(self.highest, self.peak)

    # ---- steps

    def step(self):
        if not self.open_session and self._is_spoiled():
            self.skipped += 1  # the one thing in which a session differs from plain PyTorch
            return
        self.optimizer.step()

    def other_step(self):
        if self.two and (self.open_session or not self._is_spoiled(self.model.b.parameters())):
            self.other.step()

    def other_zero_grad(self, set_to_none=True):
        if self.two:
            with self._changing("replace"):
                self.other.zero_grad(set_to_none=set_to_none)

    def step_with_closure(self, seed, clipped=False):
        def closure():
            self.zero_grad()
            self.backward(seed, ("a", "b"))
            if clipped:
                self.clip("norm")
            return self.observed[-1][0]

        if self.open_session:
            self._note(self.optimizer.step(closure))
            return

        def checked():
            loss = closure()
            if self._is_spoiled():
                raise _Skipped(loss)
            return loss

        try:
            self._note(self.optimizer.step(checked))
        except _Skipped as skipped:
            self.skipped += 1
            self._note(skipped.args[0])

    def unscale(self):
        with self._changing("shrink"):
            self.scaler.unscale_(self.optimizer)

    def scaler_step(self):
        before = self.steps
        with self._changing("shrink"):
            self.scaler.step(self.optimizer)
            self.skipped += self.steps == before
            self.scaler.update()
        self._note(self.scaler.get_scale())

    # ---- the model

    def freeze(self, layer, frozen):
        getattr(self.model, layer).requires_grad_(not frozen)

    def add_group(self):
        if "late" not in self.grouped:
            self.grouped.append("late")
            self.optimizer.add_param_group({"params": list(self.model.late.parameters())})

    def cast(self, double):
        self.model.double() if double else self.model.float()

    def shrink_weights(self):
        with torch.no_grad():
            self.model.trunk.weight.mul_(0.9)
        self.model.a.weight.data = self.model.a.weight.data * 0.9

    def copy_model(self, seed):
        """A copy has no gradients and is nobody's business but its own."""
        twin = copy.deepcopy(self.model)
        self._note([p.grad is None for p in twin.parameters()])
        dtype = twin.trunk.weight.dtype
        loss = twin(torch.randn(4, 20, generator=torch.Generator().manual_seed(seed)).to(dtype), ("a",))
        if loss.requires_grad:
            loss.backward()
            loss = twin(torch.ones(4, 20, dtype=dtype), ("a",)).backward()
        self._note([None if p.grad is None else p.grad.clone() for p in twin.parameters()])

    # ---- hooks

    def hook(self, name, how):
        parameter = self._parameter(name)
        if not parameter.requires_grad:
            return
        if how == "tensor":
            self.hooks.append(parameter.register_hook(lambda grad: grad * 0.5))
        elif how == "keep what comes":
            self.hooks.append(parameter.register_hook(lambda grad: self.held.append((name, grad))))
        elif how == "before step":

            def look(optimizer, *_):
                self._note(None if parameter.grad is None else parameter.grad.detach().clone())

            self.hooks.append(self.optimizer.register_step_pre_hook(look))
        else:

            def act(parameter):
                self._note(None if parameter.grad is None else parameter.grad.detach().clone())
                if how == "halve" and parameter.grad is not None:
                    with torch.no_grad():
                        parameter.grad.mul_(0.5)
                elif how == "drop":
                    parameter.grad = None
                elif how == "keep":
                    self.held.append((name, parameter.grad))
                elif how == "fail":
                    raise OSError("a hook that fails")

            self.hooks.append(parameter.register_post_accumulate_grad_hook(act))

    def remove_hooks(self):
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    # ---- the session

    def enter(self, again=False):
        """``again``: the session that was left, else a new one."""
        if self.open_session:
            if not again or self.session is None:
                self.session = self.open_session(self.model, self.optimizer)
            self.session.__enter__()
        if not again:
            self.steps = self.skipped = 0

    def leave(self, again=False, error=False):
        """Out of the session and in again; ``error``: by an exception."""
        if self.open_session:
            try:
                with contextlib.ExitStack() as stack:
                    stack.push(self.session)
                    if error:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                pass
        self.look()
        self.enter(again)

    def reset(self):
        if self.session:
            self.session.reset()
        else:
            for name, parameter in self._in_session().items():
                parameter.grad = None
                self.scale[name] = 0.0

    def save(self):
        """Everything that a checkpoint holds; without a session the gradients stand for its state."""
        if self.open_session:
            state = self.session.state_dict()
        else:
            grads = {n: p.grad if p.grad is None else p.grad.detach() for n, p in self._in_session().items()}
            state = [grads, dict(self.scale), self.steps, self.skipped, self.calls, self.total]
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.optimizer.state_dict(), state], file)
        flags = [(n, p.requires_grad, p.dtype) for n, p in self.model.named_parameters()]
        self.saved = file.getvalue(), list(self.grouped), flags

    def load(self):
        """Back to where ``save`` was, if the model is of the same make still."""
        flags = [(n, p.requires_grad, p.dtype) for n, p in self.model.named_parameters()]
        if self.saved is None or self.saved[1:] != (self.grouped, flags):
            return
        model, optimizer, state = torch.load(io.BytesIO(self.saved[0]), weights_only=True)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        if self.open_session:
            self.session.load_state_dict(state)
            return
        grads, scale, self.steps, self.skipped, self.calls, self.total = state
        for name, parameter in self._in_session().items():
            parameter.grad, self.scale[name] = grads[name], scale.get(name, 0.0)

    def restart(self):
        """The program ends, and goes on from a checkpoint in new objects."""
        if not all(p.requires_grad and p.dtype == torch.float32 for p in self.model.parameters()):
            return
        self.save()
        if self.open_session:
            self.session.__exit__(None, None, None)
        self.remove_hooks()
        self.let_go()
        self.model, self.scaler = Net(), torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
        self._make_optimizer()
        self.enter()
        self.load()

    def _close(self):
        self._close_other()
        if self.open_session:
            self.session.__exit__(None, None, None)
        self.look()
