"""The state of a session, as a dict of plain values and tensors: made, checked and taken over."""

_VERSION = 2
_PARTS = {"version", "window", "weights", "counters", "parameters"}


def make(session) -> dict:
    """Everything that another session needs to go on from here."""
    return {
        "version": _VERSION,
        "window": session.window.state_dict(),
        "weights": session.weights.state_dict(),
        "counters": [session.steps, session.skipped_steps, session.held_steps],
        "parameters": {gradient.name: gradient.state_dict() for gradient in session.gradients.values()},
    }


def check(session, saved: dict) -> None:
    """Raises ValueError, naming the difference, for a state that load() can't take whole. Changes nothing."""
    if not isinstance(saved, dict) or saved.get("version") != _VERSION:
        found = saved.get("version") if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"the version of the state is {found!r}, expected {_VERSION}")
    lacking = _PARTS - saved.keys()
    if lacking:
        raise ValueError(f"the state lacks {', '.join(map(repr, sorted(lacking)))}")
    for part in ("window", "weights", "parameters"):
        if not isinstance(saved[part], dict):
            raise ValueError(f"{part} in the state is a {type(saved[part]).__name__}, expected a dict")
    by_name = {gradient.name: gradient for gradient in session.gradients.values()}
    differing = sorted(by_name.keys() ^ saved["parameters"].keys())
    if differing:
        raise ValueError(f"the state and the optimizer differ in these parameters: {', '.join(differing[:5])}")
    for what, one, part in [
        ("the window", session.window, saved["window"]),
        ("the weights", session.weights, saved["weights"]),
        *((f"parameter {name}", gradient, saved["parameters"][name]) for name, gradient in by_name.items()),
    ]:
        try:
            one.check_state_dict(part)
        except KeyError as error:
            raise ValueError(f"the state of {what} lacks {error}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{what}: {error}") from error
    counters = saved["counters"]
    if (
        not isinstance(counters, (list, tuple))
        or len(counters) != 3
        or not all(isinstance(number, int) and number >= 0 for number in counters)
    ):
        raise ValueError(f"counters are {counters}, expected three integers of at least 0")


def load(session, saved: dict) -> None:
    """Takes over a state that check() has passed."""
    session.window.load_state_dict(saved["window"])
    session.weights.load_state_dict(saved["weights"])
    for gradient in session.gradients.values():
        gradient.load_state_dict(saved["parameters"][gradient.name])
    session.steps, session.skipped_steps, session.held_steps = saved["counters"]
