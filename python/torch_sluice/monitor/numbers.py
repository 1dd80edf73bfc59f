"""Numbers and names that a loop gives: those of NumPy, of tensors and of other libraries, as Python's own."""

import torch


def as_number(value: object) -> float:
    """The value as an int, a bool or a float of Python, that a float can hold.

    Raises:
        Exception: of any kind, if it is no real number.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().item()
    elif not isinstance(value, (int, float, str)) and hasattr(value, "item"):  # a scalar of NumPy
        value = value.item()
    number = float(value)
    return value if type(value) in (int, bool) else number


def as_text(name: object) -> str:
    """A name as the outputs can write it, all of which are UTF-8."""
    return str(name).encode("utf-8", "replace").decode()


def short(value: object) -> str:
    """The value for a message, however long it is."""
    try:
        text = repr(value)
    except Exception:  # a repr of the user's, or an integer of too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."
