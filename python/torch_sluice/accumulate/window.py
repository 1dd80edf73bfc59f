"""Where in its window a training loop is: which call of optimizer.step() acts, and which backward comes before it."""

STEP_CALLS = ("auto", "each", "last")


class Window:
    """Counts what a loop does and tells its kind.

    Two kinds of loop accumulate over N micro-batches. One calls ``optimizer.step()`` after each of them ("each"): of N
    calls the last acts, and stands for all of them, so gradients are averaged. The other calls it after the last one
    only ("last"), as loops do that accumulate without Sluice: every call acts, and gradients are summed, because such a
    loop divides its loss itself. At the first call the number of backward passes so far tells which one it is.

    Backward passes are counted by the gradients that one parameter got, so several in a micro-batch count as several.
    """

    def __init__(self, every: int, step_calls: str):
        self.every = every
        self.kind = None if step_calls == "auto" else step_calls
        self.start()

    def start(self) -> None:
        """A new window: nothing has been added yet."""
        self.held = 0  # calls of step() that were held back
        self.backwards = 0
        self.since_call = False  # whether gradients came after the last call of step()

    def note_gradient(self, folds: int) -> None:
        """A parameter got its ``folds``-th gradient of this window."""
        self.backwards = max(self.backwards, folds)
        self.since_call = True

    def acts(self) -> bool:
        """Whether the call of step() that is about to be made acts. Decides the kind of loop at the first one."""
        if self.kind is None and self.backwards > 0:
            self.kind = "last" if self.backwards >= self.every else "each"
        return self.kind != "each" or self.held + 1 >= self.every

    def hold(self) -> None:
        """A call of step() was held back."""
        self.held += 1
        self.since_call = False

    def is_last(self, folds: int) -> bool:
        """Whether the ``folds``-th gradient of a parameter comes from the window's last micro-batch."""
        return self.held + 1 >= self.every if self.kind == "each" else folds >= self.every

    @property
    def comes_last(self) -> bool:
        """Whether the next backward is that of the window's last micro-batch, as far as can be told."""
        return (self.held if self.kind == "each" else self.backwards) + 1 >= self.every

    @property
    def calls(self) -> int:
        """How many calls of step() the gradients so far stand for; 1 for a loop that averages itself."""
        return max(1, self.held + self.since_call) if self.kind == "each" else 1

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        if state["every"] != self.every:
            raise ValueError(f"every is {self.every}, expected {state['every']}, with which the state was saved")
        if state["kind"] not in (None, "each", "last"):
            raise ValueError(f"the saved kind of loop is {state['kind']!r}, expected None, 'each' or 'last'")
        self.kind = state["kind"]
        self.held, self.backwards = int(state["held"]), int(state["backwards"])
        self.since_call = bool(state["since_call"])
