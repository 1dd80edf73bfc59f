"""Operations, kept pairs and peaks: counts that can be worked out by hand."""

import itertools

import pytest
import torch
from torch import nn

import torch_sluice
from torch_sluice.monitor import (
    KeptPairCounter,
    count_flops,
    count_kept_pairs,
    measure_peak_flops,
)


def _gates(batch, heads, kv_heads, n_q, n_k):
    generator = torch.Generator().manual_seed(n_q * 1000 + n_k)
    make = lambda *shape: 3 * torch.randn(*shape, generator=generator)  # noqa: E731
    return make(batch, heads, n_q), make(batch, kv_heads, n_k), make(batch, heads)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (3, 0), (0, 2), (5, 3)])
@pytest.mark.parametrize(("n_q", "n_k"), [(9, 9), (4, 11), (11, 4), (270, 20)])
def test_kept_pairs_against_the_rule_written_out(causal, window, sinks, n_q, n_k):
    heads, kv_heads = (4, 2) if n_q < 100 else (1, 1)
    a, b, logit_tau = _gates(1, heads, kv_heads, n_q, n_k)
    key_range = torch.tensor([[1, n_k - 1]])
    kept = total = 0
    for h, i, j in itertools.product(range(heads), range(n_q), range(1, n_k - 1)):
        p = i + n_k - n_q
        if causal and j > p:
            continue
        total += 1
        near = abs(p - j) < window or j - 1 < sinks or (causal and j == p)  # the first valid key is 1
        kept += near or bool(a[0, h, i] + b[0, h // (heads // kv_heads), j] >= logit_tau[0, h])
    options = dict(causal=causal, window=window, sinks=sinks)
    assert count_kept_pairs(a, b, logit_tau, key_range, **options) == (kept, total)
    assert count_kept_pairs(a, b, None, key_range, **options) == (total, total)


def test_gated_attention_flops_are_those_of_the_kept_pairs():
    batch, heads, kv_heads, n, d, d_v = 2, 4, 2, 33, 8, 16
    a, b, _ = _gates(batch, heads, kv_heads, n, n)
    q = torch.randn(batch, heads, n, d, requires_grad=True)
    k = torch.randn(batch, kv_heads, n, d)
    v = torch.randn(batch, kv_heads, n, d_v)

    def forward():
        return torch_sluice.gated_attention(q, k, v, a, b, causal=True, tau=0.5, window=4)

    with KeptPairCounter() as counter:
        out = forward()
    assert (counter.kept, counter.total) == count_kept_pairs(a, b, torch.zeros(batch, heads), causal=True, window=4)
    assert 0 < counter.density < 1
    assert count_flops(forward) == counter.kept * 2 * (d + d_v)
    assert count_flops(lambda: out.sum().backward()) == counter.kept * (6 * d + 4 * d_v)


def test_paged_attention_counts_what_the_dense_one_counts():
    cache = torch_sluice.KVCache(40, 4, 2, 8)
    sequences = [cache.allocate(), cache.allocate()]
    a, b, _ = _gates(2, 4, 2, 5, 33)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 33, 8), torch.randn(2, 2, 33, 8)
    cache.append(sequences, k, v, b)
    options = dict(causal=True, tau=0.5, window=4)

    def paged():
        where = (cache.block_table(sequences), cache.seqlens_k(sequences))
        return torch_sluice.gated_attention_paged(q, cache.k_cache, cache.v_cache, a, cache.b_cache, *where, **options)

    whole = count_flops(lambda: torch_sluice.gated_attention(q, k, v, a, b, **options))
    assert count_flops(paged) == whole
    freed = cache.evict(budget=3)
    assert freed == 12
    assert 0 < count_flops(paged) < whole


def test_causal_sdpa_counts_half_of_the_square():
    q = torch.randn(1, 2, 16, 8)
    sdpa = nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: sdpa(q, q, q, is_causal=True)) == 2 * (16 * 17 // 2) * 2 * (8 + 8)
    assert count_flops(lambda: sdpa(q, q, q)) == 2 * (16 * 16) * 2 * (8 + 8)


def test_linear_layer_flops():
    layer = nn.Linear(8, 4)
    assert count_flops(lambda: layer(torch.randn(3, 8))) == 2 * 3 * 8 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_measured_peak_is_a_rate_that_a_product_can_reach(dtype):
    assert 1e7 < measure_peak_flops(dtype, seconds=0.02) < 1e15


def test_a_dtype_without_a_matrix_product():
    with pytest.raises(ValueError, match=r"dtype is torch\.bool on cpu, of which torch has no matrix product"):
        measure_peak_flops(torch.bool)


def test_long_sequences_are_counted_alike():
    a, b, logit_tau = _gates(1, 2, 1, 800, 900)
    near = dict(causal=True, window=5, sinks=2)
    key_range = torch.tensor([[3, 890]])
    whole = count_kept_pairs(a, b, logit_tau, key_range, **near)
    rows = range(800)  # row by row, each short enough to be counted pair by pair
    parts = [
        count_kept_pairs(a[..., i : i + 1], b[..., : i + 101], logit_tau, key_range.clamp(max=i + 101), **near)
        for i in rows
    ]
    assert whole == tuple(map(sum, zip(*parts, strict=True)))
