"""Reads a dense attention mask back into what the operator takes: causal or not, and a range of valid keys."""

from typing import NamedTuple

import torch
from torch import Tensor


class MaskPattern(NamedTuple):
    """A mask that is the causal triangle (bottom-right aligned), full, or a sliding window of either.

    It may be cut to a range of keys per batch element.
    """

    causal: bool
    key_range: Tensor | None  # [B, 2], None: all keys
    n_k: int  # keys from here on are seen by no query (a cache that is longer than the sequence): cut them off
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


def _range_of_last_row(mask: Tensor, n_k: int) -> Tensor:
    """[B, 2]: first key of the last query, and the number of its keys behind that."""
    row = mask[:, 0, -1, :n_k]
    begin = row.to(torch.uint8).argmax(-1)
    return torch.stack((begin, begin + row.sum(-1)), dim=-1)


def rows_without_keys(mask: Tensor) -> Tensor | None:
    """[B, H or 1, Nq], True where a float mask drops every key of a query by a finite number; None for other masks.

    The most negative number is added to the scores and swallows them all: such a row, which padding leaves, is the mean
    of all values, and not the 0 that a boolean mask or -inf makes it.
    """
    if mask.dtype == torch.bool:
        return None
    least = torch.finfo(mask.dtype).min
    return (mask == least).all(-1)


def _expected(key_range: Tensor, causal: bool, n_q: int, n_k: int, window: int = 0) -> Tensor:
    keys = torch.arange(n_k, device=key_range.device)
    begin, end = key_range.view(-1, 1, 1, 2).unbind(-1)
    expected = (keys >= begin.unsqueeze(-1)) & (keys < end.unsqueeze(-1))
    places = torch.arange(n_k - n_q, n_k, device=key_range.device).unsqueeze(-1)
    if causal:
        expected = expected & (keys <= places)
    if window:
        expected = expected & ((keys - places).abs() < window)
    return expected


def _read_window(mask: Tensor, n_q: int, n_k: int) -> MaskPattern | None:
    """A sliding window, causal or to both sides: the last query of some batch element sees all of its past half."""
    if n_q > n_k:
        return None
    window = int(mask[:, 0, -1].sum(-1).max())
    seen = mask[:, 0].any(-2)
    begin = seen.to(torch.uint8).argmax(-1)
    key_range = torch.stack((begin, begin + seen.sum(-1)), dim=-1)
    for causal in (True, False):
        if window and torch.equal(mask, _expected(key_range, causal, n_q, n_k, window).expand_as(mask)):
            everything = bool((key_range[:, 0] == 0).all() and (key_range[:, 1] == n_k).all())
            return MaskPattern(causal, None if everything else key_range, n_k, window)
    return None


def count_visible_keys(mask: Tensor, n_k: int) -> int:
    """Keys up to the last one that any query may look at."""
    return int((mask.any(dim=(0, 1, 2)) * torch.arange(1, n_k + 1, device=mask.device)).max()) if n_k else 0


def _read(mask: Tensor, n_q: int, n_k: int, causal: bool) -> MaskPattern | None:
    allowed = as_bool_mask(mask)
    if allowed is None or not mask.numel() or mask.shape[-1] != n_k:
        return None
    uniform = rows_without_keys(mask)
    if uniform is not None:
        if ((mask == torch.finfo(mask.dtype).min).any(-1) & ~allowed.any(-1) & ~uniform).any():
            return None  # rows of -inf and the most negative number: the mean of some values
        uniform = uniform if uniform.any() else None
    mask = allowed
    if mask.shape[2] != n_q:
        mask = mask.expand(-1, -1, n_q, -1)
    seen = count_visible_keys(mask, n_k)
    for is_causal, last in ((True, n_k), (True, seen), (False, n_k)):
        # One query alone is under the causal mask or not without a difference in the mask: the module knows.
        if n_q == 1 and is_causal != causal:
            continue
        if is_causal and (last < n_q or (n_q == 1 and last != seen)):
            continue
        key_range = _range_of_last_row(mask, last)
        if torch.equal(mask[..., :last], _expected(key_range, is_causal, n_q, last).expand_as(mask[..., :last])):
            everything = bool((key_range[:, 0] == 0).all() and (key_range[:, 1] == last).all())
            return MaskPattern(is_causal, None if everything else key_range, last, uniform=uniform)
    pattern = _read_window(mask, n_q, n_k)
    return None if pattern is None else pattern._replace(uniform=uniform)


def read_mask(mask: Tensor, batch: int, n_q: int, n_k: int, causal: bool) -> MaskPattern | None:
    """The pattern of mask [B or 1, H or 1, Nq or 1, Nk], or None if it is another one (or a bias).

    ``causal`` says what the layer is, for the cases in which the mask cannot tell. The answer is kept with the mask,
    which the layers of a model share. When traced by a compiler nothing can be looked at: the mask is then taken for a
    padding mask on a layer of that kind, and checked when the compiled code runs.
    """
    if torch.compiler.is_compiling():
        allowed = as_bool_mask(mask)
        if allowed is None:
            return None
        key_range = _range_of_last_row(allowed, n_k)
        matches = (allowed == _expected(key_range, causal, n_q, n_k)).all()
        torch._assert_async(
            matches,
            "attention mask: expected the causal or full mask with padding on the left or right; "
            "other masks work without torch.compile",
        )
        return MaskPattern(causal, key_range.expand(batch, 2), n_k, uniform=rows_without_keys(mask))
    if mask.is_inference():  # counts no versions, so what was read once may have changed
        pattern = _read(mask, n_q, n_k, causal)
    else:
        key = (mask._version, n_q, n_k, causal)
        memo = getattr(mask, "_sluice_pattern", None)
        if memo is None or memo[0] != key:
            memo = mask._sluice_pattern = (key, _read(mask, n_q, n_k, causal))
        pattern = memo[1]
    if pattern is not None and pattern.key_range is not None:
        pattern = pattern._replace(key_range=pattern.key_range.expand(batch, 2))
    return pattern
