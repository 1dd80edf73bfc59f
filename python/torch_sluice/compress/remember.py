"""Runs a model once on each batch, however often a metric asks for it: a metric of whole data sets is asked again
about parts of them, to see how well its value is known."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

_MOST_BYTES = 1 << 29  # of outputs that are kept


class Calls:
    """What was asked for: ``repeated`` calls that were answered from memory, and ``run`` ones."""

    def __init__(self) -> None:
        self.run = self.repeated = self._bytes = 0
        self._known: dict[tuple, tuple] = {}

    def answer(self, forward, args: tuple, kwargs: dict) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        key = (str(structure), *(id(leaf) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves))
        if key in self._known:
            self.repeated += 1
            return _copy(self._known[key][1])
        output = forward(*args, **kwargs)
        self.run += 1
        tensors, _ = tree_flatten(output)
        if all(leaf is None or isinstance(leaf, (Tensor, int, float)) for leaf in tensors):
            size = sum(leaf.numel() * leaf.element_size() for leaf in tensors if isinstance(leaf, Tensor))
            if self._bytes + size <= _MOST_BYTES:
                self._bytes += size
                self._known[key] = leaves, _copy(output)  # leaves: so that no other tensor takes their id
        return output


def _copy(output: Any) -> Any:
    """A metric may write into what it is given."""
    leaves, structure = tree_flatten(output)
    return tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


@contextlib.contextmanager
def remembering(model: nn.Module) -> Iterator[Calls]:
    """Within it, ``model(inputs)`` on the very tensors of an earlier call returns what that returned."""
    calls, own = Calls(), model.__dict__.get("forward")
    forward = model.forward
    model.__dict__["forward"] = lambda *args, **kwargs: calls.answer(forward, args, kwargs)
    try:
        yield calls
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = own
