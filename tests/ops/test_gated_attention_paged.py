"""A paged cache against the same keys in a dense tensor."""

import pytest
import torch
from support.attention import formula, random_inputs
from support.devices import INDUCTOR

from torch_sluice import gated_attention, gated_attention_paged

OPERATOR = torch.ops.sluice.gated_attention_paged.default
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-12}


def page(k, v, b, block_size, *, head_major=False, seed=0, spare=3):
    """(k_cache, v_cache, b_cache, block_table) of dense keys, in shuffled blocks; what no key is in is NaN."""
    batch, heads, n_k, _ = k.shape
    columns = -(-n_k // block_size)
    order = torch.randperm(batch * columns + spare, generator=torch.Generator().manual_seed(seed))
    table = order[: batch * columns].view(batch, columns).int()
    caches = []
    for x in (k, v, b[..., None]):
        shape = (len(order), heads, block_size) if head_major else (len(order), block_size, heads)
        cache = torch.full((*shape, x.shape[3]), torch.nan, dtype=x.dtype)
        view = cache.transpose(1, 2) if head_major else cache
        for j in range(n_k):
            view[table[:, j // block_size].long(), j % block_size] = x[:, :, j]
        caches.append(view)
    return caches[0], caches[1], caches[2][..., 0], table


def dense_of_paged(q, k_cache, v_cache, a, b_cache, block_table, seqlens_k, **options):
    """By the plain formula, from keys that are gathered, holes masked away."""
    block_size = k_cache.shape[1]
    keys = torch.arange(block_table.shape[1] * block_size)
    blocks = block_table[:, keys // block_size].long()
    held = (blocks >= 0) & (keys < seqlens_k[:, None])
    where = (blocks.clamp(min=0, max=len(k_cache) - 1), keys % block_size)
    mask = held[:, None, None, :]
    k, v, b = (x[where].transpose(1, 2).clone() for x in (k_cache, v_cache, b_cache))
    for x in (k, v, b):
        x.masked_fill_(~held.view(len(held), 1, -1, *(1,) * (x.dim() - 3)), 0)
    options.setdefault("q_offset", seqlens_k.long() - q.shape[2])
    return formula(q, k, v, a, b, attn_mask=mask, **options)


def case(n_q=3, lengths=(33, 33), block_size=16, dtype=torch.float32, **options):
    q, k, v, a, b = random_inputs(batch=len(lengths), n_q=n_q, n_k=max(lengths), dtype=dtype, head_dim_v=12)
    k_cache, v_cache, b_cache, table = page(k, v, b, block_size, **options)
    return [q, k_cache, v_cache, a, b_cache, table, torch.tensor(lengths)], (q, k, v, a, b)


OPTIONS = {
    "open": dict(),
    "causal": dict(causal=True, tau=0.5, window=2, sinks=1),
    "heads": dict(causal=True, tau=torch.tensor([0.0, 0.3, 0.5, 0.9])),
    "scores": dict(causal=True, tau=0.4, softcap=2.0, alibi_slopes=torch.tensor([0.1, 0.2, 0.3, 0.4])),
    "slides": dict(causal=True, tau=0.4, sliding_window=9, scale=0.9),
}


@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize("block_size", [1, 16, 100])
@pytest.mark.parametrize("n_q", [1, 4, 30])
@pytest.mark.parametrize("name", OPTIONS)
def test_blocks_in_any_order_give_the_bits_of_a_dense_tensor(name, n_q, block_size, head_major):
    paged, dense = case(n_q=n_q, block_size=block_size, head_major=head_major)
    found = gated_attention_paged(*paged, return_lse=True, **OPTIONS[name])
    for got, want in zip(found, gated_attention(*dense, return_lse=True, **OPTIONS[name]), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("n_q", [1, 9])
def test_sequences_of_different_lengths(n_q, dtype):
    (q, k, v, a, b, table, lengths), _ = case(n_q=n_q, lengths=(40, 9, 17, 31), block_size=8, dtype=dtype)
    options = dict(causal=True, tau=0.4, window=3, sinks=1)
    out, lse = gated_attention_paged(q, k, v, a, b, table, lengths, return_lse=True, **options)
    assert out.dtype == dtype
    inputs = [x.double() for x in (q, k, v)]
    precise = (*inputs, a.double(), b.double(), table, lengths)
    want, want_lse = dense_of_paged(*precise, choice_dtype=a.dtype, **options)
    torch.testing.assert_close(out.double(), want, atol=LIMITS[dtype], rtol=LIMITS[dtype])
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-6, rtol=2e-6)
    assert torch.equal(out, gated_attention_paged(q, k, v, a, b, table, lengths.int(), **options))


def test_holes_are_keys_that_nobody_sees():
    arguments, _ = case(n_q=5, lengths=(60, 37, 60), block_size=4)
    table = arguments[5]
    for entry, column in ((0, 0), (0, 3), (1, 2), (1, 3), (2, 14)):
        table[entry, column] = -1
    table[1, 10:] = 1 << 20  # behind the sequence: not looked at
    for options in (dict(tau=0.5), dict(causal=True), dict(causal=True, tau=0.4, window=5, sinks=2)):
        out, lse = gated_attention_paged(*arguments, return_lse=True, **options)
        want, want_lse = dense_of_paged(*arguments, **options)
        torch.testing.assert_close(out, want, atol=2e-6, rtol=2e-5)
        torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("sizes", [(64, 36), (1,) * 100, (5, 90, 1, 4)], ids=lambda sizes: str(len(sizes)))
def test_a_prompt_in_chunks_is_the_prompt(sizes):
    paged, dense = case(n_q=100, lengths=(100, 100))
    q, k, v, a, b, table, _ = paged
    options = dict(causal=True, tau=0.5, window=4, sinks=2)
    outs, begin = [], 0
    for size in sizes:
        end = begin + size
        chunk = slice(begin, end)
        outs.append(
            gated_attention_paged(q[:, :, chunk], k, v, a[:, :, chunk], b, table, torch.tensor([end, end]), **options)
        )
        begin = end
    torch.testing.assert_close(torch.cat(outs, 2), gated_attention(*dense, **options), atol=2e-6, rtol=2e-5)


def test_shorter_chunks_are_padded_on_the_left():
    (q, k, v, a, b, table, lengths), _ = case(n_q=6, lengths=(30, 2, 0))
    out, lse = gated_attention_paged(q, k, v, a, b, table, lengths, causal=True, return_lse=True)
    for before in (lse[1, :, :4], lse[2]):
        assert torch.isneginf(before).all()
    assert not out[1, :, :4].any()
    assert not out[2].any()
    short, of_short = q[1:2, :, 4:], a[1:2, :, 4:]
    alone = gated_attention_paged(short, k, v, of_short, b, table[1:2], lengths[1:2], causal=True)
    torch.testing.assert_close(out[1:2, :, 4:], alone)


def test_places_may_be_given():
    (*arguments, lengths), dense = case(n_q=4, lengths=(33, 33))
    offset = torch.tensor([11, 20])
    options = dict(causal=True, tau=0.4, window=3, q_offset=offset)
    assert torch.equal(gated_attention_paged(*arguments, lengths, **options), gated_attention(*dense, **options))


def test_a_mask_goes_by_places():
    (*arguments, lengths), dense = case(n_q=4, lengths=(33, 33), block_size=8)
    mask = torch.randn(2, 1, 4, 40)
    mask[torch.rand(mask.shape) < 0.2] = -torch.inf
    out = gated_attention_paged(*arguments, lengths, causal=True, tau=0.4, attn_mask=mask)
    assert torch.equal(out, gated_attention(*dense, causal=True, tau=0.4, attn_mask=mask[..., :33]))


def test_the_number_of_threads_changes_no_bit():
    arguments, _ = case(n_q=70, lengths=(300, 190))
    threads, outs = torch.get_num_threads(), []
    for number in (1, 3):
        torch.set_num_threads(number)
        outs.append(gated_attention_paged(*arguments, causal=True, tau=0.5))
    torch.set_num_threads(threads)
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_optional", [False, True])
def test_opcheck(with_optional, dtype):
    arguments, _ = case(dtype=dtype)
    optional = (torch.zeros(2, 4), torch.tensor([20, 30]), torch.randn(1, 4, 3, 48), torch.ones(2, 4))
    torch.library.opcheck(
        OPERATOR, (*arguments, *(optional if with_optional else (None,) * 4), True, 2, 1, 0, 0.0, 0.25)
    )


@pytest.mark.parametrize("backend", [pytest.param("aot_eager"), pytest.param("inductor", marks=INDUCTOR)])
def test_compile(backend):
    torch._dynamo.reset()

    def attention(q, *rest):
        return gated_attention_paged(2 * q, *rest, causal=True, tau=0.4, window=3).sigmoid()

    compiled = torch.compile(attention, fullgraph=True, backend=backend, dynamic=True)
    for lengths in ((33, 20), (70, 9), (9, 41)):
        arguments, _ = case(lengths=lengths)
        torch.testing.assert_close(compiled(*arguments), attention(*arguments))


def test_under_autocast_the_cache_says_the_dtype():
    (q, *rest), _ = case(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.float16):
        out = gated_attention_paged(q.float(), *rest, causal=True)
    assert torch.equal(out, gated_attention_paged(q, *rest, causal=True))


@pytest.mark.parametrize("index", [0, 1, 2, 3, 4])
def test_a_gradient_is_refused_by_name(index):
    arguments, _ = case()
    arguments[index].requires_grad_()
    name = ("q", "k_cache", "v_cache", "a", "b_cache")[index]
    with pytest.raises(ValueError, match=f"^{name} requires a gradient, expected none under grad mode"):
        gated_attention_paged(*arguments)
    with torch.no_grad():
        gated_attention_paged(*arguments)


def test_forward_mode_is_refused():
    (q, *rest), _ = case()
    with pytest.raises(NotImplementedError, match="gated_attention_paged has no derivatives, and none in forward mode"):
        torch.func.jvp(lambda q: gated_attention_paged(q, *rest), (q,), (q,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="none in forward mode"):
        gated_attention_paged(torch.autograd.forward_ad.make_dual(q, q), *rest)
    with pytest.raises(ValueError, match="q requires a gradient"):
        torch.func.grad(lambda q: gated_attention_paged(q, *rest).sum())(q)


def test_vmap():
    (q, *rest), _ = case()
    found = torch.func.vmap(lambda q: gated_attention_paged(q, *rest, causal=True))(torch.stack((q, -q)))
    for got, each in zip(found, (q, -q), strict=True):
        assert torch.equal(got, gated_attention_paged(each, *rest, causal=True))


def test_nothing_gives_nothing():
    (q, k, v, a, b, table, lengths), _ = case()
    assert gated_attention_paged(q[:0], k, v, a[:0], b, table[:0], lengths[:0]).shape == (0, 4, 3, 12)
    assert gated_attention_paged(q[:, :, :0], k, v, a[:, :, :0], b, table, lengths).shape == (2, 4, 0, 12)
    assert not gated_attention_paged(q, k, v, a, b, table[:, :0], 0 * lengths).any()
    assert not gated_attention_paged(q, k[:0], v[:0], a, b[:0], torch.full_like(table, -1), lengths).any()


(q, k, v, a, b, table, lengths), _ = case(lengths=(33, 20))
BAD = {
    "q is None": (dict(q=None), "^q is None, expected a tensor$"),
    "table is a list": (dict(block_table=[[0]]), "^block_table is list, expected a tensor$"),
    "rank of q": (dict(q=q[0]), r"q has shape \[4, 3, 16\], expected \[batch, heads_q, n_q, head_dim\]"),
    "rank of k": (dict(k_cache=k[0]), r"k_cache is .*expected \[num_blocks, block_size, heads_kv, head_dim\]"),
    "channels of k": (dict(k_cache=k[..., :8]), r"k_cache is .*\[9, 16, 2, 8\].*expected .* = \[9, 16, 2, 16\]"),
    "blocks of v": (dict(v_cache=v[1:]), r"v_cache is .*expected .*head_dim_v\] = \[9, 16, 2, 12\]"),
    "dtype of v": (dict(v_cache=v.half()), "v_cache is float16 .*expected the dtype of q and"),
    "blocks of b": (dict(b_cache=b[1:]), r"b_cache is .*expected .*heads_kv\] = \[9, 16, 2\]"),
    "dtype of b": (dict(b_cache=b.half()), r"b_cache is float16 .*expected float32"),
    "shape of a": (dict(a=a[:, :2]), r"a is .*\[2, 2, 3\].*expected .* = \[2, 4, 3\]"),
    "dtype of table": (dict(block_table=table.long()), "block_table is int64 .*expected int32"),
    "batch of table": (dict(block_table=table[:1]), r"block_table is .*expected .* = \[2, 3\]"),
    "block that isn't": (
        dict(block_table=torch.tensor([[0, 1, 2], [3, 9, -5]], dtype=torch.int32)),
        r"block_table\[1\]\[1\] is 9, expected 0 <= block < 9, or -1 where the keys were dropped",
    ),
    "dtype of lengths": (dict(seqlens_k=lengths.float()), "seqlens_k is float32 .*expected int32 or int64"),
    "batch of lengths": (dict(seqlens_k=lengths[:1]), r"seqlens_k is .*expected .* = \[2\]"),
    "long": (dict(seqlens_k=torch.tensor([49, 3])), r"seqlens_k\[0\] is 49, expected 0 to .* = 3 \* 16"),
    "negative length": (dict(seqlens_k=torch.tensor([4, -1])), r"seqlens_k\[1\] is -1, expected 0 to"),
    "early": (dict(q_offset=torch.tensor([0, -4])), r"q_offset\[1\] is -4, expected -n_q = -3 to"),
    "late": (dict(q_offset=torch.tensor([50, 0])), r"q_offset\[0\] is 50, expected .*block_size = 48"),
    "dtype of q_offset": (dict(q_offset=lengths.int()), "q_offset is torch.int32 .*expected int64"),
    "tau": (dict(tau=1.5), r"tau is 1.5, expected a number in \[0, 1\)"),
    "window": (dict(window=-1), "window is -1, expected at least 0"),
    "mask": (dict(attn_mask=torch.zeros(2, 1, 3, 33)), r"attn_mask is .*expected .* = \[2, 4, 3, 48\]"),
    "channels apart": (dict(k_cache=k.transpose(2, 3).contiguous().transpose(2, 3)), "k_cache has the stride 2"),
    "blocks apart": (
        dict(k_cache=k.new_zeros(9, 2, 16, 2, 16)[:, 0]),
        "the strides from block to block are 1024 in k and 384 in v, .* expected one to be the same multiple",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changed, message = BAD[name]
    arguments = dict(q=q, k_cache=k, v_cache=v, a=a, b_cache=b, block_table=table, seqlens_k=lengths) | changed
    with pytest.raises(ValueError, match=message):
        gated_attention_paged(**arguments)


def test_a_cache_within_another_tensor_is_read_where_it_lies():
    arguments, dense = case()
    layers = [torch.stack([torch.full_like(x, torch.nan), x], 1)[:, 1] for x in arguments[1:3]]
    out = gated_attention_paged(arguments[0], *layers, *arguments[3:], causal=True, tau=0.4)
    assert torch.equal(out, gated_attention(*dense, causal=True, tau=0.4))


def test_none_as_configs_have_it():
    q, k_cache, v_cache, a, b_cache = (
        torch.randn(*sizes) for sizes in ((1, 2, 1, 8), (3, 4, 2, 8), (3, 4, 2, 8), (1, 2, 1), (3, 4, 2))
    )
    arguments = (q, k_cache, v_cache, a, b_cache, torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([7]))
    plain = gated_attention_paged(*arguments)
    assert torch.equal(gated_attention_paged(*arguments, softcap=None, sliding_window=None), plain)
    with pytest.raises(ValueError, match="sliding_window is 2.5, expected an integer"):
        gated_attention_paged(*arguments, sliding_window=2.5)
