"""Reads a dense attention mask back into what the operator takes: causal or not, valid keys, the queries' places."""

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

    # One query alone is under the causal mask or not without a difference in the mask: the module knows.
    kinds = (causal,) if n_q == 1 else (True, False)
    for is_causal in kinds:
        if (pattern := match(is_causal, 0)) is not None:
            return pattern
    # A window, causal or to both sides: the last query of some batch element sees all of its past half.
    window = int(mask[:, 0, -1].sum(-1).max()) if n_q <= n_k else 0
    for is_causal in kinds if window else ():
        if (pattern := match(is_causal, window)) is not None:
            return pattern
    return None


def read_mask(
    mask: Tensor, batch: int, n_q: int, n_k: int, causal: bool, window: int | None = None
) -> MaskPattern | None:
    """The pattern of mask [B or 1, H or 1, Nq or 1, Nk], or None if it is another one (or a bias).

    ``causal`` says what the layer is, for the cases in which the mask cannot tell. The answer is kept with the mask,
    which the layers of a model share. When traced by a compiler nothing can be looked at: the mask is then taken for a
    padding mask on a layer of that kind, with the sliding window that the layer says it has, and checked when the
    compiled code runs.
    """
    if torch.compiler.is_compiling():
        allowed = as_bool_mask(mask)
        if allowed is None:
            return None
        key_range = _range_of_keys(allowed)
        offset = first_places(allowed, n_q, n_k) if causal and n_q < n_k else None
        window = window if window and n_q <= n_k and window < n_k else 0
        matches = (allowed == _expected(key_range, offset, causal, n_q, n_k, window)).all()
        torch._assert_async(
            matches,
            "attention mask: expected the causal or full mask or the layer's sliding window, with padding on the left "
            "or right; other masks work without torch.compile",
        )
        pattern = MaskPattern(causal, key_range, offset, window, rows_without_keys(mask))
        return _expand(pattern, batch)
    if mask.is_inference():  # counts no versions, so what was read once may have changed
        pattern = _read(mask, n_q, n_k, causal)
    else:
        key = (mask._version, n_q, n_k, causal)
        memo = getattr(mask, "_sluice_pattern", None)
        if memo is None or memo[0] != key:
            memo = mask._sluice_pattern = (key, _read(mask, n_q, n_k, causal))
        pattern = memo[1]
    return None if pattern is None else _expand(pattern, batch)


def read_documents(mask: Tensor, batch: int, n_q: int, n_k: int) -> tuple[int, ...] | None:
    """The lengths of the texts that are packed into the rows of a causal mask [B or 1, 1, N, N], of all rows one behind
    the other; None if it is another mask. It is kept with the mask, as its pattern is."""
    if torch.compiler.is_compiling() or n_q != n_k or mask.shape[1] != 1 or mask.shape[2:] != (n_q, n_k):
        return None
    if mask.is_inference():
        lengths = _read_documents(mask)
    else:
        memo = getattr(mask, "_sluice_documents", None)
        if memo is None or memo[0] != mask._version:
            memo = mask._sluice_documents = (mask._version, _read_documents(mask))
        lengths = memo[1]
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
