"""The number of pairs that each head kept: what the kernel counts is what the formula chooses."""

from itertools import pairwise

import pytest
import torch
from support.attention import choose_pairs, random_inputs
from support.devices import DEVICES
from torch.func import grad, vmap

from torch_sluice import gated_attention, gated_attention_paged, gated_attention_varlen
from torch_sluice.monitor import KeptPairCounter

N_Q, N_K = 300, 700  # several chunks of keys and of queries
PLACES = dict(
    q_offset=torch.tensor([90, 400]), text_begin=torch.tensor([-2, 0]), key_range=torch.tensor([[3, 600], [0, 700]])
)
OPTIONS = {
    "open": dict(),
    "causal": dict(causal=True),
    "tau": dict(tau=0.6),
    "causal tau": dict(causal=True, tau=0.6),
    "tau of heads": dict(causal=True, tau=torch.tensor([0.0, 0.3, 0.6, 0.99])),
    "window": dict(causal=True, tau=0.7, window=70, sinks=5),
    "full window": dict(tau=0.7, window=50, sinks=3),
    "open window": dict(causal=True, window=9, sinks=2),
    "sliding": dict(causal=True, tau=0.5, sliding_window=130, window=8, sinks=300),
    "full sliding": dict(tau=0.4, sliding_window=99),
    "open sliding": dict(causal=True, sliding_window=200),
    "places": dict(causal=True, tau=0.6, window=5, sinks=4, **PLACES),
    "full places": dict(tau=0.6, window=5, sinks=4, **PLACES),
    "nothing": dict(tau=1 - 1e-9),
}
MASKS = ((2, 4, N_Q, N_K), (1, 1, N_Q, N_K), (2, 1, 1, N_K))


def count(a, b, **options):
    return choose_pairs(a, b, **options)[1].sum((-1, -2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_exact(name, device):
    options = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in OPTIONS[name].items()}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = random_inputs(n_q=N_Q, n_k=N_K, head_dim=8, head_dim_v=8, dtype=dtype, device=device)
        kept = gated_attention(*inputs, return_kept=True, **options)[1]
        assert kept.dtype == torch.int64
        assert torch.equal(kept, count(*inputs[3:], **options))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_pairs_behind_a_mask_are_not_counted(name, shape):
    inputs = random_inputs(n_q=N_Q, n_k=N_K, head_dim=8, head_dim_v=8)
    shown = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    for mask in (shown, torch.zeros(shape).masked_fill(~shown, -torch.inf)):
        kept = gated_attention(*inputs, return_kept=True, attn_mask=mask, **OPTIONS[name])[1]
        assert torch.equal(kept, count(*inputs[3:], attn_mask=mask, **OPTIONS[name]))


@pytest.mark.parametrize("n_q", [0, 1, 3])
def test_of_few_queries(n_q):
    inputs = random_inputs(n_q=n_q, n_k=N_K, head_dim=8, head_dim_v=8)
    for options in (dict(causal=True, tau=0.6, window=7, sinks=2), dict(), dict(tau=0.6, sliding_window=100)):
        assert torch.equal(gated_attention(*inputs, return_kept=True, **options)[1], count(*inputs[3:], **options))


def test_gates_that_are_not_numbers_keep_their_pairs():
    *inputs, a, b = random_inputs(n_q=N_Q, n_k=N_K, head_dim=8, head_dim_v=8)
    a[0, 1, 7], b[1, 0, 100] = torch.nan, torch.nan
    options = dict(causal=True, tau=0.7)
    assert torch.equal(gated_attention(*inputs, a, b, return_kept=True, **options)[1], count(a, b, **options))


@pytest.mark.parametrize("mode", ["post", "log"])
def test_of_the_other_modes_it_is_that_of_the_pairs_that_are_summed(mode):
    inputs = random_inputs(n_q=40, n_k=60)
    options = dict(causal=True, tau=0.6, window=4)
    found = gated_attention(*inputs, mode=mode, return_lse=True, return_kept=True, **options)
    assert len(found) == 3
    assert torch.equal(found[2], count(*inputs[3:], **options))


def test_of_packed_sequences_there_is_one_for_each():
    q, k, v, a, b = (x[0].transpose(0, 1) for x in random_inputs(batch=1, n_q=60, n_k=60))
    ends, options = torch.tensor([0, 20, 20, 40, 60]), dict(causal=True, tau=0.6, window=3, sinks=1)
    out, lse, kept = gated_attention_varlen(q, k, v, a, b, ends, return_lse=True, return_kept=True, **options)
    parts = [(a[i:j].T[None], b[i:j].T[None]) for i, j in pairwise(ends)]
    assert torch.equal(kept, torch.cat([count(*part, **options) for part in parts]))
    assert out.shape == q.shape
    assert lse.shape == (4, 60)
    nothing = torch.zeros(1, dtype=torch.int64)
    assert gated_attention_varlen(q[:0], k[:0], v[:0], a[:0], b[:0], nothing, return_kept=True)[1].shape == (0, 4)


@pytest.mark.parametrize("n_q", [1, 40])
def test_holes_of_a_paged_cache_are_not_counted(n_q):
    q, k, v, a, b = random_inputs(batch=1, n_q=n_q, n_k=60)
    caches = [x[0].transpose(0, 1).unflatten(0, (6, 10)).contiguous() for x in (k, v, b)]
    table, shown = torch.arange(6, dtype=torch.int32)[None], torch.ones(1, 1, 1, 60, dtype=torch.bool)
    table[0, 2], shown[..., 20:30] = -1, False
    options = dict(causal=True, tau=0.6, window=15)
    arguments = (q, *caches[:2], a, caches[2], table, torch.tensor([60]))
    kept = gated_attention_paged(*arguments, return_kept=True, **options)[1]
    assert torch.equal(kept, count(a, b, attn_mask=shown, **options))


def test_it_has_no_gradient_and_leaves_the_others_alone():
    q, k, v, a, b = random_inputs()

    def loss(q, asked):
        results = gated_attention(q, k, v, a, b, tau=0.6, causal=True, return_kept=asked)
        assert not asked or not results[1].requires_grad
        return (results[0] if asked else results).square().sum()

    for differentiate in (grad(loss), lambda q, asked: torch.autograd.grad(loss(q, asked), q)[0]):
        leaf = q.clone().requires_grad_()
        assert torch.equal(differentiate(leaf, True), differentiate(leaf, False))


def test_under_vmap_and_compiled():
    q, k, v, a, b = random_inputs()
    options = dict(causal=True, tau=0.6, return_kept=True)
    kept = vmap(lambda a: gated_attention(q, k, v, a, b, **options)[1])(torch.stack((a, a - 1)))
    assert torch.equal(kept, torch.stack([count(x, b, causal=True, tau=0.6) for x in (a, a - 1)]))
    torch.compiler.reset()
    compiled = torch.compile(gated_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, a, b, **options)[1], kept[0])


def test_threads_do_not_matter():
    inputs = random_inputs(n_q=N_Q, n_k=N_K, head_dim=8, head_dim_v=8)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(gated_attention(*inputs, causal=True, tau=0.6, return_kept=True)[1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_counter_of_calls_reads_it():
    inputs = random_inputs(n_q=40, n_k=60)
    mask = torch.rand(2, 1, 40, 60) < 0.7
    for options in (dict(causal=True, tau=0.6, window=4), dict(tau=0.5, attn_mask=mask, sliding_window=9)):
        with KeptPairCounter() as counter:
            gated_attention(*inputs, **options)
        assert counter.kept == count(*inputs[3:], **options).sum()
        assert counter.total == count(*inputs[3:], **options | dict(tau=0.0)).sum()
