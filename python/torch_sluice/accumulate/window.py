"""Which call of ``optimizer.step()`` acts: every one, as the loop says, or every N-th, if that was asked for."""


class Window:
    """Counts calls of ``step()`` where a session was given ``every=N``; nothing else is counted.

    Attributes:
        every: calls in a window; None: the loop decides, so that each call acts.
        held: calls of this window that were held back.
    """

    def __init__(self, every: int | None):
        self.every = every
        self.held = 0

    @property
    def is_held(self) -> bool:
        """Whether the next call of step() will be held back."""
        return self.every is not None and self.held + 1 < self.every

    @property
    def is_open(self) -> bool:
        """Whether a call has been held back, so that its gradients wait for the one that acts."""
        return self.held > 0

    @property
    def comes_last(self) -> bool:
        """Whether the gradients that come now are known to be the window's last."""
        return self.every is not None and not self.is_held

    def hold(self) -> None:
        """A call of step() was held back."""
        self.held += 1

    def start(self) -> None:
        """A new window."""
        self.held = 0

    def state_dict(self) -> dict:
        return {"every": self.every, "held": self.held}

    def check_state_dict(self, state: dict) -> None:
        """Raises ValueError, KeyError or TypeError for a state that load_state_dict() can't take."""
        if state["every"] != self.every:
            raise ValueError(f"every is {self.every}, expected {state['every']}, with which the state was saved")
        if not 0 <= int(state["held"]) < (self.every or 1):
            raise ValueError(f"the saved window has {state['held']} calls, expected fewer than every={self.every}")

    def load_state_dict(self, state: dict) -> None:
        self.held = int(state["held"])
