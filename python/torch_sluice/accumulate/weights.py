"""What each micro-batch weighs, and by what the sum of a window is divided."""

import math


class Weights:
    """Token counts of a window. Without any, micro-batches weigh 1 and the sum is divided by calls of step()."""

    def __init__(self, reduction: str):
        self.reduction = reduction
        self.start()

    def start(self) -> None:
        """A new window."""
        self.tokens: float | None = None  # of this micro-batch
        self.total = 0.0

    def end_micro_batch(self) -> None:
        self.tokens = None

    def count(self, tokens: float, began: bool) -> None:
        """Tokens of the coming micro-batch; ``began``: the window has gradients already."""
        tokens = float(tokens)
        if not (math.isfinite(tokens) and tokens >= 0):
            raise ValueError(f"tokens is {tokens}, expected a finite number of at least 0")
        if self.total == 0 and began:
            raise RuntimeError("count() was not called for earlier micro-batches of this window; call it for each")
        self.tokens = tokens
        self.total += tokens

    @property
    def weight(self) -> float:
        """By which gradients of this micro-batch are multiplied."""
        if self.tokens is None and self.total > 0:
            raise RuntimeError("count() was called for earlier micro-batches of this window but not for this one")
        return 1.0 if self.tokens is None or self.reduction == "sum" else self.tokens

    def divisor(self, calls: int, parallel) -> float:
        """By which the sum is divided."""
        return parallel.average(self.total) if self.total > 0 else float(calls)

    def state_dict(self) -> dict:
        return {"tokens": self.tokens, "total": self.total}

    def load_state_dict(self, state: dict) -> None:
        self.tokens = None if state["tokens"] is None else float(state["tokens"])
        self.total = float(state["total"])
