"""The paged cache that grows with its sequences, and lets go of keys."""

import pytest
import torch

from torch_sluice import KVCache, gated_attention, gated_attention_paged

HEADS, WIDTH = 2, 8


def draw(batch, n, heads=HEADS, seed=0, dtype=torch.float32):
    """(k, v, b) of n tokens."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, heads, n, WIDTH, generator=generator).to(dtype) for _ in range(2))
    return k, v, torch.randn(batch, heads, n, generator=generator)


def queries(batch, n, seed=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, 4, n, WIDTH, generator=generator).to(dtype)
    return q, torch.randn(batch, 4, n, generator=generator)


def attend(cache, sequences, q, a, **options):
    caches = (cache.k_cache, cache.v_cache, a, cache.b_cache)
    return gated_attention_paged(q, *caches, cache.block_table(sequences), cache.seqlens_k(sequences), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("block_size", [1, 4, 64])
def test_a_text_token_by_token_is_the_text(block_size, dtype):
    cache = KVCache(200, block_size, HEADS, WIDTH, dtype=dtype)
    sequences = [cache.allocate(), cache.allocate()]
    k, v, b = draw(2, 50, dtype=dtype)
    q, a = queries(2, 50, dtype=dtype)
    b, a = (x.double() if dtype == torch.float64 else x for x in (b, a))
    options = dict(causal=True, tau=0.5, window=3, sinks=2)
    outs = []
    for begin, end in ((0, 30), *((i, i + 1) for i in range(30, 50))):
        cache.append(sequences, k[:, :, begin:end], v[:, :, begin:end], b[:, :, begin:end])
        outs.append(attend(cache, sequences, q[:, :, begin:end], a[:, :, begin:end], **options))
    want = gated_attention(q, k, v, a, b, **options)
    limit = 1e-2 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(torch.cat(outs, 2), want, atol=limit, rtol=limit)


def test_sequences_come_grow_and_go():
    cache = KVCache(10, 4, HEADS, WIDTH)
    first, second = cache.allocate(), cache.allocate()
    for sequence, n in ((first, 5), (second, 9), (first, 2), (second, 0), (first, 4)):
        cache.append(sequence, *draw(1, n, seed=n))
    assert cache.seqlens_k().tolist() == [11, 9]
    assert cache.free_blocks == 4
    table = cache.block_table()
    assert table.dtype == torch.int32
    assert len(set(table.flatten().tolist())) == 6
    cache.free(first)
    assert (cache.free_blocks, cache.sequences) == (7, [second])
    third = cache.allocate()
    assert third not in (first, second)
    k, v, b = draw(1, 28, seed=3)
    cache.append(third, k, v, b)
    assert cache.free_blocks == 0
    q, a = queries(1, 1)
    out = attend(cache, third, q, a, causal=True)
    torch.testing.assert_close(out, gated_attention(q, k, v, a, b, causal=True))
    both = attend(cache, [third, second], q.expand(2, -1, -1, -1), a.expand(2, -1, -1), causal=True)
    torch.testing.assert_close(both[:1], out)


def test_many_sequences():
    cache = KVCache(100, 2, HEADS, WIDTH)
    sequences = [cache.allocate() for _ in range(30)]
    k, v, b = draw(30, 5)
    cache.append(sequences, k, v, b)
    q, a = queries(30, 5)
    torch.testing.assert_close(attend(cache, None, q, a), gated_attention(q, k, v, a, b), atol=2e-6, rtol=2e-5)


def test_a_full_cache_says_what_is_needed_and_stores_nothing():
    cache = KVCache(5, 4, HEADS, WIDTH)
    first, second = cache.allocate(), cache.allocate()
    cache.append([first, second], *draw(2, 7))
    with pytest.raises(MemoryError, match=r"2 tokens for 2 sequences need 2 blocks of 4, and 1 of 5 are free: free "):
        cache.append([first, second], *draw(2, 2))
    assert cache.seqlens_k().tolist() == [7, 7]
    assert cache.free_blocks == 1
    cache.append([first, second], *draw(2, 1))
    assert cache.free_blocks == 1


def test_what_is_stored_has_no_gradient():
    cache = KVCache(5, 4, HEADS, WIDTH)
    sequence = cache.allocate()
    cache.append(sequence, *(x.requires_grad_() for x in draw(1, 3)))
    assert not cache.k_cache.requires_grad
    assert not cache.b_cache.requires_grad


def filled(n, block_size=4, batch=2, later=0):
    """A cache with room for ``later`` tokens more, and its sequences. Gates as texts have them: keys of no interest in
    stretches, and heads that do not always agree."""
    cache = KVCache(batch * -(-(n + later) // block_size), block_size, HEADS, WIDTH)
    sequences = [cache.allocate() for _ in range(batch)]
    k, v, b = draw(batch, n)
    b -= 8.0 * (torch.arange(n) // 6 % 3 > 0)
    b[:, 1] += 8.0 * (torch.arange(n) // 6 % 6 == 2)
    cache.append(sequences, k, v, b)
    return cache, sequences


OPTIONS = {
    "gate": dict(tau=0.5),
    "near": dict(tau=0.5, window=30, sinks=9),
    "heads": dict(tau=torch.tensor([0.5, 0.7, 0.6, 0.9]), window=3),
    "slides": dict(tau=0.5, sliding_window=70, sinks=2),
    "slides open": dict(sliding_window=50),
    "a head is open": dict(tau=torch.tensor([0.5, 0.7, 0.0, 0.9]), window=3),
}


@pytest.mark.parametrize("later", [0, 1, 6, 40])
@pytest.mark.parametrize("name", OPTIONS)
def test_dropping_what_no_query_reaches_changes_no_bit(name, later):
    q, a = queries(2, max(later, 1))  # without tokens to come, that of the last
    outs = []
    for evicts in (False, True):
        cache, sequences = filled(203, later=later)
        free = cache.free_blocks
        if evicts:
            freed = cache.evict(a_max=a.max().item(), **OPTIONS[name])
            assert cache.free_blocks == free + freed
            assert (cache.block_table() < 0).sum() == freed
            assert (freed > 0) == (name != "a head is open")
            for rows in (cache.k_cache, cache.v_cache, cache.b_cache):
                rows[cache._free] = torch.nan
        cache.append(sequences, *draw(2, later, seed=5))
        outs.append(attend(cache, sequences, q, a, causal=True, return_lse=True, **OPTIONS[name]))
    for kept, evicted in zip(*outs, strict=True):
        assert torch.equal(kept, evicted)


def test_a_block_goes_when_all_its_keys_are_out_of_reach_for_all_heads():
    cache = KVCache(8, 2, HEADS, WIDTH)
    sequence = cache.allocate()
    k, v, _ = draw(1, 16)
    b = torch.full((1, HEADS, 16), -5.0)
    b[0, 0, 4] = 0.0  # 0 + a_max is not below the threshold, 0: in reach of one head
    b[0, 1, 7] = 0.5
    b[0, :, 9] = torch.nan  # kept, so that it is seen
    cache.append(sequence, k, v, b)
    assert cache.evict(sequence, tau=0.5, a_max=0.0, sinks=1, window=3) == 2
    held = (cache.block_table(sequence)[0] >= 0).tolist()
    assert held == [True, False, True, True, True, False, True, True]


def test_a_bound_for_each_query_head():
    cache, _ = filled(80)
    bounds = torch.tensor([0.0, 1.0, 2.0, 3.0])
    widest, _ = filled(80)
    freed = cache.evict(tau=0.5, a_max=bounds)
    assert freed >= widest.evict(tau=0.5, a_max=3.0) > 0
    assert cache.evict(tau=0.5, a_max=bounds.flip(0)) < freed


def test_with_the_widest_bound_hardly_anything_goes():
    cache, _ = filled(80)
    assert cache.evict(tau=0.5) == 0


def test_a_budget_keeps_the_keys_of_most_interest():
    cache = KVCache(12, 2, HEADS, WIDTH)
    sequence, other = cache.allocate(), cache.allocate()
    k, v, _ = draw(1, 16)
    b = torch.tensor([9.0, 0, 3, 5, 1, 2, 4, 0, 5, 5, 2, 2, 0, 0, 9, 9]).expand(1, HEADS, 16).clone()
    b[0, 1, 10] = 7.0
    cache.append(sequence, k, v, b)
    cache.append(other, *draw(1, 5))
    assert cache.evict(sequence, budget=5, sinks=2, window=3) == 3
    assert (cache.block_table(sequence)[0] >= 0).tolist() == [True, False, False, False, True, True, True, True]
    assert cache.evict(budget=5, sinks=2, window=3) == 0
    with pytest.raises(ValueError, match="budget is 2, expected at least 3, the blocks in which sinks, the window or"):
        cache.evict(budget=2, sinks=2, window=3)
    assert cache.blocks_held(other) == 3
    assert cache.evict(sequence, budget=3, sinks=2, window=3) == 2
    assert (cache.block_table(sequence)[0] >= 0).tolist() == [True, *(False,) * 5, True, True]


def test_what_is_left_on_a_budget_is_what_is_attended_to():
    cache, sequences = filled(100)
    k, v, b = (x[cache.block_table().long()].flatten(1, 2).transpose(1, 2).clone() for x in
               (cache.k_cache, cache.v_cache, cache.b_cache))  # fmt: skip
    cache.evict(budget=12, sinks=2, window=5)
    held = (cache.block_table() >= 0).repeat_interleave(4, 1)
    assert held.sum(1).tolist() == [48, 48]
    q, a = queries(2, 1)
    want = gated_attention(q, k, v, a, b, causal=True, tau=0.3, attn_mask=held[:, None, None])
    torch.testing.assert_close(attend(cache, sequences, q, a, causal=True, tau=0.3), want, atol=2e-6, rtol=2e-5)


def test_blocks_that_were_dropped_serve_others():
    cache, sequences = filled(80)
    assert cache.free_blocks == 0
    freed = cache.evict(sequences[0], tau=0.5, a_max=1.0)
    third = cache.allocate()
    k, v, b = draw(1, 4 * freed, seed=8)
    cache.append(third, k, v, b)
    q, a = queries(1, 1)
    torch.testing.assert_close(attend(cache, third, q, a), gated_attention(q, k, v, a, b), atol=2e-6, rtol=2e-5)
    cache.free(sequences[0])
    cache.free(sequences[1])
    cache.free(third)
    assert sorted(cache._free) == list(range(cache.num_blocks))


SIZES = dict(num_blocks=4, block_size=2, kv_heads=2, head_dim=8)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("size", [0, -1, 2.0, None])
def test_bad_sizes_are_named(name, size):
    with pytest.raises(ValueError, match=rf"^{name} is {size}, expected an integer of at least 1"):
        KVCache(**SIZES | {name: size})


def test_a_bad_dtype_is_named():
    with pytest.raises(ValueError, match="dtype is torch.int8, expected a floating-point one"):
        KVCache(**SIZES, dtype=torch.int8)


k, v, b = draw(1, 3)
BAD = {
    "rank": (dict(k=k[0]), r"k has shape \[2, 3, 8\], expected \[1, 2, n, 8\]"),
    "tokens": (dict(v=v[:, :, :2]), r"v has shape \[1, 2, 2, 8\], expected \[1, 2, 3, 8\]"),
    "batch": (dict(b=b.expand(2, -1, -1)), r"b has shape \[2, 2, 3\], expected \[1, 2, 3\]"),
    "dtype": (dict(k=k.half()), "k is torch.float16, expected the cache's dtype, torch.float32"),
    "gates": (dict(b=b > 0), "b is torch.bool, expected floating-point gate logits"),
    "device": (dict(v=v.to("meta")), "v is on meta, expected the cache's device, cpu"),
    "no tensor": (dict(b=None), "b is None, expected a tensor"),
    "twice": (dict(sequences=[0, 0], k=k.expand(2, -1, -1, -1)), r"sequences is \[0, 0\], expected each but once"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tokens_are_named(name):
    changed, message = BAD[name]
    cache = KVCache(**SIZES)
    cache.allocate()
    with pytest.raises(ValueError, match=message):
        cache.append(**dict(sequences=0, k=k, v=v, b=b) | changed)
    assert cache.length(0) == 0


def test_a_sequence_that_is_not_there_is_named():
    cache = KVCache(**SIZES)
    cache.free(cache.allocate())
    cache.allocate()
    for call in (
        cache.free, cache.length, cache.blocks_held, cache.block_table, cache.seqlens_k, cache.evict,
        lambda sequence: cache.append(sequence, k, v, b),
    ):  # fmt: skip
        with pytest.raises(KeyError, match=r"sequence 0 is not allocated, expected one of \[1\]"):
            call(0)


BAD_RULES = {
    "tau": (dict(tau=1.0), r"tau is 1.0, expected numbers in \[0, 1\)"),
    "a tau": (dict(tau=torch.tensor([0.5, torch.nan])), "tau is nan, expected"),
    "heads": (dict(tau=torch.zeros(3)), r"tau has shape \[3\], expected a number or \[heads_q\], a multiple of 2"),
    "bound": (dict(a_max=torch.zeros(2, 2)), r"a_max has shape \[2, 2\], expected"),
    "infinite": (dict(a_max=torch.inf), "a_max is inf, expected finite numbers"),
    "unlike": (dict(tau=torch.zeros(4), a_max=torch.zeros(2)), r"a_max has 2 heads and tau 4, expected as many"),
    "window": (dict(window=-1), "window is -1, expected an integer of at least 0"),
    "sinks": (dict(sinks=1.5), "sinks is 1.5, expected an integer"),
    "budget": (dict(budget=-2), "budget is -2, expected an integer"),
}


@pytest.mark.parametrize("name", BAD_RULES)
def test_a_bad_rule_is_named(name):
    changed, message = BAD_RULES[name]
    cache, _ = filled(20)
    with pytest.raises(ValueError, match=message):
        cache.evict(**changed)


def test_sequences_by_any_integer_each_but_once():
    cache = KVCache(4, 4, 1, 8)
    one, other = cache.allocate(), cache.allocate()

    def tokens(n, batch=1):
        return torch.randn(batch, 1, n, 8), torch.randn(batch, 1, n, 8), torch.full((batch, 1, n), -30.0)

    cache.append(torch.tensor(one), *tokens(12))
    with pytest.raises(ValueError, match="expected each but once"):
        cache.evict([one, one], tau=0.5, a_max=0.0)
    assert cache.free_blocks == 1
    cache.append([], *tokens(3, 0))
    cache.append(torch.tensor([other]), *tokens(4))
    with pytest.raises(MemoryError, match="need 1 blocks"):
        cache.append([other], *tokens(1))


def test_a_cache_made_in_inference_mode_says_so():
    with torch.inference_mode():
        cache = KVCache(2, 4, 1, 8)
        sequence = cache.allocate()
    with pytest.raises(RuntimeError, match="made under torch.inference_mode"):
        cache.append(sequence, torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8), torch.zeros(1, 1, 2))
    assert cache.free_blocks == 2
