"""What mode="log" drops by itself: at most e^-10 of any row's mass, whatever the inputs, and something where it can."""

import math

import pytest
import torch
from support.attention import choose_pairs, random_inputs
from support.devices import DEVICES
from torch.func import grad, vmap

from torch_sluice import gated_attention, gated_attention_varlen

N = 64
SHARE = math.exp(-10)
SLOPES = torch.tensor([0.3, 0.0, 0.7, -0.02])
OPTIONS = {
    "full": dict(),
    "causal": dict(causal=True),
    "near": dict(causal=True, window=5, sinks=2),
    "full window": dict(window=3, sinks=1),
    "padding": dict(causal=True, key_range=torch.tensor([[9, 60], [0, 64]])),
    "places": dict(causal=True, sinks=3, q_offset=torch.tensor([10, 0]), text_begin=torch.tensor([-1, 0])),
    "sliding": dict(causal=True, sliding_window=20),
    "full sliding": dict(sliding_window=9, key_range=torch.tensor([[5, 50], [0, 0]])),
    "softcap": dict(causal=True, softcap=3.0),
    "alibi": dict(causal=True, alibi_slopes=SLOPES),
    "numbers": dict(attn_mask="numbers"),
    "causal booleans": dict(causal=True, attn_mask="booleans", window=2),
    "negative scale": dict(causal=True, scale=-0.7),
}
PLACES = ("causal", "window", "sinks", "key_range", "q_offset", "text_begin", "attn_mask", "sliding_window")


def options_of(name):
    options = dict(OPTIONS[name])
    if "attn_mask" in options:
        generator = torch.Generator().manual_seed(0)
        shown = torch.rand(2, 1, N, N, generator=generator) < 0.7
        shown[0, :, 3] = False  # a row that sees nothing
        numbers = 3 * torch.randn(2, 1, N, N, generator=generator).masked_fill(~shown, -torch.inf)
        options["attn_mask"] = shown if options["attn_mask"] == "booleans" else numbers
    return options


def shares_of_dropped(inputs, options):
    """[B, Hq, Nq] of the whole mass of each row, in float64; the share of the pairs that were kept."""
    if "q_offset" in options:
        q, k, v, a, b = inputs
        inputs = q[:, :, :50], k, v, a[:, :, :50], b
    whole = gated_attention(*inputs, mode="log", tau=0.0, return_lse=True, return_kept=True, **options)
    skipped = gated_attention(*inputs, mode="log", return_lse=True, return_kept=True, **options)
    share = -torch.expm1((skipped[1] - whole[1]).masked_fill(whole[1] == -torch.inf, 0))
    return share, float(skipped[2].sum() / whole[2].sum())


def exact_inputs(gates=1.0, scores=1.0, seed=0):
    q, k, v, a, b = random_inputs(n_q=N, n_k=N, head_dim=8, head_dim_v=1, dtype=torch.float64, seed=seed)
    return [q * scores, k * scores, v, a * gates, b * gates]


@pytest.mark.parametrize("gates", [1.0, 8.0, 30.0])
@pytest.mark.parametrize("scores", [0.1, 3.0])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_a_bound(name, scores, gates):
    for seed in range(2):
        share, _ = shares_of_dropped(exact_inputs(gates, scores, seed), options_of(name))
        assert share.max() <= SHARE


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"full sliding"}))
def test_wide_gates_drop_pairs(name):
    _, kept = shares_of_dropped(exact_inputs(30.0, 0.3), options_of(name))
    assert kept < 0.99


def test_gates_that_fall_with_distance_leave_a_band():
    """Forget gates: z_ij is the sum of the log-gates between query and key."""
    q, k, v, *_ = random_inputs(n_q=80, n_k=80, dtype=torch.float64)
    decay = torch.arange(80.0, dtype=torch.float64) - 40
    inputs = (0.3 * q, 0.3 * k, v, -decay.expand(2, 4, 80), decay.expand(2, 2, 80))
    share, kept = shares_of_dropped(inputs, dict(causal=True))
    assert share.max() <= SHARE
    assert kept < 0.6


def aligned(size, gap, count):
    """One head in which witnesses have the lowest score and all keys to be dropped the highest: the bound is tight."""
    q = torch.zeros(1, 1, N, 4, dtype=torch.float64)
    q[..., 0] = size
    k = torch.zeros(1, 1, N, 4, dtype=torch.float64)
    k[..., 0] = -1.0
    k[..., 1 : count + 1, 0] = 1.0
    a, b = torch.zeros(1, 1, N, dtype=torch.float64), torch.zeros(1, 1, N, dtype=torch.float64)
    b[..., 1 : count + 1] = -gap
    return q, k, torch.randn(1, 1, N, 4, dtype=torch.float64), a, b


@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("size", [0.0, 4.0, 9.0])
def test_scores_on_the_bound_do_not_break_it(size, count):
    kept, shares = [], []
    for gap in torch.arange(0.0, 40.0, 0.5):
        share, part = shares_of_dropped(aligned(size, float(gap), count), dict(scale=1.0))
        shares.append(share.max())
        kept.append(part)
    assert max(shares) <= SHARE
    assert kept[0] == 1  # nothing may go while gates are open ..
    assert kept[-1] < 1  # .. and shut ones do
    # Sooner or later: within what the other keys add to the mass, and the mean key to the bound.
    assert max(shares) > SHARE / 1e4


def test_what_is_not_a_number_keeps_its_pairs():
    for place in (0, 1, 3, 4):  # a value that is dropped is not read
        inputs = random_inputs(n_q=N, n_k=N)
        inputs = [*inputs[:3], *(30 * x for x in inputs[3:])]
        inputs[place] = inputs[place].clone()
        inputs[place][0, 0, 5] = torch.nan
        found = gated_attention(*inputs, mode="log", causal=True)
        wanted = gated_attention(*inputs, mode="log", causal=True, tau=0.0)
        assert torch.equal(found.isnan(), wanted.isnan())
        torch.testing.assert_close(found, wanted, equal_nan=True, atol=4 * SHARE, rtol=1e-4)
    inputs = random_inputs(n_q=N, n_k=N)
    inputs[1][0, 0, 5] = torch.inf
    assert gated_attention(*inputs, mode="log", return_kept=True)[1][0, 0] == N * N


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_values_and_gradients_are_those_of_all_pairs(dtype, device):
    inputs = [x.double() for x in random_inputs(n_q=N, n_k=N, dtype=dtype, device=device)]
    inputs = [x.to(dtype if x.dim() == 4 else y.dtype) for x, y in zip(inputs, random_inputs(dtype=dtype), strict=True)]
    inputs = [*inputs[:3], *(20 * x for x in inputs[3:])]
    results = []
    for tau in (None, 0.0):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = gated_attention(*leaves, mode="log", causal=True, tau=tau)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for found, wanted in zip(*results, strict=True):
        error = 8 * SHARE + 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(found, wanted, rtol=error, atol=error * float(wanted.detach().abs().max()))


def test_the_gradient_is_that_of_the_pairs_that_are_kept():
    inputs = exact_inputs(20.0)
    tau = choose_threshold(inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: gated_attention(*x, mode="log", causal=True), leaves, fast_mode=True)
    given = gated_attention(*inputs, mode="log", causal=True, tau=tau)
    assert torch.equal(gated_attention(*inputs, mode="log", causal=True), given)


def choose_threshold(inputs):
    from torch_sluice.skipping import skip_logit_tau

    q, k, _, a, b = inputs
    tau = skip_logit_tau(q, k, a, b, scale=q.shape[3] ** -0.5, causal=True).sigmoid()
    assert 0 < choose_pairs(a, b, causal=True, tau=tau)[1].sum() < choose_pairs(a, b, causal=True)[1].sum()
    return tau


def test_it_is_for_log_alone_and_not_where_a_threshold_is_given():
    inputs = exact_inputs(30.0)
    for options in (dict(), dict(mode="post"), dict(mode="log", tau=0.0)):
        assert gated_attention(*inputs, return_kept=True, **options)[1].eq(N * N).all()
    few = [x[:, :, :4] for x in inputs]
    assert gated_attention(few[0], *inputs[1:3], few[3], inputs[4], mode="log", return_kept=True)[1].eq(4 * N).all()


def test_transformed_compiled_and_packed():
    inputs = [x.float() for x in exact_inputs(20.0)]

    def loss(*tensors):
        return gated_attention(*tensors, mode="log", causal=True).square().sum()

    leaves = [x.clone().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(grad(loss, tuple(range(5)))(*inputs), wanted, strict=True):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(vmap(loss)(*(x[None] for x in inputs)), loss(*inputs)[None])
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    q, k, v, a, b = (x[0].transpose(0, 1) for x in inputs)
    out = gated_attention_varlen(q, k, v, a, b, torch.tensor([0, N]), causal=True, mode="log")
    alone = gated_attention(*(x[:1] for x in inputs), causal=True, mode="log")
    assert torch.equal(out, alone[0].transpose(0, 1))
