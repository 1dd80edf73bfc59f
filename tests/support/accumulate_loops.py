"""The loops that people write around ``backward()`` and ``step()``, each as one function for both sides of a test.

A loop trains ``Side``: a model, what is called in its stead (a wrapper), its optimizer, and the policy of its session
or None. Windows have ``N`` micro-batches. Without a session a loop marked EVERY divides by N and steps after each N-th
micro-batch; with one it steps after each.
"""

import contextlib
import itertools
import warnings
from dataclasses import dataclass, field

import torch
from torch import nn

from support.accumulate_training import assert_close, assert_same, loss_of, session_or_not, values

N = 3

# How wrong the way that weights went may be, relative to its length. A float16 sum is wrong by some 3e-4; AdamW makes
# more of that where an element is near zero, and Muon where a direction is.
ERRORS = {"fp32": 1e-4, "fp16": 3e-2, "auto": 3e-2}
MUON_ERROR = 0.15
BFLOAT16_ERROR = 5e-2  # a third of a loss has other bits in bfloat16 than a third of its gradient


@dataclass
class Side:
    """``backward(loss)`` and ``step(optimizer)`` are where a wrapper such as GradScaler comes in."""

    model: nn.Module
    call: object
    optimizer: torch.optim.Optimizer
    policy: str | None
    data: list
    backward: object = torch.Tensor.backward
    step: object = lambda optimizer, *args: optimizer.step(*args)
    quiet: object = contextlib.nullcontext  # around a micro-batch that is not the last of its window
    seen: list = field(default_factory=list)
    steps: int = None

    def session(self, every=None):
        return session_or_not(self.model, self.optimizer, every, self.policy)

    def windows(self):
        """The data in windows; the last is short."""
        return [self.data[start : start + N] for start in range(0, len(self.data), N)]


def _backward(side, batch, divisor, last=True):
    with contextlib.nullcontext() if last else side.quiet():
        side.backward(loss_of(side.call, batch) / divisor)


def step_a_window(side):
    """Divides by the size of the window, the last of which is short."""
    with side.session() as session:
        for window in side.windows():
            for i, batch in enumerate(window):
                _backward(side, batch, len(window), i + 1 == len(window))
            side.step(side.optimizer)
            side.optimizer.zero_grad()
    side.steps = session and session.steps


def zero_grad_first(side):
    with side.session():
        for window in side.windows():
            side.optimizer.zero_grad()
            for i, batch in enumerate(window):
                _backward(side, batch, len(window), i + 1 == len(window))
            side.step(side.optimizer)


def zero_grad_to_zero(side):
    with side.session():
        for window in side.windows():
            for i, batch in enumerate(window):
                _backward(side, batch, len(window), i + 1 == len(window))
            side.step(side.optimizer)
            side.optimizer.zero_grad(set_to_none=False)


def zero_grad_of_the_model(side):
    with side.session():
        for window in side.windows():
            side.model.zero_grad()
            for i, batch in enumerate(window):
                _backward(side, batch, len(window), i + 1 == len(window))
            side.step(side.optimizer)


def clip_and_look(side):
    """Gradients are read in every micro-batch, kept, and clipped."""
    with side.session():
        for window in side.windows():
            for i, batch in enumerate(window):
                _backward(side, batch, len(window), i + 1 == len(window))
                norms = [p.grad.norm() for p in side.model.parameters() if p.grad is not None]
                side.seen += [getattr(norm, "full_tensor", lambda norm=norm: norm)().clone() for norm in norms]
            kept = [parameter.grad for parameter in side.model.parameters()]
            nn.utils.clip_grad_norm_(side.model.parameters(), 0.05)
            assert all(one is parameter.grad for one, parameter in zip(kept, side.model.parameters(), strict=True))
            side.step(side.optimizer)
            side.optimizer.zero_grad()


def throw_a_batch_away(side):
    with side.session():
        for number, window in enumerate(side.windows()):
            for i, batch in enumerate(window):
                _backward(side, batch, len(window), i + 1 == len(window))
                if number == 1 and i == 0:
                    side.optimizer.zero_grad()
            side.step(side.optimizer)
            side.optimizer.zero_grad()


def several_passes(side):
    """Two backward passes in a micro-batch: of a loss, and of another of half the batch."""
    with side.session():
        for window in side.windows():
            for batch in window:
                _backward(side, batch, N, True)
                _backward(side, batch[:2], N, True)
            side.step(side.optimizer)
            side.optimizer.zero_grad()


def closure(side):
    """The whole window in a closure, as LBFGS and SAM call it, several times."""
    with side.session():
        for window in side.windows():

            def evaluate(window=window):
                side.optimizer.zero_grad()
                total = 0.0
                for i, batch in enumerate(window):
                    with contextlib.nullcontext() if i + 1 == len(window) else side.quiet():
                        loss = loss_of(side.call, batch) / len(window)
                        side.backward(loss)
                    total += loss.item()
                return total

            side.step(side.optimizer, evaluate)


def step_each(side):
    """``every=N``: step and zero_grad after each micro-batch; the last window is full here."""
    with side.session(every=N) as session:
        for i, batch in enumerate(side.data[: len(side.data) // N * N]):
            last = i % N == N - 1
            _backward(side, batch, N if session is None else 1, last)
            if session is not None or last:
                side.step(side.optimizer)
                side.optimizer.zero_grad()
    side.steps = session and session.steps


def step_each_clipped(side):
    """``every=N``, zero_grad first, clipped in each micro-batch."""
    with side.session(every=N) as session:
        for i, batch in enumerate(side.data[: len(side.data) // N * N]):
            last = i % N == N - 1
            if session is not None or i % N == 0:
                side.optimizer.zero_grad()
            _backward(side, batch, N if session is None else 1, last)
            if session is not None or last:
                nn.utils.clip_grad_norm_(side.model.parameters(), 0.05)
                side.step(side.optimizer)
    side.steps = session and session.steps


LOOPS = {
    function.__name__: function
    for function in (
        step_a_window, zero_grad_first, zero_grad_to_zero, zero_grad_of_the_model, clip_and_look, throw_a_batch_away,
        several_passes, closure, step_each, step_each_clipped,
    )
}  # fmt: skip
EVERY = {"step_each", "step_each_clipped"}


def muon(parameters):
    """Muon takes matrices only."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(parameter.ndim == 2)
    return torch.optim.Muon([parameter for parameter in parameters if parameter.ndim == 2], lr=1e-2)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2, foreach=False),
    "foreach adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2, foreach=True),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2, fused=True),
    "muon": muon,
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, 0.1, max_iter=4, line_search_fn="strong_wolfe"),
}


def pairs(*axes, allowed=lambda *_: True):
    """Few combinations of these lists' items, in which each pair of items of two lists that is allowed occurs."""
    combinations = [row for row in itertools.product(*axes) if allowed(*row)]
    covers = {row: set(itertools.combinations(enumerate(row), 2)) for row in combinations}
    missing, found = set().union(*covers.values()), []
    while missing:
        found.append(max(combinations, key=lambda row: len(covers[row] & missing)))
        missing -= covers[found[-1]]
    return found


def check(loop, policy, sides, error=0.0):
    """Runs the loop on both sides and compares their weights: bit by bit where both add in the same order. ``error``:
    what is allowed at least where they don't."""
    start = values(sides[0].model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for side in sides:
            LOOPS[loop](side)
    found, wanted = values(sides[0].model), values(sides[1].model)
    assert not torch.equal(wanted[0], start[0])
    if policy == "fp32" and loop not in EVERY:
        assert_same(found, wanted)
        assert_same(sides[0].seen, sides[1].seen)
    else:
        moved = ([one - first for one, first in zip(side, start, strict=True)] for side in (found, wanted))
        muon = isinstance(sides[0].optimizer, torch.optim.Muon) and policy != "fp32"
        assert_close(*moved, max(error, MUON_ERROR if muon else ERRORS[policy]))
    if loop in EVERY:
        assert sides[0].steps == 2
