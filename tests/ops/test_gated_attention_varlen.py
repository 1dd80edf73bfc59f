"""Packed sequences against each of them alone."""

import pytest
import torch
from support.devices import DEVICES

from torch_sluice import gated_attention, gated_attention_varlen

LENGTHS = [
    [(5, 5), (5, 5), (1, 1), (0, 0), (17, 17), (17, 17), (3, 3)],
    [(2, 9), (0, 4), (4, 0), (7, 7), (1, 30)],
    [(40, 40)],
    [(0, 0), (0, 0)],
]
OPTIONS = {
    "open": dict(),
    "causal": dict(causal=True, tau=0.5, window=2, sinks=1),
    "heads": dict(causal=True, tau=torch.tensor([0.0, 0.3, 0.5, 0.9])),
    "density": dict(causal=True, density=0.4),
    "post": dict(causal=True, tau=0.5, mode="post"),
    "scale": dict(tau=0.5, scale=0.9),
}


def draw(lengths, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    n_q, n_k = (sum(each) for each in zip(*lengths, strict=True))
    shapes = [(n_q, 4, 16), (n_k, 2, 16), (n_k, 2, 8), (n_q, 4), (n_k, 2)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs = [x.to(device, dtype if x.dim() == 3 else torch.float32) for x in inputs]
    ends = [torch.tensor([0, *each]).cumsum(0).to(device) for each in zip(*lengths, strict=True)]
    return inputs, ends


def one_by_one(inputs, lengths, **options):
    outs, lses, ends = [], [], [0, 0]
    for n_q, n_k in lengths:
        rows = [(ends[side], ends[side] + n) for side, n in ((0, n_q), (1, n_k))]
        ends = [end for _, end in rows]
        q, k, v, a, b = (
            x[slice(*rows[side])].transpose(0, 1)[None] for x, side in zip(inputs, (0, 1, 1, 0, 1), strict=True)
        )
        out, lse = gated_attention(q, k, v, a, b, return_lse=True, **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, -1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_each_sequence_is_what_it_is_alone(lengths, name, device):
    options = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in OPTIONS[name].items()}
    inputs, ends = draw(lengths, device=device)
    results = []
    for function in (
        lambda *x: gated_attention_varlen(*x, *ends, return_lse=True, **options),
        lambda *x: one_by_one(x, lengths, **options),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, lse = function(*leaves)
        assert out.shape == (len(inputs[0]), 4, 8)
        assert lse.shape == (4, len(inputs[0]))
        total = (out * torch.arange(8.0, device=device)).sum() + lse.masked_fill(lse == -torch.inf, 0).square().sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True) if len(out) else ()
        results.append((out, lse, *gradients))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_one_cu_seqlens_is_for_both(dtype):
    inputs, (ends, _) = draw(LENGTHS[0])
    found = gated_attention_varlen(*inputs, ends.to(dtype), causal=True, tau=0.5)
    assert torch.equal(found, gated_attention_varlen(*inputs, ends, ends, causal=True, tau=0.5))


def test_thresholds_of_each_sequence():
    inputs, ends = draw(LENGTHS[1])
    tau = torch.linspace(0.1, 0.9, 20).view(5, 4)
    found = gated_attention_varlen(*inputs, *ends, tau=tau)
    for number in range(5):
        rows = slice(int(ends[0][number]), int(ends[0][number + 1]))
        alone = gated_attention_varlen(*inputs, *ends, tau=tau[number])
        torch.testing.assert_close(found[rows], alone[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    inputs, ends = draw(LENGTHS[0], dtype)
    out = gated_attention_varlen(*inputs, *ends, causal=True, tau=0.5)
    assert out.dtype == dtype
    expected, _ = one_by_one(inputs, LENGTHS[0], causal=True, tau=0.5)
    torch.testing.assert_close(out, expected)


BAD = {
    "q": (dict(q=torch.zeros(2, 2)), r"q has shape \[2, 2\], expected \[tokens, heads_q, head_dim\]"),
    "a": (dict(a=torch.zeros(3, 4)), "a has 3 tokens, expected those of q, which has 48"),
    "float": (dict(cu_seqlens_q=torch.tensor([0.0, 48.0])), "cu_seqlens_q is torch.float32 of shape .* expected int32"),
    "empty": (dict(cu_seqlens_q=torch.zeros(0, dtype=torch.int64)), r"expected int32 or int64 \[sequences \+ 1\]"),
    "short": (dict(cu_seqlens_q=torch.tensor([0, 47])), "from 0 to 47, expected 0 to 48, the number of tokens of q"),
    "late": (dict(cu_seqlens_q=torch.tensor([1, 48])), "goes from 1 to 48, expected 0 to 48"),
    "falls": (dict(cu_seqlens_q=torch.tensor([0, 30, 20, 48])), "falls from 30 to 20, expected numbers that never"),
    "count": (dict(cu_seqlens_k=torch.tensor([0, 48])), "cu_seqlens_k has 1 sequences, expected .* 7"),
    "tau": (dict(tau=torch.zeros(3, 4)), r"tau has shape \[3, 4\], expected .*\[sequences, heads_q\] = \[7, 4\]"),
    "keys": (dict(k=torch.zeros(3, 2, 16), v=torch.zeros(3, 2, 8), b=torch.zeros(3, 2)), "k has 3 tokens and q 48"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    (q, k, v, a, b), (ends, _) = draw(LENGTHS[0])
    changed, message = BAD[name]
    arguments = dict(q=q, k=k, v=v, a=a, b=b, cu_seqlens_q=ends) | changed
    with pytest.raises(ValueError, match=message):
        gated_attention_varlen(**arguments)
