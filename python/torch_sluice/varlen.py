"""Gated attention of sequences of any lengths that lie one behind the other, without padding."""

from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from torch_sluice.functional import gated_attention, results_of

_INTEGERS = (torch.int32, torch.int64)


class Run(NamedTuple):
    """Neighbouring sequences of the same lengths, which are a batch."""

    count: int
    n_q: int
    n_k: int


def find_runs(lengths: Sequence[tuple[int, int]]) -> list[Run]:
    """Of the lengths (n_q, n_k) of all sequences."""
    return [Run(len(list(group)), *each) for each, group in groupby(lengths)]


def split_runs(packed: Tensor, runs: Sequence[Run], of_keys: bool) -> list[Tensor]:
    """[tokens, heads, ..] as a batch [count, heads, n, ..] for each run; a view."""
    sizes = [run.n_k if of_keys else run.n_q for run in runs]
    parts = packed.split([run.count * size for run, size in zip(runs, sizes, strict=True)])
    return [
        part.unflatten(0, (run.count, size)).transpose(1, 2) for part, run, size in zip(parts, runs, sizes, strict=True)
    ]


def join_runs(parts: Sequence[Tensor]) -> Tensor:
    """The other way round."""
    return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])


def gated_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = False,
    mode: str = "select",
    tau: float | Tensor | None = None,
    density: float | Tensor | None = None,
    window: int = 0,
    sinks: int = 0,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sliding_window: int = 0,
    output_gate: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_kept: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """``torch_sluice.gated_attention`` of packed sequences, in the layout of ``torch.nn.attention.varlen``.

    Sequence s has queries ``cu_seqlens_q[s]`` to ``cu_seqlens_q[s + 1]`` and keys alike, and sees no other. Each is
    computed as it would be alone, sinks and windows counted from its own first key; neighbours of the same lengths go
    together. Which they are is looked up in the values of cu_seqlens, for which an accelerator is waited.

    Args:
        q: [Tq, Hq, D] queries of all sequences, one behind the other.
        k: [Tk, Hkv, D] keys; v: [Tk, Hkv, Dv] values.
        a: [Tq, Hq] gate logits of the queries; b: [Tk, Hkv] of the keys.
        cu_seqlens_q: [S + 1] int32 or int64, the tokens before each sequence: 0, .., Tq. Lengths may be 0.
        cu_seqlens_k: the same of the keys; default cu_seqlens_q. Where they differ and ``causal`` is set, the last
            query of a sequence sits at its last key.
        tau, density, alibi_slopes: as in ``gated_attention``, where B is S.
        output_gate: [Tq, Hq] or [Tq, Hq, Dv] logits.
        The others: as in ``gated_attention``.

    Returns:
        out [Tq, Hq, Dv] in the dtype of q; with ``return_lse`` or ``return_kept`` the tuple (out, lse [Hq, Tq]),
        (out, kept [S, Hq]) or (out, lse, kept).

    Raises:
        ValueError: an argument of a wrong shape, dtype or value; the message names it.
    """
    for name, tensor, dims, expected in (
        ("q", q, 3, "[tokens, heads_q, head_dim]"), ("k", k, 3, "[tokens, heads_kv, head_dim]"),
        ("v", v, 3, "[tokens, heads_kv, head_dim_v]"), ("a", a, 2, "[tokens, heads_q]"),
        ("b", b, 2, "[tokens, heads_kv]"),
    ):  # fmt: skip
        if not isinstance(tensor, Tensor) or tensor.dim() != dims:
            found = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} has shape {found}, expected {expected}")
    for name, tensor, of, like in (("a", a, "q", q), ("v", v, "k", k), ("b", b, "k", k)):
        if len(tensor) != len(like):
            raise ValueError(f"{name} has {len(tensor)} tokens, expected those of {of}, which has {len(like)}")
    lengths_q = _lengths_of("cu_seqlens_q", cu_seqlens_q, len(q), "q")
    lengths_k = lengths_q if cu_seqlens_k is None else _lengths_of("cu_seqlens_k", cu_seqlens_k, len(k), "k")
    if cu_seqlens_k is None and len(k) != len(q):
        raise ValueError(f"k has {len(k)} tokens and q {len(q)}, expected as many, or cu_seqlens_k")
    if len(lengths_q) != len(lengths_k):
        raise ValueError(
            f"cu_seqlens_k has {len(lengths_k)} sequences, expected those of cu_seqlens_q, {len(lengths_q)}"
        )
    runs, first, results = find_runs(list(zip(lengths_q, lengths_k, strict=True))), 0, []
    gates = [None] * len(runs)
    if output_gate is not None:
        if not isinstance(output_gate, Tensor) or output_gate.shape not in (
            q.shape[:2], (*q.shape[:2], 1), (*q.shape[:2], v.shape[2]),
        ):  # fmt: skip
            found = list(output_gate.shape) if isinstance(output_gate, Tensor) else type(output_gate).__name__
            raise ValueError(f"output_gate is {found}, expected [tokens, heads_q] or [tokens, heads_q, head_dim_v]")
        gates = split_runs(output_gate, runs, False)
    columns = (split_runs(x, runs, of_keys) for x, of_keys in ((q, 0), (k, 1), (v, 1), (a, 0), (b, 1)))
    of_sequences = _chosen_for(len(lengths_q), q.shape[1])
    for run, gate, *inputs in zip(runs, gates, *columns, strict=True):
        last = first + run.count
        each = gated_attention(
            *inputs, causal=causal, mode=mode, tau=of_sequences("tau", tau, first, last),
            density=of_sequences("density", density, first, last), window=window, sinks=sinks, scale=scale,
            alibi_slopes=of_sequences("alibi_slopes", alibi_slopes, first, last), softcap=softcap,
            sliding_window=sliding_window, output_gate=gate, dropout_p=dropout_p, return_lse=True,
            return_kept=True,
        )  # fmt: skip
        results.append(each)
        first = last
    if runs:
        outs, lses, kept = zip(*results, strict=True)
        out, lse, kept = join_runs(outs), join_runs(lses).T, torch.cat(kept)
    else:
        out = q.sum(-1, keepdim=True).expand(0, q.shape[1], v.shape[2])  # none, which can still be differentiated
        lse = a.T.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        kept = q.new_empty(0, q.shape[1], dtype=torch.int64)
    return results_of(out, lse if return_lse else None, kept if return_kept else None)


def _lengths_of(name: str, ends: Tensor, tokens: int, of: str) -> list[int]:
    if not isinstance(ends, Tensor) or ends.dim() != 1 or ends.dtype not in _INTEGERS or not len(ends):
        found = f"{ends.dtype} of shape {list(ends.shape)}" if isinstance(ends, Tensor) else type(ends).__name__
        raise ValueError(f"{name} is {found}, expected int32 or int64 [sequences + 1]")
    values = ends.tolist()
    if values[0] != 0 or values[-1] != tokens:
        raise ValueError(
            f"{name} goes from {values[0]} to {values[-1]}, expected 0 to {tokens}, the number of tokens of {of}"
        )
    lengths = [b - a for a, b in pairwise(values)]
    if any(length < 0 for length in lengths):
        place = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(f"{name} falls from {values[place]} to {values[place + 1]}, expected numbers that never fall")
    return lengths


def _chosen_for(sequences: int, heads: int) -> Callable:
    """What of a number, a tensor [heads] or [sequences, heads] belongs to sequences from .. to ..."""

    def choose(name: str, value, first: int, last: int):
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] == 1:
            return value
        if value.dim() > 2 or value.shape[0] != sequences:
            raise ValueError(
                f"{name} has shape {list(value.shape)}, expected [heads_q] or [sequences, heads_q] = "
                f"{[sequences, heads]}"
            )
        return value[first:last]

    return choose
