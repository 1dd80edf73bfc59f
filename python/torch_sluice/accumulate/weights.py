"""What each gradient weighs in its sum, and by what the sum is divided."""

import math


class Weights:
    """Weights of a window.

    Without token counts each gradient weighs 1 and the sum is divided by ``every``. ``count()`` has gradients weigh
    their micro-batch's tokens, and the sum is divided by all of these.

    Args:
        every: calls of step() in a window, or None.
        reduction: of the loss, "mean" or "sum".
        average: given the tokens of this rank, those of all ranks / number of ranks.
    """

    def __init__(self, every: int | None, reduction: str, average=lambda tokens: tokens):
        self.every, self.reduction, self._average = every or 1, reduction, average
        self.start()

    def start(self) -> None:
        """A new window."""
        self.tokens: float | None = None  # of this micro-batch
        self.unused = False  # whether they were counted and no gradient has come since
        self.total: float | None = None  # of the window; None: nothing was counted

    def restart(self) -> None:
        """Forgets the window, but not a micro-batch that was counted and whose gradients are still to come."""
        tokens = self.tokens if self.unused else None
        self.start()
        if tokens is not None:
            self.tokens, self.total, self.unused = tokens, tokens, True

    def end_micro_batch(self) -> None:
        self.tokens, self.unused = None, False

    def count(self, tokens: float, began: bool) -> None:
        """Tokens of the coming micro-batch; ``began``: the window has gradients already."""
        try:
            tokens = float(tokens)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise ValueError(f"tokens is {tokens!r}, expected a finite number of at least 0") from None
        if not (math.isfinite(tokens) and tokens >= 0):
            raise ValueError(f"tokens is {tokens}, expected a finite number of at least 0")
        if self.total is None and began:
            raise RuntimeError("count() was not called for earlier micro-batches of this window; call it for each")
        self.tokens, self.unused = tokens, True
        self.total = (self.total or 0.0) + tokens

    @property
    def is_trivial(self) -> bool:
        """Whether a sum is just a sum: nothing weighs, nothing is divided."""
        return self.total is None and self.every == 1

    @property
    def weight(self) -> float:
        """By which gradients of this micro-batch are multiplied."""
        if self.tokens is None and self.total is not None:
            raise RuntimeError("count() was called for earlier micro-batches of this window but not for this one")
        return 1.0 if self.tokens is None or self.reduction == "sum" else self.tokens

    @property
    def divisor(self) -> float:
        """By which the sum is divided."""
        return float(self.every) if self.total is None else self._average(self.total) or 1.0

    def state_dict(self) -> dict:
        return {"tokens": self.tokens, "unused": self.unused, "total": self.total}

    def check_state_dict(self, state: dict) -> None:
        """Raises ValueError, KeyError or TypeError for a state that load_state_dict() can't take."""
        for name in ("tokens", "total"):
            if state[name] is not None and not 0 <= float(state[name]) < math.inf:
                raise ValueError(f"the saved {name} is {state[name]}, expected a finite number of at least 0")
        bool(state["unused"])

    def load_state_dict(self, state: dict) -> None:
        self.tokens, self.total = (None if state[name] is None else float(state[name]) for name in ("tokens", "total"))
        self.unused = bool(state["unused"])
