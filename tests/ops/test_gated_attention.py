"""torch_sluice.gated_attention against the formula in eager torch: values, gradients, precision, repeatability."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention import formula, formula_with_gradients, random_inputs
from support.devices import DEVICES
from support.errors import assert_close_as_torch

from torch_sluice import gated_attention

NAMES = ("out", "lse", "dq", "dk", "dv", "da", "db")


def run(inputs, dout, **options):
    """(out, lse, dq, dk, dv, da, db) of the operator."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = gated_attention(*leaves, return_lse=True, **options)
    return out.detach(), lse, *torch.autograd.grad(out, leaves, dout.to(out.dtype))


def rounding_floor(inputs, dout, out, scale):
    """Rounding error of the terms whose differences dq and dk are: P (g <dout, v> - <dout, out>), times k or q."""
    q, k, v, _, _ = inputs
    terms = dout.abs().amax() * max(v.abs().amax(), out.abs().amax()) * v.shape[3] * scale
    return float(torch.finfo(q.dtype).eps * terms * max(q.abs().amax(), k.abs().amax()))


def compare(inputs, *, cancels=False, **options):
    """``cancels``: the gradients of q and k may be 0, as those of a row of one key are, but for rounding."""
    q, _, v, _, _ = inputs
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(*q.shape[:3], v.shape[3], generator=generator).to(q.device, q.dtype)
    actual = run(inputs, dout, **options)
    truth = formula_with_gradients(inputs, dout, exact=True, **options)
    peer = formula_with_gradients(inputs, dout, **options)
    floor = rounding_floor(inputs, dout, actual[0], q.shape[3] ** -0.5) if cancels and actual[0].numel() else 0.0
    for name, ours, right, theirs, like in zip(NAMES, actual, truth, peer, (q, inputs[3], *inputs), strict=True):
        assert ours.dtype == like.dtype
        assert_close_as_torch(name, ours, right, theirs, floor if name in ("dq", "dk") else 0.0)


OPTIONS = {
    "seed formula": dict(),
    "causal": dict(causal=True),
    "threshold": dict(tau=0.5),
    "causal threshold": dict(causal=True, tau=0.4),
    "window and sinks": dict(causal=True, tau=0.6, window=5, sinks=2),
    "full window": dict(tau=0.6, window=4, sinks=1),
    "scale": dict(causal=True, tau=0.3, scale=0.7),
    "padding": dict(causal=True, tau=0.5, window=3, key_range=torch.tensor([[3, 30], [0, 33]])),
    "tau per head": dict(causal=True, tau=torch.tensor([0.0, 0.3, 0.5, 0.9])),
    "everything dropped": dict(tau=0.9999),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_agrees_with_formula(name, dtype, device):
    options = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in OPTIONS[name].items()}
    compare(random_inputs(dtype=dtype, device=device), **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(n_q=1, n_k=1),
        dict(n_q=1, n_k=70),  # decoding
        dict(n_q=5, n_k=70),
        dict(n_q=70, n_k=5),  # queries before the first key
        dict(n_q=130, n_k=130, batch=1, heads=2, heads_kv=1),
        dict(head_dim=1, head_dim_v=1),
        dict(head_dim=40, head_dim_v=24),
        dict(n_q=9, n_k=9, head_dim=256, head_dim_v=256),
        dict(n_q=9, n_k=9, heads=8, heads_kv=8),
        dict(n_q=9, n_k=9, heads=6, heads_kv=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("causal", [False, True])
def test_sizes(sizes, causal, dtype, device):
    one_key = sizes.get("n_k") == 1
    compare(random_inputs(**sizes, dtype=dtype, device=device), cancels=one_key, causal=causal, tau=0.5, window=2)


@pytest.mark.parametrize("device", DEVICES)
def test_across_sorted_chunks(device):
    """Longer than the chunk in which keys are sorted, with unequal chunks."""
    inputs = random_inputs(batch=1, heads=2, heads_kv=1, n_q=1100, n_k=1100, head_dim=32, device=device)
    compare(inputs, causal=True, tau=0.6, window=8)


@pytest.mark.parametrize("device", DEVICES)
def test_huge_gate_logits(device):
    q, k, v, a, b = random_inputs(device=device)
    a[0, 0, 3], a[0, 1, 4], b[1, 0, 5], b[1, 1, 6] = 1e30, -1e30, math.inf, -math.inf
    a[1, 2, 7], b[0, 1, 8] = 39.5, -39.5
    compare((q, k, v, a, b), causal=True, tau=0.4)


@pytest.mark.parametrize("n", [3, 40])
def test_scores_beyond_float32(n):
    """Of finite inputs: the formula's row, in which the largest score takes all, where float32 has inf - inf."""
    inputs = random_inputs(batch=1, heads=2, heads_kv=1, n_q=n, n_k=n, head_dim=8)
    q, k, *_ = inputs
    q[0, 0, 1], k[0, 0, 2] = 1e30, 1e30
    assert (q @ k.mT).isinf().any()
    dout = torch.ones(1, 2, n, 16)
    found, truth = run(inputs, dout, tau=0.3), formula_with_gradients(inputs, dout, exact=True, tau=0.3)
    for name, ours, right in zip(NAMES, found, truth, strict=True):
        assert ours.isfinite().all() or name == "lse", name
        if name not in ("dq", "dk"):  # differences of terms of 1e30
            torch.testing.assert_close(ours.double(), right.float().double(), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("device", DEVICES)
def test_row_that_keeps_nothing(device):
    q, k, v, a, b = random_inputs(device=device)
    a[:, :, 7] = -30.0
    out, lse, dq, _, _, da, _ = run((q, k, v, a, b), torch.ones_like(q), tau=0.5)
    assert (out[:, :, 7] == 0).all()
    assert (lse[:, :, 7] == -math.inf).all()
    assert (dq[:, :, 7] == 0).all()
    assert (da[:, :, 7] == 0).all()
    compare((q, k, v, a, b), tau=0.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", range(5), ids="qkvab")
def test_nan_and_infinity_reach_only_what_they_touch(which, value, device):
    inputs = random_inputs(batch=1, heads=2, heads_kv=1, n_q=20, n_k=20, head_dim=8, head_dim_v=8, device=device)
    inputs[which].flatten()[inputs[which].numel() // 2] = value
    for tau in (0.0, 0.6):
        options = dict(causal=True, tau=tau, window=2)
        out = gated_attention(*inputs, **options)
        truth, _ = formula(*(x.double() for x in inputs), **options, choice_dtype=torch.float32)
        peer, _ = formula(*inputs, **options)
        assert_close_as_torch("out", out, truth, peer)
        assert out.isfinite().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [dict(batch=0), dict(n_q=0), dict(n_k=0), dict(n_q=0, n_k=0)], ids=str)
def test_empty(sizes, device):
    inputs = random_inputs(**sizes, device=device)
    dout = torch.ones(*inputs[0].shape[:3], inputs[2].shape[3], device=device)
    out, lse, *gradients = run(inputs, dout, causal=True, tau=0.5)
    assert out.shape == (*inputs[0].shape[:3], 16)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    for gradient, like in zip(gradients, inputs, strict=True):
        assert gradient.shape == like.shape
        assert (gradient == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_strides(device):
    """Transposed, sliced, reversed in memory and expanded inputs mean what their contiguous copies mean."""
    q, k, v, a, b = random_inputs(n_q=33, n_k=33, device=device)
    views = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat((k, k), -1)[..., 16:],
        v.transpose(2, 3).contiguous().transpose(2, 3),  # the last stride is not 1
        a.repeat_interleave(2, -1)[..., ::2],
        b.flip(-1).contiguous().flip(-1),
    )
    dout = torch.randn_like(q).transpose(2, 3).contiguous().transpose(2, 3)
    options = dict(causal=True, tau=0.5, window=2)
    for ours, theirs in zip(run(views, dout, **options), run((q, k, v, a, b), dout, **options), strict=True):
        assert torch.equal(ours, theirs)

    expanded = (
        q[:1, :1].expand_as(q), k[:1].expand_as(k), v[:, :1].expand_as(v), a[:1].expand_as(a), b[:, :, :1].expand_as(b)
    )  # fmt: skip
    copies = [x.contiguous() for x in expanded]
    assert torch.equal(gated_attention(*expanded, **options), gated_attention(*copies, **options))


def test_strides_beyond_32_bits():
    tokens, stride = 3, 1 << 30
    storage = torch.empty((tokens - 1) * stride + 8, dtype=torch.bfloat16)  # only three pages of it are touched
    k = storage.as_strided((1, 1, tokens, 8), (stride, stride, stride, 1))
    q, dense, v, a, b = random_inputs(batch=1, heads=1, heads_kv=1, n_q=3, n_k=3, head_dim=8, dtype=torch.bfloat16)
    k.copy_(dense)
    assert torch.equal(gated_attention(q, k, v, a, b), gated_attention(q, dense, v, a, b))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tau", [0.0, 0.45])
def test_gradcheck(causal, tau, device):
    sizes = dict(batch=1, heads=4, heads_kv=2, n_q=5, n_k=7, head_dim=3, head_dim_v=2)
    inputs = [x.requires_grad_() for x in random_inputs(**sizes, dtype=torch.float64, device=device)]

    def attention(*leaves):
        return gated_attention(*leaves, causal=causal, tau=tau, window=2, sinks=1)

    assert torch.autograd.gradcheck(attention, inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_with_any_number_of_threads(device):
    inputs = random_inputs(batch=2, heads=4, heads_kv=2, n_q=300, n_k=300, head_dim=32, device=device)
    dout = torch.randn_like(inputs[0])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(run(inputs, dout[..., :16], causal=True, tau=0.5, window=4))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for name, ours, first in zip(NAMES, result, results[0], strict=True):
            assert torch.equal(ours, first), name


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_some_inputs_only(device):
    q, k, v, a, b = random_inputs(device=device)
    a.requires_grad_()
    out = gated_attention(q, k, v, a, b, tau=0.5)
    (da,) = torch.autograd.grad(out.sum(), a)
    assert torch.equal(da, run((q, k, v, a, b), torch.ones_like(q), tau=0.5)[5])


@pytest.mark.parametrize("device", DEVICES)
def test_inference_path_gives_the_same_bits(device):
    inputs = random_inputs(device=device)
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        without = gated_attention(*leaves, causal=True, tau=0.5)
    with torch.inference_mode():
        inference = gated_attention(*inputs, causal=True, tau=0.5)
    recorded = gated_attention(*leaves, causal=True, tau=0.5)
    assert recorded.requires_grad
    assert not without.requires_grad
    assert torch.equal(without, recorded)
    assert torch.equal(inference, recorded)


@st.composite
def cases(draw):
    heads_kv = draw(st.integers(1, 3))
    sizes = dict(
        batch=draw(st.integers(0, 2)), heads=heads_kv * draw(st.integers(1, 3)), heads_kv=heads_kv,
        n_q=draw(st.integers(0, 40)), n_k=draw(st.integers(0, 40)), head_dim=draw(st.integers(1, 33)),
        head_dim_v=draw(st.integers(1, 33)), seed=draw(st.integers(0, 1000)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    )  # fmt: skip
    options = dict(
        causal=draw(st.booleans()), tau=draw(st.sampled_from([0.0, 0.2, 0.5, 0.8, 0.999])),
        window=draw(st.sampled_from([0, 1, 2, 7, 100])), sinks=draw(st.sampled_from([0, 1, 5, 100])),
    )  # fmt: skip
    if draw(st.booleans()):
        ends = [sorted(draw(st.tuples(*[st.integers(0, sizes["n_k"])] * 2))) for _ in range(sizes["batch"])]
        options["key_range"] = torch.tensor(ends, dtype=torch.long).reshape(-1, 2)
    return sizes, options, draw(st.sampled_from([0.0, 0.3, 3.0, 30.0]))


@settings(max_examples=60)
@given(cases())
def test_fuzz(case):
    sizes, options, gate_spread = case
    q, k, v, a, b = random_inputs(**sizes)
    compare((q, k, v, a * gate_spread, b * gate_spread), cancels=True, **options)
