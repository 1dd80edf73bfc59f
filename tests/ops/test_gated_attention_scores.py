"""What happens to scores between the product and the softmax: masks, biases that learn, slopes, caps, windows that cut.

Against the formula in eager torch, and against what torch itself computes where gates are open.
"""

import math

import pytest
import torch
from support.attention import formula_with_gradients, random_inputs
from support.errors import assert_close_as_torch
from torch.nn import functional as F

from torch_sluice import gated_attention

NAMES = ("out", "lse", "dq", "dk", "dv", "da", "db", "dattn_mask")
NEAR = (dict(), dict(tau=0.6), dict(causal=True, tau=0.6), dict(causal=True, tau=0.7, window=5, sinks=2))


def holes(*shape, share=0.3, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) >= share


def biases(*shape, dtype=torch.float32):
    bias = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    return bias.masked_fill(~holes(*shape), -math.inf).to(dtype)


def check(inputs, **options):
    mask = options.get("attn_mask")
    learns = mask is not None and mask.dtype != torch.bool
    leaves = [x.detach().requires_grad_() for x in inputs]
    ours = dict(options)
    if learns:
        ours["attn_mask"] = mask.detach().requires_grad_()
        leaves.append(ours["attn_mask"])
    out, lse = gated_attention(*leaves[:5], return_lse=True, **ours)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    found = out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)
    full = {name: x[(None,) * (4 - x.dim())] if name == "attn_mask" else x for name, x in options.items()}
    truth = formula_with_gradients(inputs, dout, exact=True, **full)
    peer = formula_with_gradients(inputs, dout, **full)
    for name, got, right, theirs in zip(NAMES[: len(found)], found, truth, peer, strict=True):
        if name == "dattn_mask":
            right, theirs = right.view_as(got), theirs.view_as(got)
        assert_close_as_torch(name, got, right, theirs, 2e-5 if inputs[0].dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("near", range(len(NEAR)))
@pytest.mark.parametrize(
    "shape", [(2, 4, 33, 33), (1, 4, 33, 33), (2, 1, 33, 33), (33, 33), (2, 1, 1, 33), (4, 33, 1), (1,)]
)
def test_a_bias_and_its_gradient(near, shape):
    check(random_inputs(), attn_mask=biases(*shape), **NEAR[near])


@pytest.mark.parametrize("near", range(len(NEAR)))
def test_a_boolean_mask_of_any_shape(near):
    for shape in ((2, 4, 33, 33), (33, 33), (2, 1, 1, 33)):
        check(random_inputs(), attn_mask=holes(*shape), **NEAR[near])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_biases_of_other_dtypes(dtype):
    for of_inputs in (torch.float32, torch.bfloat16):
        check(random_inputs(dtype=of_inputs), attn_mask=biases(1, 4, 33, 33, dtype=dtype), tau=0.5)


@pytest.mark.parametrize("near", range(len(NEAR)))
def test_slopes_caps_and_windows_that_cut(near):
    slopes = torch.tensor([0.5, 0.25, 0.0, 0.1])
    for options in (
        dict(alibi_slopes=slopes), dict(alibi_slopes=slopes.expand(2, 4)), dict(softcap=0.7), dict(softcap=30.0),
        dict(sliding_window=1), dict(sliding_window=9), dict(sliding_window=10**9),
        dict(sliding_window=12, softcap=2.0, alibi_slopes=slopes, attn_mask=biases(1, 4, 33, 33)),
    ):  # fmt: skip
        check(random_inputs(), **options, **NEAR[near])


def test_long_sequences_take_several_chunks():
    inputs = random_inputs(batch=1, heads=2, heads_kv=1, n_q=700, n_k=900, head_dim=8, head_dim_v=8)
    for options in (
        dict(attn_mask=biases(1, 2, 700, 900)), dict(sliding_window=300, window=20, sinks=4),
        dict(softcap=3.0, sliding_window=64), dict(attn_mask=holes(1, 1, 700, 900, share=0.9)),
    ):  # fmt: skip
        for causal in (True, False):
            check(inputs, causal=causal, tau=0.6, **options)
            check(inputs, causal=causal, **options)


def test_one_query_over_a_cache():
    for n_q in (1, 3):
        inputs = random_inputs(n_q=n_q, n_k=50)
        check(inputs, causal=True, tau=0.6, attn_mask=biases(2, 4, n_q, 50), softcap=5.0, sliding_window=20)
        check(inputs, causal=True, q_offset=torch.tensor([10, 47]), sliding_window=20, sinks=3, tau=0.9)


def test_open_gates_give_what_torch_gives():
    q, k, v, a, b = random_inputs(heads_kv=4)
    a, b = torch.full_like(a, 30.0), torch.full_like(b, 30.0)
    for mask in (holes(2, 4, 33, 33) | torch.eye(33, dtype=torch.bool), torch.randn(4, 33, 33)):
        found = gated_attention(q, k, v, a, b, attn_mask=mask)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_a_row_without_a_key_gives_zero_and_harms_no_other():
    mask = holes(2, 4, 33, 33)
    mask[:, :, 7] = False
    inputs = random_inputs()
    check(inputs, attn_mask=mask)
    out, lse = gated_attention(*inputs, attn_mask=mask, return_lse=True)
    assert not out[:, :, 7].any()
    assert torch.isneginf(lse[:, :, 7]).all()


def test_what_a_mask_hides_may_be_anything():
    """NaN and infinity behind a mask reach nobody, in values and gradients."""
    inputs = [x.clone() for x in random_inputs()]
    want = gated_attention(*inputs, attn_mask=(mask := holes(1, 1, 1, 33)))
    hidden = ~mask.flatten()
    inputs[1][:, :, hidden], inputs[2][:, :, hidden] = math.nan, math.inf
    leaves = [x.requires_grad_() for x in inputs]
    out = gated_attention(*leaves, attn_mask=mask)
    torch.testing.assert_close(out, want)
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert torch.isfinite(gradient).all()


def test_a_bias_with_nan_is_seen():
    bias = torch.zeros(33, 33)
    bias[3, 4] = math.nan
    out = gated_attention(*random_inputs(), attn_mask=bias)
    assert out[:, :, 3].isnan().all()
    assert not out[:, :, 4:].isnan().any()


def test_the_most_negative_number_hides_as_in_torch():
    """Masks of transformers are filled with it: where it hides all keys, all count alike."""
    q, k, v, a, b = random_inputs(heads_kv=4)
    a, b = torch.full_like(a, 30.0), torch.full_like(b, 30.0)
    mask = torch.zeros(33, 33).masked_fill(~holes(33, 33), torch.finfo(torch.float32).min)
    mask[5] = torch.finfo(torch.float32).min
    found = gated_attention(q, k, v, a, b, attn_mask=mask)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_a_bias_alone_may_learn():
    inputs, bias = random_inputs(), torch.randn(4, 33, 33, requires_grad=True)
    gated_attention(*inputs, attn_mask=bias, tau=0.5).square().sum().backward()
    assert bias.grad.abs().sum() > 0
    with torch.no_grad():
        assert not gated_attention(*inputs, attn_mask=bias).requires_grad


def test_the_same_bits_whatever_the_threads():
    inputs = random_inputs(heads=4, heads_kv=2, n_q=300, n_k=300)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            bias = biases(1, 1, 300, 300).requires_grad_()
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = gated_attention(*leaves, attn_mask=bias, tau=0.5, softcap=4.0)
            results.append((out, *torch.autograd.grad(out.square().sum(), [*leaves, bias])))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


def test_vmap_and_grad_over_masks():
    q, k, v, a, b = random_inputs()
    bias = torch.randn(3, 1, 4, 33, 33)

    def loss(bias, q):
        return gated_attention(q, k, v, a, b, attn_mask=bias, tau=0.5).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (0, None))(bias, q)
    for each, got in zip(bias, found, strict=True):
        leaf = each.clone().requires_grad_()
        torch.testing.assert_close(got, torch.autograd.grad(loss(leaf, q), leaf)[0])


def test_compiled():
    inputs, bias = random_inputs(), biases(1, 4, 33, 33)

    def run(bias, *inputs):
        return gated_attention(*inputs, attn_mask=bias, softcap=3.0, sliding_window=9, tau=0.5)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, want = bias.clone().requires_grad_(), bias.clone().requires_grad_()
    (x := compiled(found, *inputs)).square().sum().backward()
    (y := run(want, *inputs)).square().sum().backward()
    torch.testing.assert_close(x, y)
    torch.testing.assert_close(found.grad, want.grad)


@pytest.mark.parametrize("mode", ["post", "log"])
def test_modes_have_them_too(mode):
    q, k, v, a, b = random_inputs()
    options = dict(attn_mask=biases(1, 4, 33, 33), softcap=3.0, alibi_slopes=torch.full((4,), 0.1), sliding_window=20)
    z = a.unsqueeze(-1) + b.repeat_interleave(2, 1).unsqueeze(-2)
    scores = 3 * torch.tanh(q @ k.repeat_interleave(2, 1).mT / 12)
    distance = (torch.arange(33)[:, None] - torch.arange(33)).abs()
    scores = scores - 0.1 * distance + options["attn_mask"].masked_fill(distance >= 20, -math.inf)
    kept = z.sigmoid() >= 0.5
    if mode == "post":
        weights = scores.softmax(-1) * z.sigmoid() * kept
    else:
        weights = (scores + F.logsigmoid(z)).masked_fill(~kept, -math.inf).softmax(-1)
    weights = weights.nan_to_num()  # rows that keep nothing
    out = gated_attention(q, k, v, a, b, mode=mode, tau=0.5, **options)
    torch.testing.assert_close(out, weights @ v.repeat_interleave(2, 1), atol=1e-5, rtol=1e-4)


def test_density_counts_what_the_window_leaves():
    q, k, _, a, b = random_inputs(heads=2, heads_kv=2)
    v = torch.eye(33).expand(2, 2, 33, 33)

    def count(**choice):
        return (gated_attention(0 * q, k, v, a, b, causal=True, sliding_window=9, **choice) != 0).sum((2, 3))

    always = count(density=0.0)
    far = (count() - always).double()
    assert torch.equal(count(density=0.3) - always, (far * 0.3 - 1e-9).ceil().long())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(attn_mask=torch.zeros(2, 4, 33, 32)), r"attn_mask is .*expected \[batch, heads_q, n_q, n_k\]"),
        (dict(attn_mask=torch.zeros(1, 1, 1, 1, 1)), "attn_mask is .*expected a tensor that broadcasts"),
        (dict(attn_mask=torch.zeros(33, 33, dtype=torch.int64)), "attn_mask is torch.int64, expected booleans"),
        (dict(attn_mask=[[0.0]]), "attn_mask is list, expected a tensor"),
        (dict(softcap=-1.0), "softcap is -1, expected a finite number of at least 0"),
        (dict(softcap=math.inf), "softcap is inf, expected"),
        (dict(sliding_window=-3), "sliding_window is -3, expected at least 0"),
        (dict(alibi_slopes=torch.zeros(3)), r"alibi_slopes has shape \[3\], expected \[heads_q\]"),
        (dict(alibi_slopes=torch.zeros(4, dtype=torch.int32)), "alibi_slopes is torch.int32 .*expected floating-point"),
        (dict(alibi_slopes=torch.tensor([0.0, math.inf, 0.0, 0.0])), "alibi_slopes holds numbers that are not finite"),
        (dict(softcap=1e-300), "softcap is 1e-300, expected a finite number of at least 0; 0, or at least 1e-30"),
        (dict(sliding_window=2.5), "sliding_window is 2.5, expected an integer"),
        (dict(sliding_window=2**63), "sliding_window is 9223372036854775808, expected an integer"),
        (dict(attn_mask=torch.zeros(33, 33).to_sparse()), "attn_mask is sparse or nested, expected a dense tensor"),
        (dict(alibi_slopes=torch.zeros(4, requires_grad=True)), "alibi_slopes requires a gradient, expected constants"),
    ],
)
def test_bad_input_is_named(options, text):
    with pytest.raises(ValueError, match=text):
        gated_attention(*random_inputs(), **options)


def test_none_as_configs_have_it_and_slopes_of_a_batch_of_one():
    inputs, slopes = random_inputs(), torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    plain = gated_attention(*inputs)
    assert torch.equal(gated_attention(*inputs, softcap=None, sliding_window=None), plain)
    found = gated_attention(*inputs, alibi_slopes=slopes)
    assert torch.equal(found, gated_attention(*inputs, alibi_slopes=slopes[0]))


def test_density_counts_what_the_mask_shows():
    q, k, _, a, b = random_inputs(heads=2, heads_kv=2)
    v = torch.eye(33).expand(2, 2, 33, 33)
    mask = torch.zeros(33, 33, dtype=torch.bool)
    mask[:, :8] = True
    b[..., :8] -= 10  # the gate would rather have the others
    for shown in (mask, torch.zeros(33, 33).masked_fill(~mask, -math.inf), mask.expand(2, 2, 33, 33)):
        kept = (gated_attention(0 * q, k, v, a, b, density=0.25, attn_mask=shown) != 0).sum((2, 3))
        assert torch.equal(kept, torch.full((2, 2), 66))
