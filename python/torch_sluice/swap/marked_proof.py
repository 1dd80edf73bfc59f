"""Tries a marked attention function on small random tensors: is it what is said of it, and of which shapes?"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_sluice.swap import sdpa_sizes
from torch_sluice.swap.marked import Call, Marked, marked_of, to_layout

_HEAD_DIMS = ("head_dim", "head_size", "d_head", "dim_head", "d_kv")
_CLOSE = dict(atol=1e-5, rtol=1e-4)
_BATCH, _KEYS = 2, 5
_SQUARE, _SHAPES = (_KEYS, _KEYS), {"oblong": (3, _KEYS), "single": (1, _KEYS)}


class Proof(NamedTuple):
    """What a marked function was seen to compute."""

    groups: tuple[int, ...]  # query heads of a key head with which it was tried
    oblong: str | None  # where the causal queries of fewer than the keys sit: "end", "begin"; None: it can't have fewer
    single: str | None  # the same of one query
    mean: bool  # a row all of whose keys booleans hide is the mean of all values
    container: type | None = None  # tuple or list, if the output comes in one
    items: int = 1  # in it
    weights: bool = False  # whether the second is the weights, and not None


class _Different(Exception):
    pass


def prove(function: Callable, module: nn.Module) -> Proof | str:
    """Proof of a marked function as ``module`` calls it, or why it isn't what is said of it."""
    marked = marked_of(function)
    device = next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
    proofs, reason = [], None
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for heads, group, head_dim in _sizes(marked, module):
            trial = _Trial(marked, module, device, heads, group, head_dim)
            try:
                with _in_mode(module, False):
                    proof = trial.run()
                with _in_mode(module, True):
                    trial.draws_nothing()
            except _Different as error:
                reason = reason or str(error)
            except Exception as error:  # whatever it stumbles over, it isn't what it was taken for
                reason = reason or f"it could not be tried on small tensors: {type(error).__name__}: {error}"
            else:
                proofs.append(proof._replace(groups=(group,)))
    if not proofs:
        return f"its attention function {marked.title} {'is not what its mark says: ' if reason else ''}{reason}"
    if any(proof._replace(groups=()) != proofs[0]._replace(groups=()) for proof in proofs):
        return f"its attention function {marked.title} does something else with grouped key heads"
    return proofs[0]._replace(groups=tuple(proof.groups[0] for proof in proofs))


def _sizes(marked: Marked, module: nn.Module) -> list[tuple[int, int, int]]:
    """(query heads, query heads of a key head, head_dim) to try: those of the layer, if its attributes say any."""
    if "bnd" in (marked.layout, marked.output) or marked.key_layout == "bdn":
        return [(1, 1, 8)]
    try:
        width, heads, kv_heads = sdpa_sizes.guess_sizes("", module)
    except ValueError:
        width, heads, kv_heads = 16, 2, 2
    sources = (module, getattr(module, "config", None))
    found = (getattr(source, name, None) for source in sources for name in _HEAD_DIMS)
    head_dim = next((n for n in found if isinstance(n, int) and n > 0), max(1, width // heads))
    groups = {1, heads // kv_heads if heads % kv_heads == 0 else 1}
    return [(heads, group, head_dim) for group in sorted(groups)]


@contextlib.contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in modes:
            m.training = training
        yield
    finally:
        for m, mode in modes:
            m.training = mode


class _Trial:
    def __init__(self, marked, module, device, heads, group, head_dim):
        self.marked, self.module, self.device = marked, module, device
        self.heads, self.group, self.head_dim = heads, group, head_dim
        self.generator = torch.Generator().manual_seed(0)
        self.form: tuple | None = None  # container, items, weights of a Proof

    def draw(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=self.generator).to(self.device)

    def base(self) -> dict[str, Any]:
        """What the arguments of which something is said are, for plain attention."""
        marked, given = self.marked, {}
        for name in marked.required:
            given[name] = None
        if marked.module is not None:
            given[marked.module] = self.module
        for path, number in ((marked.scale, 0.7), (marked.causal, False), (marked.softcap, 1.5), (marked.dropout, 0.0)):
            if isinstance(path, str) and path in marked.required:
                given[path] = number
        if isinstance(marked.dropout, str) and marked.dropout in marked.defaults:
            given[marked.dropout] = 0.0
        return given

    def variants(self) -> list[dict[str, Any]]:
        """What else the arguments may be, one after the other."""
        marked, found = self.marked, [{}]
        for path, values in ((marked.scale, (0.3,)), (marked.causal, (True, False)), (marked.softcap, (1.5,))):
            if isinstance(path, str) and "." not in path:
                found += [{path: value} for value in values]
        return found

    def masks(self, n_q: int, n_k: int) -> dict[str, Tensor | None]:
        marked, means = self.marked, self.marked.mask_means
        if marked.mask is None:
            return {"no mask": None}
        shape = (_BATCH, 1, n_q, n_k)
        seen = torch.rand(shape, generator=self.generator) < 0.6
        seen[..., 0] = True  # a causal function shows each query the first key
        seen = seen.to(self.device)
        found: dict[str, Tensor | None] = {"no mask": None}
        if means in ("seen", "sdpa"):
            found["booleans"] = seen
        if means == "hidden":
            found["booleans"] = ~seen
        if means in ("added", "sdpa"):
            numbers = self.draw(*shape)
            found["numbers"] = numbers
            found["least numbers"] = numbers.masked_fill(~seen, torch.finfo(torch.float32).min)
        return found

    def run(self) -> Proof:
        """Raises _Different, or what the function raises where it must not."""
        sides = {name: self.align(shape) for name, shape in _SHAPES.items()}
        tried, errors = set(), {}
        for number, variant in enumerate(self.variants()):
            for name, mask in self.masks(*_SQUARE).items():
                for bias in (None, "bias") if self.marked.bias else (None,):
                    given = self.base() | variant
                    if self.marked.mask is not None:
                        given[self.marked.mask] = mask
                    if bias:
                        given[self.marked.bias] = self.draw(_BATCH, self.heads, *_SQUARE)
                    kinds = {f"argument {number}", name, bias}
                    try:
                        self.compare(_SQUARE, given, 0)
                    except _Different:
                        raise
                    except Exception as error:  # SDPA takes no mask with is_causal: but some call of each kind works
                        errors |= dict.fromkeys(kinds, error)
                    else:
                        tried |= kinds
        optional = {"no mask"} if self.marked.mask in self.marked.required else set()
        optional |= {None} if self.marked.bias in self.marked.required else set()
        for kind in errors.keys() - tried - optional:
            raise errors[kind]
        return Proof((), *sides.values(), self.fills(), *self.form)

    def align(self, shape: tuple[int, int]) -> str | None:
        n_q, n_k = shape
        for side, first in (("end", n_k - n_q), ("begin", 0)):
            with contextlib.suppress(_Different):
                if all(self.works(shape, variant, first) for variant in self.variants()):
                    return side
        return None

    def works(self, shape: tuple[int, int], variant: dict[str, Any], first: int) -> bool:
        """Whether the function takes this shape; raises _Different."""
        works = False
        for mask in self.masks(*shape).values():
            given = self.base() | variant
            if self.marked.mask is not None:
                given[self.marked.mask] = mask
            if self.marked.bias in self.marked.required:
                given[self.marked.bias] = self.draw(_BATCH, self.heads, *shape)
            try:
                self.compare(shape, given, first)
            except _Different:
                raise
            except Exception:  # SDPA takes no mask with is_causal
                continue
            works = True
        return works

    def draws_nothing(self) -> None:
        """Raises _Different for a function that does something else in training, of which nothing is said."""
        shape, mask = _SQUARE, list(self.masks(*_SQUARE).values())[-1]
        given = self.base()
        if self.marked.mask is not None:
            given[self.marked.mask] = mask
        if self.marked.bias in self.marked.required:
            given[self.marked.bias] = self.draw(_BATCH, self.heads, *shape)
        call, _ = self.call(shape, given)
        if call.dropout:
            return
        try:
            self.compare(shape, given, 0)
        except _Different:
            raise _Different("in training mode its results differ: if it has dropout, say so by dropout=") from None

    def fills(self) -> bool:
        """Whether booleans that hide a whole row make it the mean of all values."""
        marked = self.marked
        if marked.mask_means not in ("seen", "hidden", "sdpa") or marked.causal is True:
            return False
        seen = torch.ones(_BATCH, 1, *_SQUARE, dtype=torch.bool, device=self.device)
        seen[:, :, 2] = False
        given = self.base() | {marked.mask: ~seen if marked.mask_means == "hidden" else seen}
        if isinstance(marked.causal, str) and "." not in marked.causal:
            given[marked.causal] = False
        if marked.bias in marked.required:
            given[marked.bias] = self.draw(_BATCH, self.heads, *_SQUARE)
        call, out = self.call(_SQUARE, given)
        if call.causal:
            return False
        row = out[:, :, 2]
        if bool(row.isnan().all()) or not bool(row.any()):
            return False
        if torch.allclose(row, self.repeat(call.v).mean(2), **_CLOSE):
            return True
        raise _Different("a row of which the mask hides every key is neither 0, NaN nor the mean of all values")

    def repeat(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.group, 1)

    def call(self, shape: tuple[int, int], given: dict[str, Any]) -> tuple[Call, Tensor]:
        """What is said of a call with these arguments, and what comes out of it, [B, H, N, D]."""
        marked, (n_q, n_k) = self.marked, shape
        kv_heads = self.heads // self.group
        inputs = {
            marked.query: to_layout(self.draw(_BATCH, self.heads, n_q, self.head_dim), marked.layout),
            marked.key: to_layout(self.draw(_BATCH, kv_heads, n_k, self.head_dim), marked.key_layout),
            marked.value: to_layout(self.draw(_BATCH, kv_heads, n_k, self.head_dim), marked.layout),
        }
        given = given | inputs
        by_place = [given.pop(name) for name in marked.names[: self._places(given)]]
        call = marked.bind(tuple(by_place), given)
        result = marked.function(*by_place, **given)
        container = type(result) if isinstance(result, (tuple, list)) else None
        items = (result,) if container is None else result
        if container not in (None, tuple, list) or not 1 <= len(items) <= 2:
            raise _Different("it returns more than the output and the weights")
        out, self.weights = items[0], items[1] if len(items) == 2 else None
        form = (container, len(items), self.weights is not None)
        if self.form not in (None, form):
            raise _Different("it returns one kind of object and another")
        self.form = form
        expected = to_layout(self.draw(_BATCH, self.heads, n_q, self.head_dim), marked.output).shape
        if not isinstance(out, Tensor) or out.shape != expected:
            found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise _Different(f"its output is {found}, expected {list(expected)}")
        if marked.output in ("bnc", "bnhd"):
            out = out.unflatten(-1, (self.heads, -1)) if marked.output == "bnc" else out
            return call, out.transpose(1, 2)
        return call, out.unsqueeze(1) if marked.output == "bnd" else out

    def _places(self, given: dict[str, Any]) -> int:
        """Arguments up to the last that has no default are handed over by place, as most callers do."""
        names = self.marked.names
        return next((i for i, name in enumerate(names) if name not in given), len(names))

    def compare(self, shape: tuple[int, int], given: dict[str, Any], first: int) -> None:
        """Raises _Different where the function isn't the formula; the first query sits at the key ``first``."""
        call, out = self.call(shape, given)
        n_q, n_k = shape
        scale = self.head_dim**-0.5 if call.scale is None else call.scale
        scores = scale * call.q @ self.repeat(call.k).mT
        if call.softcap:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        if call.bias is not None:
            scores = scores + call.bias
        if call.mask is not None and call.mask.dtype == torch.bool:
            scores = scores.masked_fill(call.mask if self.marked.mask_means == "hidden" else ~call.mask, -torch.inf)
        elif call.mask is not None:
            scores = scores + call.mask
        if call.causal:
            later = torch.arange(n_k) > torch.arange(first, first + n_q).unsqueeze(1)
            scores = scores.masked_fill(later.to(self.device), -torch.inf)
        weights = scores.softmax(-1)
        if not torch.allclose(out.float(), weights @ self.repeat(call.v), **_CLOSE):
            raise _Different("tried on small random tensors, its results differ")
        if self.weights is not None and (
            self.weights.shape != weights.shape or not torch.allclose(self.weights.float(), weights, **_CLOSE)
        ):
            raise _Different("it returns something beside the output that is not the weights")
