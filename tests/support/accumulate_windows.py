"""Random programs that call step() after each micro-batch, against the plain loop that divides each loss by N.

By hand: ``PYTHONPATH=tests python -m support.accumulate_windows --count 10000``, as ``accumulate_programs``.
"""

import random

import torch
from torch import nn

from support import accumulate_programs
from support.accumulate_machine import Machine
from support.accumulate_model import LAYERS

TOLERANCES = {"fp32": 1e-5, "fp16": 2e-3, "auto": 2e-3}


class WindowMachine(Machine):
    """``zeroes``: when the loop calls zero_grad: first, last, both or never. ``tokens``: the reduction of the loss,
    where micro-batches are weighed by their tokens; None where all weigh 1 / N."""

    def __init__(self, every, zeroes="last", clip=None, scaled=False, closure=False, tokens=None, **settings):
        self.every, self.zeroes, self.clipping, self.tokens = every, zeroes, clip, tokens
        self.scaled, self.closure = scaled, closure
        super().__init__(**settings)

    def _zero(self, set_to_none=True, whose="optimizer"):
        {"optimizer": self.optimizer, "model": self.model}[whose].zero_grad(set_to_none=set_to_none)

    def _weigh(self, tokens):
        """What a loss weighs in the plain loop, whose gradients are the average over the tokens so far."""
        if self.tokens is None:
            return 1 / self.every
        before, self.total = self.total, self.total + tokens
        for parameter in self._in_session().values():
            if parameter.grad is not None:
                parameter.grad *= before / self.total
        return (tokens if self.tokens == "mean" else 1) / self.total

    def _backward(self, seed, heads, middle=1, reentrant=None, passes=1, spoil=False, tokens=2):
        if not self.open_session:
            weight = self._weigh(tokens)
        elif self.tokens is not None:
            self.session.count(tokens)
        total = 0.0
        for i in range(passes):
            x = torch.randn(4, 20, generator=torch.Generator().manual_seed(seed + i)).requires_grad_()
            loss = self.model(x, [head for head in heads if head in self.grouped], middle, reentrant)
            total += loss.item()
            loss = loss * torch.inf if spoil else loss
            loss = loss if self.open_session else loss * weight
            (self.scaler.scale(loss) if self.scaled else loss).backward()
        return total

    def _clip(self):
        if self.scaled:
            with self._changing("shrink"):
                self.scaler.unscale_(self.optimizer)
        with self._changing("clip" if self.clipping == "norm" else "keep"):
            if self.clipping == "norm":
                nn.utils.clip_grad_norm_(self.model.parameters(), 0.01)
            elif self.clipping == "value":
                nn.utils.clip_grad_value_(self.model.parameters(), 1e-3)

    def _step(self):
        if self.scaled:
            before = self.steps
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.skipped += self.steps == before
        else:
            self.step()

    def micro_batch(self, set_to_none=True, whose="optimizer", **options):
        if self.closure:
            self._micro_batch_by_closure(options)
            return
        ours, first, last = bool(self.open_session), self.calls == 0, self.calls == self.every - 1
        if self.zeroes in ("first", "both") and (ours or first):
            with self._changing("replace"):
                self._zero(set_to_none, whose)
        with self._changing("add"):
            self._backward(**options)
        if ours or last:
            self._clip()
            self._step()
            if self.zeroes in ("last", "both"):
                with self._changing("replace"):
                    self._zero(set_to_none, whose)
        self.calls = 0 if last else self.calls + 1
        self.total = 0 if last else self.total

    def _micro_batch_by_closure(self, options):
        if self.open_session:

            def closure():
                self._zero()
                return self._backward(**options)

            self._note(self.optimizer.step(closure))
        else:
            if self.calls == 0:
                self._zero()
                self.scale.clear()
            with self._changing("add"):
                loss = self._backward(**options)
            self._note(loss)
            if self.calls == self.every - 1:
                self.step()
        self.calls = (self.calls + 1) % self.every

    def throw_away(self, seed, set_to_none=True):
        """A micro-batch whose gradients go, and those of its window with them."""
        if self.open_session:
            self._zero()
            self._backward(seed, ("a", "b"))
            self._zero(set_to_none)
        else:
            if self.calls == 0:
                self._zero()
            with self._changing("add"):
                self._backward(seed, ("a", "b"))
            self._zero(set_to_none)
            self.scale.clear()
        self.calls = self.total = 0

    def reset(self):
        super().reset()
        self.calls = self.total = 0

    def leave_and_enter(self, again=False):
        """Out, where the sum so far is in sight; its gradients are dropped, and a window begins in a session."""
        if self.open_session:
            self.session.__exit__(None, None, None)
        self.look()
        self._zero()
        self.scale.clear()
        self.calls = self.total = 0
        self.enter(again)


def draw_operation(draw, settings):
    name = draw.choices(
        ["micro_batch", "look", "hold", "let_go", "write", "freeze", "add_group", "throw_away", "reset",
         "leave_and_enter", "save", "load", "restart"],
        [30, 3, 2, 1, 2, 2, 1, 1, 1, 1, 1, 1, 1],
    )[0]  # fmt: skip
    if name == "hold" and settings["tokens"]:
        name = "look"  # what is held is divided by more tokens only when somebody looks again
    seed = draw.randrange(10**6)
    if name == "micro_batch":
        options = {"seed": seed, "heads": tuple(draw.sample(("a", "b", "late"), draw.choice((2, 2, 3))))}
        options |= {"middle": draw.choice((0, 1, 1, 2)), "passes": draw.choice((1, 1, 1, 2, 3))}
        if draw.random() < 0.2:
            options["reentrant"] = draw.choice((True, False))
        if not settings["closure"]:
            options |= {"set_to_none": draw.random() < 0.8, "whose": draw.choice(("optimizer", "optimizer", "model"))}
        if settings["tolerance"] < 1e-3 and draw.random() < 0.02 and settings["zeroes"] != "never":
            options["spoil"] = True
        if settings["tokens"]:
            options["tokens"] = draw.choice((1, 2, 5))
        return name, options
    if name == "throw_away":
        return name, {"seed": seed, "set_to_none": draw.random() < 0.8}
    if name == "hold":
        how = draw.choice(("grad", *accumulate_programs.HOLDS))
        return name, {"name": draw.choice(accumulate_programs.PARAMETERS), "how": how}
    if name == "write":
        return name, {"name": draw.choice(accumulate_programs.PARAMETERS), "how": draw.choice(("mul", "numpy", "zero"))}
    if name == "freeze":
        return name, {"layer": draw.choice(LAYERS), "frozen": draw.random() < 0.5}
    if name == "leave_and_enter":
        return name, {"again": draw.random() < 0.5}
    return name, {}


def make_program(seed, policy):
    draw = random.Random(seed)
    settings = {"every": draw.choice((1, 2, 2, 3, 4)), "optimizer": draw.choice(("sgd", "momentum"))}
    settings |= {"zeroes": draw.choice(("first", "last", "last", "both")), "clip": draw.choice((None, "norm", "value"))}
    settings |= {"scaled": draw.random() < 0.2, "tolerance": TOLERANCES[policy], "closure": draw.random() < 0.15}
    if settings["closure"]:
        settings |= {"scaled": False, "clip": None, "zeroes": "first"}
    elif draw.random() < 0.1:
        settings["zeroes"] = "never"
    settings["tokens"] = None
    if not settings["closure"] and settings["zeroes"] != "never" and draw.random() < 0.2:
        settings["tokens"] = draw.choice(("mean", "sum"))
    return WindowMachine, settings, [draw_operation(draw, settings) for _ in range(draw.randint(3, 40))]


def check_program(seed, policy, make_session=None):
    return accumulate_programs.check_program(seed, policy, make_session, make_program)


if __name__ == "__main__":
    accumulate_programs.main(make_program)
