"""Gated attention over a paged KV cache: blocks that sequences take in any order, named by a table."""

import math

import torch
from torch import Tensor

from torch_sluice._errors import as_value_error, check_tensors
from torch_sluice._paged import run
from torch_sluice.functional import _gates_of, _logit_tau_of, cuts_of, mask_of, results_of, slopes_of
from torch_sluice.places import check_places


def gated_attention_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    a: Tensor,
    b_cache: Tensor,
    block_table: Tensor,
    seqlens_k: Tensor,
    *,
    causal: bool = False,
    tau: float | Tensor = 0.0,
    window: int = 0,
    sinks: int = 0,
    scale: float | None = None,
    q_offset: Tensor | None = None,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = 0.0,
    sliding_window: int | None = 0,
    return_lse: bool = False,
    return_kept: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """``torch_sluice.gated_attention`` of keys and values that lie in the blocks of a cache, on the CPU, forward only.

    Key j of sequence i is row ``j % block_size`` of block ``block_table[i, j // block_size]``. It gives the numbers
    that ``gated_attention`` gives for the same keys side by side. A block of -1 is a hole: its keys were dropped, no
    query sees them, and the later keys keep their places. :class:`torch_sluice.KVCache` keeps such a cache.

    Args:
        q: [B, Hq, Nq, D] queries, float32, bfloat16 or float16 (float64: by the slow reference, for tests). Nq is from
            1 up: one token, or a chunk of a prompt. Shorter chunks of a batch are padded on the left.
        k_cache: [num_blocks, block_size, Hkv, D] keys, of the dtype of q; v_cache: [num_blocks, block_size, Hkv, Dv].
            Their channels lie side by side, and the stride from block to block is a multiple of that from token to
            token, the same one in both; otherwise strides are free.
        a: [B, Hq, Nq] gate logits of the queries; converted to float32 (float64 with float64 q).
        b_cache: [num_blocks, block_size, Hkv] gate logits of the keys, float32 (float64 with float64 q).
        block_table: [B, max_blocks] int32. Columns that no valid key of a sequence needs may hold anything.
        seqlens_k: [B] int32 or int64, the valid keys of each sequence, those of these queries included; 0 to
            max_blocks * block_size.
        causal: query i sees keys up to its own place only.
        tau: threshold on the gate in [0, 1): a number, [Hq] or [B, Hq]. 0 keeps every pair.
        q_offset: [B] int64, the place of query 0 of each sequence, from -Nq; default ``seqlens_k - Nq``. Queries at
            places below 0 give 0 under ``causal``.
        attn_mask: broadcasts to [B, Hq, Nq, max_blocks * block_size], by place in the text.
        window, sinks, scale, alibi_slopes, softcap, sliding_window, return_lse, return_kept: as in ``gated_attention``.

    Returns:
        out [B, Hq, Nq, Dv] in the dtype of q; with ``return_lse`` or ``return_kept`` a tuple, as of
        ``gated_attention``.

    There are no gradients; ``torch.func.vmap`` takes one call after the other. Under autocast q takes the dtype of the
    cache. The same inputs give the same bits, whatever the number of threads, and whichever blocks are used.

    Raises:
        ValueError: an argument of a wrong shape, dtype, device or value, or one that requires a gradient under grad
            mode; the message names it.
        NotImplementedError: an input with a tangent of forward-mode differentiation.
        IndexError: sizes beyond what the operator can index.
    """
    check_tensors(
        q=q, k_cache=k_cache, v_cache=v_cache, a=a, b_cache=b_cache, block_table=block_table, seqlens_k=seqlens_k
    )
    if q.dim() != 4:
        raise ValueError(f"q has shape {list(q.shape)}, expected [batch, heads_q, n_q, head_dim]")
    if q_offset is not None:
        check_places(q, q_offset=q_offset)
    dtype = torch.float64 if k_cache.dtype == torch.float64 else torch.float32
    a, logit_tau = _gates_of("a", a, dtype), _logit_tau_of(tau, q, dtype)
    if scale is None:
        scale = 1 / math.sqrt(max(q.shape[3], 1))
    of_scores = (mask_of(attn_mask), slopes_of(alibi_slopes, q, dtype))
    sliding_window, softcap = cuts_of(sliding_window, softcap)
    try:
        out, lse, kept = run(
            (
                *(q, k_cache, v_cache, a, b_cache, block_table, seqlens_k, logit_tau, q_offset, *of_scores),
                *(causal, window, sinks, sliding_window, softcap, scale),
            )
        )
    except RuntimeError as error:
        raise as_value_error(error) from None
    return results_of(out, lse if return_lse else None, kept.sum(-1) if return_kept else None)
