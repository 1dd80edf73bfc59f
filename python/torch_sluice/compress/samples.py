"""The user's data: batches that were read once, whether their rows are samples, and how they are divided.

What is fitted to data (compensation.py) must not be measured on the same data: batches, or where there are few the rows
of a batch, are dealt out to folds. Rows are only taken apart where the model treats them independently, which is
measured.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from torch_sluice.compress.calling import call_model, float_outputs, seeded

FOLDS = 4  # that data is divided into: what is fitted to three of them is measured on the fourth
_SAME = 1e-3  # relative difference below which outputs count as those of the same computation
_ROUND = 8  # rows of a piece are a multiple of this where there are enough


def read_batches(data: Iterable) -> list[tuple[Any, Any]]:
    """All batches of data, read once.

    Raises:
        TypeError: data is not iterable.
        ValueError: it yields nothing, or something else than (inputs, target).
    """
    if not isinstance(data, Iterable) or isinstance(data, (Tensor, str, Mapping)):
        raise TypeError(f"data is a {type(data).__name__}, expected an iterable of (inputs, target) batches")
    batches = list(data)
    if not batches:
        raise ValueError("data yields no batch, expected at least one (inputs, target): an iterator that was used up?")
    for number, batch in enumerate(batches):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(
                f"batch {number} of data is a {type(batch).__name__}"
                + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
                + ", expected a pair (inputs, target); target may be None without a metric"
            )
    return [tuple(batch) for batch in batches]


def without_empty(batches: list[tuple[Any, Any]]) -> tuple[list[tuple[Any, Any]], list[int]]:
    """The batches that hold samples, and the numbers of all of them in data.

    Raises:
        ValueError: none does.
    """
    numbers = [number for number, (inputs, _) in enumerate(batches) if not is_empty(inputs)]
    if not numbers:
        raise ValueError(
            f"none of the {len(batches)} batches of data holds a sample, expected inputs of at least one row to "
            "measure on"
        )
    return [batches[number] for number in numbers], numbers


def is_empty(inputs: Any) -> bool:
    """Whether the first tensor of a batch's inputs has no element."""
    first = next(iter(tensors_of(inputs)), None)
    return first is not None and first.numel() == 0


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, Mapping):  # one of transformers' is no pytree
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    return tree_leaves(tree)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(tree) if isinstance(leaf, Tensor)]


def count_rows(tree: Any) -> int | None:
    """The first size that all tensors of a structure share, or None."""
    sizes = {leaf.shape[0] if leaf.dim() else None for leaf in tensors_of(tree)}
    return sizes.pop() if len(sizes) == 1 else None


def take_rows(tree: Any, begin: int, end: int) -> Any:
    """The rows from ``begin`` to ``end`` of all tensors."""
    if isinstance(tree, Mapping):
        return {key: take_rows(value, begin, end) for key, value in tree.items()}
    return tree_map(lambda leaf: leaf[begin:end] if isinstance(leaf, Tensor) else leaf, tree)


def has_independent_rows(model: nn.Module, inputs: Any, outputs: list[Tensor]) -> bool:
    """Whether the first size of inputs and outputs counts samples: the model on either half of the rows gives that half
    of its outputs. (A causal model whose first dimension is time passes with the first half, not with the second.)

    The model is in eval mode. One row shows nothing: False.
    """
    rows = count_rows(inputs)
    if rows is None or rows < 2 or any(out.dim() == 0 or out.shape[0] != rows for out in outputs):
        return False
    for begin, end in ((0, rows // 2), (rows // 2, rows)):
        try:
            with torch.no_grad(), seeded():
                part = float_outputs(call_model(model, take_rows(inputs, begin, end)))
        except Exception:
            return False
        wanted = [out[begin:end] for out in outputs]
        if len(part) != len(wanted) or any(a.shape != b.shape for a, b in zip(part, wanted, strict=True)):
            return False
        for got, want in zip(part, wanted, strict=True):
            error, scale = (got.float() - want.float()).norm(), want.float().norm()
            if not error <= _SAME * scale:
                return False
    return True


@dataclass
class Piece:
    """Part of the data that is run in one call: a batch, or some rows of one."""

    inputs: Any
    target: Any
    batch: int  # its number in data
    samples: int  # rows where these are independent, else 1
    fold: int = 0  # the part of the data that it belongs to
    copies: int = 1  # how often data holds the very same
    source: tuple[Any, int, int] | None = None  # the batch's inputs of which it is the rows from .. to ..

    def head(self, samples: int) -> Any:
        """Its inputs for the first so many samples; all of them where these cannot be taken apart."""
        if samples >= self.samples or count_rows(self.inputs) != self.samples:
            return self.inputs
        return take_rows(self.inputs, 0, samples)


def cut_pieces(batches: list[tuple[Any, Any]], numbers: list[int], rows_apart: bool, wanted: int) -> list[Piece]:
    """The batches, cut along their rows into about as many pieces as wanted where ``rows_apart`` allows it, dealt out
    to up to FOLDS folds. Pieces that data holds several times come once, with their number."""
    each = -(-wanted // len(batches)) if rows_apart else 1
    pieces: dict[bytes, Piece] = {}
    for number, (inputs, target) in zip(numbers, batches, strict=True):
        rows = count_rows(inputs) if rows_apart else None
        if rows is None:
            parts = [Piece(inputs, target, number, 1)]
        elif each == 1:
            parts = [Piece(inputs, target, number, rows)]
        else:
            parts = [
                Piece(take_rows(inputs, a, b), take_rows(target, a, b), number, b - a, source=(inputs, a, b))
                for a, b in _bounds(rows, min(each, rows))
            ]
        for piece in parts:
            first = pieces.setdefault(_digest((piece.inputs, piece.target)), piece)
            if first is not piece:
                first.copies += 1
    distinct = list(pieces.values())
    filled = [0] * (FOLDS if len(distinct) >= FOLDS else 2)
    for piece in distinct:
        piece.fold = filled.index(min(filled))
        filled[piece.fold] += piece.samples
    return distinct


def merge_folds(pieces: list[Piece]) -> None:
    """Makes two folds of all."""
    for piece in pieces:
        piece.fold %= 2


def fold_numbers(pieces: list[Piece]) -> list[int]:
    return sorted({piece.fold for piece in pieces})


def _bounds(rows: int, parts: int) -> list[tuple[int, int]]:
    """Of parts of about the same size: multiples of _ROUND where they have four times as many rows."""
    step = _ROUND if rows >= 4 * _ROUND * parts else 1
    ends = [round(rows * (i + 1) / parts / step) * step for i in range(parts - 1)] + [rows]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _digest(tree: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for leaf in _leaves(tree):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            if leaf.numel() and leaf.layout is torch.strided:
                plain = leaf.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(memoryview(plain.numpy()))
            else:
                digest.update(str(id(leaf)).encode())
        else:
            digest.update(repr(leaf).encode())
    return digest.digest()
