"""The logarithm of a row's softmax sum, with its gradient, and what is made of it: sink logits, parts of the keys."""

import pytest
import torch
from support.attention import formula, random_inputs
from support.devices import DEVICES
from support.errors import assert_close_as_torch
from torch.func import grad, vmap

from torch_sluice import gated_attention

OPTIONS = {
    "plain": dict(),
    "causal": dict(causal=True, tau=0.4),
    "near": dict(causal=True, tau=0.6, window=5, sinks=2),
    "padding": dict(causal=True, tau=0.5, key_range=torch.tensor([[3, 30], [0, 33]])),
    "empty rows": dict(tau=0.9999),
    "places": dict(causal=True, tau=0.5, sinks=2, q_offset=torch.tensor([0, 0]), text_begin=torch.tensor([-4, 0])),
}
NAMES = ("dq", "dk", "dv", "da", "db")


def gradients(function, inputs, dout, dlse, options):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out, lse = function(*leaves, **options)
    kept = lse != -torch.inf  # the formula's derivative is NaN where nothing is kept
    total = (out * dout.to(out.dtype)).sum() if dout is not None else 0
    total = total + (torch.where(kept, lse, 0) * dlse.to(lse.dtype)).sum()
    return torch.autograd.grad(total, leaves, allow_unused=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("alone", [False, True], ids=["with out", "alone"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_to_it_are_those_of_the_formula(name, alone, dtype, device):
    options = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in OPTIONS[name].items()}
    inputs = random_inputs(dtype=dtype, device=device)
    dout = None if alone else torch.randn(2, 4, 33, 16, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    dlse = torch.randn(2, 4, 33, generator=torch.Generator().manual_seed(2)).to(device)
    found = gradients(lambda *x, **o: gated_attention(*x, return_lse=True, **o), inputs, dout, dlse, options)
    exact = [x.double() for x in inputs]
    truth = gradients(lambda *x, **o: formula(*x, **o, choice_dtype=inputs[3].dtype), exact, dout, dlse, options)
    peer = gradients(lambda *x, **o: formula(*x, **o), inputs, dout, dlse, options)
    for tensor, got, want, theirs in zip(NAMES, found, truth, peer, strict=True):
        if alone and tensor in ("dv", "da", "db"):  # it has nothing to do with them
            assert got is None or not got.any()
            continue
        assert_close_as_torch(tensor, got, want.nan_to_num(0), theirs.nan_to_num(0))


def test_numerical_derivatives_agree():
    inputs = [x.requires_grad_() for x in random_inputs(1, 2, 1, 5, 7, 4, 3, torch.float64)]
    options = dict(causal=True, tau=0.5, window=1, return_lse=True)
    assert torch.autograd.gradcheck(lambda *x: gated_attention(*x, **options), inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_a_logit_without_a_value_is_a_factor(device):
    """Softmax over the kept scores and one more, as gpt-oss has it, with the gradient of that one."""
    q, k, v, a, b = random_inputs(device=device)
    sinks = torch.tensor([-1.0, 0.0, 2.0, 30.0], device=device)

    def by_factor(q, k, v, a, b, sinks):
        out, lse = gated_attention(q, k, v, a, b, causal=True, tau=0.4, return_lse=True)
        return out * (lse - sinks[:, None]).sigmoid()[..., None]

    def by_softmax(q, k, v, a, b, sinks):
        k, v, b = (x.repeat_interleave(2, 1) for x in (k, v, b))
        z = a[..., None] + b[..., None, :]
        i, j = torch.arange(33, device=device)[:, None], torch.arange(33, device=device)
        kept = ((z.sigmoid() >= 0.4) | (i == j)) & (j <= i)
        scores = (q @ k.mT / 4).masked_fill(~kept, -torch.inf)
        scores = torch.cat((scores, sinks[:, None, None].expand(2, 4, 33, 1)), -1)
        return scores.softmax(-1)[..., :-1] * z.sigmoid() @ v

    results = []
    for function in (by_factor, by_softmax):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, a, b, sinks)]
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_parts_of_the_keys_are_put_together(device):
    inputs = random_inputs(n_k=50, device=device)

    def whole(q, k, v, a, b):
        return gated_attention(q, k, v, a, b, tau=0.4)

    def parts(q, k, v, a, b):
        results = [
            gated_attention(q, *x, a, y, tau=0.4, return_lse=True)
            for *x, y in zip(k.split(20, 2), v.split(20, 2), b.split(20, 2), strict=True)
        ]
        out, lse = (torch.stack(each) for each in zip(*results, strict=True))
        return (out * lse.softmax(0)[..., None]).sum(0)

    results = []
    for function in (whole, parts):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-4)


def test_under_transforms_and_compiled():
    inputs = random_inputs()
    options = dict(causal=True, tau=0.4, return_lse=True)

    def loss(*tensors):
        out, lse = gated_attention(*tensors, **options)
        return out.square().sum() + lse.square().sum()

    def alone(*tensors):
        return gated_attention(*tensors, **options)[1].square().sum()

    for function in (loss, alone):
        leaves = [x.clone().requires_grad_() for x in inputs]
        want = torch.autograd.grad(function(*leaves), leaves[:2])
        for got in (grad(function, (0, 1))(*inputs), vmap(grad(function, (0, 1)))(*(x[None] for x in inputs))):
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x.view_as(y), y)
        leaves = [x.clone().requires_grad_() for x in inputs]
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves[:2]), want, strict=True):
            torch.testing.assert_close(x, y)


def test_a_wrong_gradient_is_named():
    q, k, v, a, b = random_inputs()
    out, lse = gated_attention(q, k, v, a, b, return_lse=True)
    rest = (q, k, v, a, b, *[None] * 8, out, lse, False, 0, 0, 0, 0.0, 0.0, 0.25, False)
    with pytest.raises((ValueError, RuntimeError), match=r"dlse is .*expected \[batch, heads_q, n_q\]"):
        torch.ops.sluice.gated_attention_backward(out, lse[:, :, 1:], *rest)
