"""Runs a model once on each batch, however often it is asked for: moments are taken of it, a metric looks at it, and
one of whole data sets is asked again about parts of them, to see how well its value is known."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from torch_sluice.compress.samples import Piece, tensors_of

MOST_BYTES = 1 << 29  # of outputs that are kept


class Calls:
    """What was asked for: ``repeated`` calls that were answered from memory, and ``run`` ones.

    Args:
        pieces: those that are rows of a batch, of a model that treats rows independently, are answered with rows of
            what it gave for the batch, and the batch with what it gave for all of its rows.
        most_bytes: of outputs that are kept.

    Attributes:
        seconds: that the calls which ran took.
    """

    def __init__(self, pieces: Iterable[Piece] = (), most_bytes: int = MOST_BYTES) -> None:
        self.run = self.repeated = self._bytes = 0
        self.seconds = 0.0
        self._most_bytes = most_bytes
        self._known: dict[tuple, tuple] = {}
        self._rows: dict[int, tuple[Tensor, int, int]] = {}  # id of a piece's tensor -> the batch's, from, to
        self._parts: dict[int, list[tuple[int, int, Tensor]]] = {}  # id of a batch's tensor -> from, to, a piece's
        for piece in pieces:
            if piece.source is not None:
                inputs, begin, end = piece.source
                for part, whole in zip(tensors_of(piece.inputs), tensors_of(inputs), strict=True):
                    self._rows[id(part)] = whole, begin, end
                    self._parts.setdefault(id(whole), []).append((begin, end, part))

    def _find(self, key: tuple, leaves: list) -> Any:
        """A known output, or rows of one, or rows put together; None."""
        if key in self._known:
            return _copy(self._known[key][1])
        if any(isinstance(leaf, Tensor) and id(leaf) in self._parts for leaf in leaves):
            return self._put_together(key, leaves)
        places = [self._rows.get(id(leaf)) for leaf in leaves if isinstance(leaf, Tensor)]
        if not places or None in places or len({place[1:] for place in places}) != 1:
            return None
        sources = iter(places)
        names = zip(leaves, key[1:], strict=True)
        key = (key[0], *(id(next(sources)[0]) if isinstance(leaf, Tensor) else name for leaf, name in names))
        if key not in self._known:
            return None
        (whole, begin, end), output = places[0], self._known[key][1]
        parts, structure = tree_flatten(output)
        if not all(isinstance(part, Tensor) and part.dim() and len(part) == len(whole) for part in parts):
            return None
        return tree_unflatten([part[begin:end].clone() for part in parts], structure)

    def _put_together(self, key: tuple, leaves: list) -> Any:
        """The output for a batch of which the outputs for all rows are known; None."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        pieces = [sorted(self._parts.get(id(tensor), []), key=lambda part: part[0]) for tensor in tensors]
        bounds = {tuple(part[:2] for part in parts) for parts in pieces}
        if len(bounds) != 1:
            return None
        (bounds,) = bounds
        ends = [0, *(end for _, end in bounds)]
        if [begin for begin, _ in bounds] != ends[:-1] or any(len(tensor) != ends[-1] for tensor in tensors):
            return None
        found = []
        for number in range(len(bounds)):
            own = iter(parts[number][2] for parts in pieces)
            names = zip(leaves, key[1:], strict=True)
            part = (key[0], *(id(next(own)) if isinstance(leaf, Tensor) else name for leaf, name in names))
            if part not in self._known:
                return None
            found.append(tree_flatten(self._known[part][1]))
        rows = [end - begin for begin, end in bounds]
        for (outputs, structure), count in zip(found, rows, strict=True):
            if structure != found[0][1] or not all(
                isinstance(o, Tensor) and o.dim() and len(o) == count for o in outputs
            ):
                return None
        columns = list(zip(*(outputs for outputs, _ in found), strict=True))
        if any(len({part.shape[1:] for part in column}) > 1 for column in columns):
            return None
        return tree_unflatten([torch.cat(column) for column in columns], found[0][1])

    def answer(self, forward, args: tuple, kwargs: dict) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        key = (str(structure), *(id(leaf) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves))
        known = self._find(key, leaves)
        if known is not None:
            self.repeated += 1
            return known
        begin = time.monotonic()
        output = forward(*args, **kwargs)
        self.seconds += time.monotonic() - begin
        self.run += 1
        tensors, _ = tree_flatten(output)
        if all(leaf is None or isinstance(leaf, (Tensor, int, float)) for leaf in tensors):
            size = sum(leaf.numel() * leaf.element_size() for leaf in tensors if isinstance(leaf, Tensor))
            if self._bytes + size <= self._most_bytes:
                self._bytes += size
                self._known[key] = leaves, _copy(output)  # leaves: so that no other tensor takes their id
        return output


def _copy(output: Any) -> Any:
    """A metric may write into what it is given."""
    leaves, structure = tree_flatten(output)
    return tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


@contextlib.contextmanager
def remembering(model: nn.Module, calls: Calls | None = None) -> Iterator[Calls]:
    """Within it, ``model(inputs)`` on the very tensors of an earlier call returns what that returned, and on pieces of
    them a part of it. ``calls``: what is known already; the model must not have changed since."""
    calls, own = Calls() if calls is None else calls, model.__dict__.get("forward")
    forward = model.forward
    model.__dict__["forward"] = lambda *args, **kwargs: calls.answer(forward, args, kwargs)
    try:
        yield calls
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = own
