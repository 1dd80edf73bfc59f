"""Reads a dense attention mask back into what the operator takes: causal or not, valid keys, the queries' places."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torch_sluice.places import query_places


class MaskPattern(NamedTuple):
    """A mask that is the causal triangle, full, or a sliding window of either.

    It may be cut to a range of keys per batch element.
    """

    causal: bool
    key_range: Tensor | None  # [B, 2], None: all keys
    q_offset: Tensor | None = None  # [B], the key at whose place the first query sits; None: the last at the last key
    window: int = 0  # a query sees keys at a distance below this only; 0: at any
    uniform: Tensor | None = None  # [B, H or 1, Nq], rows that look at all keys alike: see rows_without_keys

    def options(self) -> dict:
        """What gated_attention takes for it."""
        places = dict(causal=self.causal, key_range=self.key_range, q_offset=self.q_offset)
        return places | dict(sliding_window=self.window)


def as_bool_mask(mask: Tensor) -> Tensor | None:
    """True where a pair may be looked at; None if mask is a bias that says more than that, or that learns."""
    if mask.dtype == torch.bool:
        return mask
    if mask.requires_grad:
        return None
    if not mask.is_floating_point():
        return None
    keep = mask == 0
    # Masks are filled with -inf or with the most negative number of the dtype.
    if not torch.compiler.is_compiling() and not (keep | (mask <= torch.finfo(mask.dtype).min)).all():
        return None
    return keep


def _range_of_keys(mask: Tensor) -> Tensor:
    """[B, 2]: the first key that any query sees, and that behind the last."""
    seen = mask[:, 0].any(-2)
    return torch.stack((seen.to(torch.uint8).argmax(-1), _last_keys(seen) + 1), dim=-1)


def range_of_keys(mask: Tensor, batch: int) -> Tensor:
    """[B, 2]: the first key that any query sees by a mask of booleans or numbers, and that behind the last."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    return _range_of_keys(seen).expand(batch, 2)


def _last_keys(seen: Tensor) -> Tensor:
    """The last key that is seen, of the last dimension; -1 where none is."""
    behind = seen.flip(-1).to(torch.uint8).argmax(-1)
    return torch.where(seen.any(-1), seen.shape[-1] - 1 - behind, -1)


def first_places(mask: Tensor, n_q: int, n_k: int) -> Tensor:
    """[B], the key at whose place the first query sits, by a causal mask [B, H or 1, Nq or 1, Nk].

    The last key that a query sees is its own, unless padding on the right hides it. A cache may be longer than the
    text: what it holds behind the last query is not there yet.
    """
    last = _last_keys(mask[:, 0])
    queries = torch.arange(n_q - last.shape[1], n_q, device=mask.device)  # one row stands for the last query
    return (last - queries).amax(-1).clamp(0, n_k - n_q)


def rows_without_keys(mask: Tensor) -> Tensor | None:
    """[B, H or 1, Nq], True where a float mask drops every key of a query by a finite number; None for other masks.

    The most negative number is added to the scores and swallows them all: such a row, which padding leaves, is the mean
    of all values, and not the 0 that a boolean mask or -inf makes it.
    """
    if mask.dtype == torch.bool:
        return None
    least = torch.finfo(mask.dtype).min
    return (mask == least).all(-1)


def _expected(key_range: Tensor, q_offset: Tensor | None, causal: bool, n_q: int, n_k: int, window: int = 0) -> Tensor:
    keys = torch.arange(n_k, device=key_range.device)
    begin, end = key_range.view(-1, 1, 1, 2).unbind(-1)
    expected = (keys >= begin.unsqueeze(-1)) & (keys < end.unsqueeze(-1))
    places = query_places(n_q, n_k, q_offset, key_range.device)[:, None, :, None]
    if causal:
        expected = expected & (keys <= places)
    if window:
        expected = expected & ((keys - places).abs() < window)
    return expected


def _read(mask: Tensor, n_q: int, n_k: int, causal: bool) -> MaskPattern | None:
    allowed = as_bool_mask(mask)
    if allowed is None or not mask.numel() or mask.shape[-1] != n_k:
        return None
    uniform = rows_without_keys(mask)
    if uniform is not None:
        if ((mask == torch.finfo(mask.dtype).min).any(-1) & ~allowed.any(-1) & ~uniform).any():
            return None  # rows of -inf and the most negative number: the mean of some values
        uniform = uniform if uniform.any() else None
    mask = allowed if allowed.shape[2] == n_q else allowed.expand(-1, -1, n_q, -1)
    key_range = _range_of_keys(mask)
    offsets = [None]
    if n_q < n_k:
        offset = first_places(mask, n_q, n_k)
        if (offset != n_k - n_q).any():
            # Of one query alone the mask tells nothing but its own place.
            offsets = [offset] if n_q == 1 else [None, offset]

    def match(causal: bool, window: int) -> MaskPattern | None:
        for offset in offsets if causal else [None]:
            if torch.equal(mask, _expected(key_range, offset, causal, n_q, n_k, window).expand_as(mask)):
                everything = bool((key_range[:, 0] == 0).all() and (key_range[:, 1] == n_k).all())
                return MaskPattern(causal, None if everything else key_range, offset, window, uniform)
        return None

    # Small masks may be both, above all of one query: the module knows.
    kinds = (causal,) if n_q == 1 else (causal, not causal)
    for is_causal in kinds:
        if (pattern := match(is_causal, 0)) is not None:
            return pattern
    # A window, causal or to both sides: the last query of some batch element sees all of its past half.
    window = int(mask[:, 0, -1].sum(-1).max()) if n_q <= n_k else 0
    for is_causal in kinds if window else ():
        if (pattern := match(is_causal, window)) is not None:
            return pattern
    return None


def remember(mask: Tensor, key: tuple, compute: Callable):
    """What was computed of a mask, which the layers of a model share, as long as it holds the numbers that it held.

    They are compared: writes through .data or NumPy, and those in inference mode, raise no version.
    """
    shown = mask.detach()
    for dim, stride in enumerate(mask.stride()):
        if stride == 0 and mask.shape[dim] > 1:
            shown = shown.narrow(dim, 0, 1)
    memo = getattr(mask, "_sluice_memo", None)
    if memo is None or not torch.equal(memo[0], shown):
        memo = mask._sluice_memo = (shown.clone(), {})
    key = (*key, torch.is_inference_mode_enabled())  # of whose tensors none can be saved for backward
    if key not in memo[1]:
        memo[1][key] = compute()
    return memo[1][key]


class OperatorMask(NamedTuple):
    """A mask beyond the patterns, as the operator takes it."""

    attn_mask: Tensor  # [B or 1, H or 1, Nq or 1, Nk], booleans or numbers; -inf where a pair is hidden
    key_range: Tensor | None  # [B, 2], where the texts begin, if sinks are wanted
    q_offset: Tensor | None  # [B]
    uniform: Tensor | None  # see rows_without_keys

    def options(self) -> dict:
        """What gated_attention takes for it; whether the layer is causal stays as it is."""
        return dict(attn_mask=self.attn_mask, key_range=self.key_range, q_offset=self.q_offset)


def operator_mask(mask: Tensor, batch: int, n_q: int, n_k: int, causal: bool, sinks: int) -> OperatorMask | None:
    """None where the operator can't say the same: a causal layer that is shown later keys, or queries of one row whose
    texts begin at different keys, while sinks are wanted. In compiled code that is an error when it runs."""
    if mask.shape[-1] != n_k or not mask.numel() or not (mask.dtype == torch.bool or mask.is_floating_point()):
        return None
    sizes = (batch, n_q, n_k, causal, sinks)
    if mask.requires_grad or torch.compiler.is_compiling():  # a bias that learns is another graph each time
        return _make_operator_mask(mask, *sizes)
    return remember(mask, ("operator", *sizes), lambda: _make_operator_mask(mask, *sizes))


def _make_operator_mask(mask: Tensor, batch: int, n_q: int, n_k: int, causal: bool, sinks: int) -> OperatorMask | None:
    is_bool = mask.dtype == torch.bool
    least = None if is_bool else torch.finfo(mask.dtype).min
    allowed = mask if is_bool else mask.detach() > least
    key_range = q_offset = None
    if causal:
        if n_q < n_k:
            q_offset = first_places(allowed, n_q, n_k).expand(batch)
        places = query_places(n_q, n_k, q_offset, mask.device)[:, None, :, None]
        if not _holds(
            ~(allowed & (torch.arange(n_k, device=mask.device) > places)).any(), "a causal layer no later keys"
        ):
            return None
    if sinks:
        first = first_keys(allowed, n_q, n_k).flatten(1)
        if not _holds((first == first[:, :1]).all(), "all queries of a row one text"):
            return None
        begin = first[:, 0].clamp(max=n_k).expand(batch)
        key_range = torch.stack((begin, torch.full_like(begin, n_k)), -1)
    if is_bool:
        return OperatorMask(mask, key_range, q_offset, None)
    uniform = rows_without_keys(mask.detach())
    hidden = ~allowed
    uniform = uniform if torch.compiler.is_compiling() or uniform.any() else None
    return OperatorMask(mask.masked_fill(hidden, -torch.inf), key_range, q_offset, uniform)


def _holds(condition: Tensor, expected: str) -> bool:
    """Compiled code can't choose by what it computes, so that there it is an error."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    torch._assert_async(
        condition, f"attention mask: expected one that shows {expected}; other masks work without torch.compile"
    )
    return True


def first_keys(seen: Tensor, n_q: int, n_k: int) -> Tensor:
    """The place of the first key of each query's sequence, that broadcasts to [B, Hq, Nq, Nk]: sinks count from it.

    A mask of booleans tells sequences apart: what a query can reach in any number of steps, from a query to the first
    key that it sees and on from there, is one. So documents that are packed into a row have sinks of their own, and a
    sliding window has those of the whole text, of which most queries see none.
    """
    seen = seen.expand(*seen.shape[:2], n_q if n_q == n_k else seen.shape[2], n_k)
    first = torch.where(seen.any(-1), seen.to(torch.uint8).argmax(-1), n_k)
    if n_q != n_k:
        return first.amin(-1)[..., None, None]
    for _ in range(max(1, n_k).bit_length()):
        first = torch.minimum(first, first.gather(-1, first.clamp(max=max(0, n_k - 1))))
    return first.unsqueeze(-1)


def read_mask(
    mask: Tensor, batch: int, n_q: int, n_k: int, causal: bool, window: int | None = None
) -> MaskPattern | None:
    """The pattern of mask [B or 1, H or 1, Nq or 1, Nk], or None if it is another one (or a bias).

    ``causal`` says what the layer is, for the cases in which the mask cannot tell. The answer is kept with the mask,
    which the layers of a model share. When traced by a compiler nothing can be looked at: the mask is then taken for a
    padding mask on a layer of that kind, with the sliding window that the layer says it has, and checked when the
    compiled code runs. Numbers may be a bias there, and are never a pattern.
    """
    if torch.compiler.is_compiling():
        if mask.dtype != torch.bool:
            return None
        allowed = mask
        key_range = _range_of_keys(allowed)
        offset = first_places(allowed, n_q, n_k) if causal and n_q < n_k else None
        window = window if window and n_q <= n_k and window < n_k else 0
        matches = (allowed == _expected(key_range, offset, causal, n_q, n_k, window)).all()
        torch._assert_async(
            matches,
            "attention mask: expected the causal or full mask or the layer's sliding window, with padding on the left "
            "or right; other masks work without torch.compile",
        )
        pattern = MaskPattern(causal, key_range, offset, window)
        return _expand(pattern, batch)
    pattern = remember(mask, ("pattern", n_q, n_k, causal), lambda: _read(mask, n_q, n_k, causal))
    return None if pattern is None else _expand(pattern, batch)


def read_documents(mask: Tensor, batch: int, n_q: int, n_k: int) -> tuple[int, ...] | None:
    """The lengths of the texts that are packed into the rows of a causal mask [B or 1, 1, N, N], of all rows one behind
    the other; None if it is another mask. It is kept with the mask, as its pattern is."""
    if torch.compiler.is_compiling() or n_q != n_k or mask.shape[1] != 1 or mask.shape[2:] != (n_q, n_k):
        return None
    lengths = remember(mask, ("documents",), lambda: _read_documents(mask))
    return lengths if lengths is None or mask.shape[0] == batch else lengths * batch


def _read_documents(mask: Tensor) -> tuple[int, ...] | None:
    allowed = as_bool_mask(mask)
    if allowed is None or not mask.numel():
        return None
    keys = torch.arange(mask.shape[-1], device=mask.device)
    first = allowed[:, 0].to(torch.uint8).argmax(-1)  # [B, N], the first key of each query's text
    expected = (keys <= keys[:, None]) & (keys >= first.unsqueeze(-1))
    if not torch.equal(allowed[:, 0], expected) or not bool((first.gather(1, first) == first).all()):
        return None
    begins = (first == keys).flatten().nonzero().flatten()  # a text begins with a token that sees itself first
    ends = torch.cat((begins[1:], begins.new_tensor([first.numel()])))
    return tuple((ends - begins).tolist())


def _expand(pattern: MaskPattern, batch: int) -> MaskPattern:
    key_range, q_offset = pattern.key_range, pattern.q_offset
    return pattern._replace(
        key_range=None if key_range is None else key_range.expand(batch, 2),
        q_offset=None if q_offset is None else q_offset.expand(batch),
    )
