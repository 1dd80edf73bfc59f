"""The modes "post" and "log" against their formulas, and the bound on what "post" leaves out."""

import pytest
import torch
from support.attention import random_inputs
from support.devices import DEVICES
from torch.func import grad

from torch_sluice import dropped_bound, gated_attention

OPTIONS = {
    "open": dict(),
    "causal": dict(causal=True, tau=0.4),
    "near": dict(causal=True, tau=0.6, window=5, sinks=2),
    "full": dict(tau=0.6, window=3),
    "padding": dict(causal=True, tau=0.5, key_range=torch.tensor([[3, 30], [0, 33]])),
    "empty rows": dict(tau=0.9999),
    "heads": dict(causal=True, tau=torch.tensor([0.0, 0.3, 0.5, 0.9])),
}


def by_formula(mode, q, k, v, a, b, *, causal=False, tau=0.0, window=0, sinks=0, key_range=None):
    """out and lse of a dense computation."""
    group = q.shape[1] // k.shape[1]
    k, v, b = (x.repeat_interleave(group, 1) for x in (k, v, b))
    i, j = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    first = 0 if key_range is None else key_range[:, 0, None, None, None]
    near = ((i - j).abs() < window) | (j - first < sinks)
    g = torch.where(near, 1.0, (a[..., None] + b[..., None, :]).sigmoid())
    tau = torch.as_tensor(tau, device=q.device).view(1, -1, 1, 1)
    valid = torch.ones_like(g, dtype=torch.bool)
    if causal:
        valid = valid & (j <= i)
    if key_range is not None:
        valid = valid & (j >= first) & (j < key_range[:, 1, None, None, None])
    kept = (near | (g >= tau) | (causal and i == j)) & valid
    scores = q @ k.mT * q.shape[3] ** -0.5
    if mode == "log":
        scores, valid = scores + g.log(), kept
    empty = ~valid.any(-1, keepdim=True)
    softmax = scores.masked_fill(~valid & ~empty, -torch.inf).softmax(-1).masked_fill(~kept, 0)
    lse = scores.masked_fill(~valid, -torch.inf).logsumexp(-1)
    return (softmax if mode == "log" else softmax * g) @ v, lse


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["post", "log"])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_the_formula_with_its_gradients(name, mode, device):
    options = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in OPTIONS[name].items()}
    inputs, results = random_inputs(device=device), []
    for function in (
        lambda *x: gated_attention(*x, mode=mode, return_lse=True, **options),
        lambda *x: by_formula(mode, *x, **options),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, lse = function(*leaves)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
        results.append((out, lse, *torch.autograd.grad((out * dout).sum(), leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want.nan_to_num(0, posinf=0, neginf=-torch.inf), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["post", "log"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_types(mode, dtype):
    inputs = random_inputs(dtype=dtype)
    out = gated_attention(*inputs, mode=mode, causal=True, tau=0.4)
    assert out.dtype == dtype
    expected, _ = by_formula(mode, *(x.double() for x in inputs), causal=True, tau=0.4)
    error = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    assert (out.double() - expected).abs().max() <= error * expected.abs().max()


@pytest.mark.parametrize("mode", ["post", "log"])
def test_heads_as_wide_as_they_may_be(mode):
    inputs = random_inputs(head_dim_v=256)
    expected, _ = by_formula(mode, *inputs, causal=True, tau=0.4)
    torch.testing.assert_close(
        gated_attention(*inputs, mode=mode, causal=True, tau=0.4), expected, atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("seed", range(20))
def test_what_post_leaves_out_is_within_its_bound(seed):
    """Whatever the scores are: the more they favour what is dropped, the closer the bound."""
    q, k, v, a, b = random_inputs(heads=2, seed=seed)
    tau = 0.02 + 0.04 * seed
    worst = []
    for scale in (0.25, 30.0):
        options = dict(mode="post", causal=seed % 2 == 0, scale=scale)
        difference = gated_attention(q, k, v, a, b, tau=tau, **options) - gated_attention(q, k, v, a, b, **options)
        share = difference.norm(dim=-1).amax(-1) / dropped_bound(v, tau)
        assert share.max() <= 1 + 1e-5
        worst.append(share.max())
    assert max(worst) > 0.3  # it says something


def test_the_bound_is_by_head_and_batch_element():
    v = torch.randn(2, 3, 7, 4)
    torch.testing.assert_close(dropped_bound(v, 0.5), 0.5 * v.norm(dim=-1).amax(-1))
    torch.testing.assert_close(dropped_bound(v, torch.tensor([0.1, 0.2, 0.3]))[1, 2], 0.3 * v[1, 2].norm(dim=-1).max())
    assert dropped_bound(v[:, :, :0], 0.5).tolist() == [[0.0] * 3] * 2
    with pytest.raises(ValueError, match="v has shape"):
        dropped_bound(v[0], 0.5)


@pytest.mark.parametrize("mode", ["post", "log"])
def test_transformed_and_compiled(mode):
    inputs = random_inputs()

    def loss(*tensors):
        return gated_attention(*tensors, mode=mode, causal=True, tau=0.4).square().sum()

    leaves = [x.clone().requires_grad_() for x in inputs]
    want = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(grad(loss, tuple(range(5)))(*inputs), want, strict=True):
        torch.testing.assert_close(x, y)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in inputs]
    for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), want, strict=True):
        torch.testing.assert_close(x, y)


def test_log_is_computed_in_float32_under_autocast():
    q, k, _, a, b = random_inputs(n_q=40, n_k=40)
    v = torch.eye(40).expand(2, 2, 40, 40)
    with torch.autocast("cpu", torch.bfloat16):
        outs = {mode: gated_attention(q, k, v, a, b, mode=mode, tau=0.3) for mode in ("select", "post", "log")}
        gated = gated_attention(q, k, v, a, b, mode="post", tau=0.3, output_gate=torch.ones(2, 4, 40))
    assert {x.dtype for x in (*outs.values(), gated)} == {torch.bfloat16}
    exact = gated_attention(q, k, v, a, b, mode="log", tau=0.3)
    torch.testing.assert_close(outs["log"], exact.bfloat16())
