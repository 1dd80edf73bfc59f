"""What happens behind the softmax: the gate on the output, and dropout. Against their compositions in eager torch."""

import math

import pytest
import torch
from support.attention import formula, random_inputs
from support.errors import assert_close_as_torch

from torch_sluice import gated_attention, gated_attention_varlen

NEAR = (dict(), dict(causal=True, tau=0.6), dict(causal=True, tau=0.7, window=5, sinks=2))


def gates(q, v, channels, dtype=None):
    shape = {0: q.shape[:3], 1: (*q.shape[:3], 1)}.get(channels, (*q.shape[:3], v.shape[3]))
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype or q.dtype)


def results(function, leaves):
    out = function(*leaves)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def multiplied(out, gate):
    return out * (gate.unsqueeze(-1) if gate.dim() == 3 else gate).sigmoid()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("near", range(len(NEAR)))
@pytest.mark.parametrize("channels", [0, 1, 16])
def test_an_output_gate_and_its_gradient(channels, near, dtype):
    inputs = random_inputs(dtype=dtype)
    inputs = (*inputs, gates(inputs[0], inputs[2], channels))

    def ours(q, k, v, a, b, gate):
        return gated_attention(q, k, v, a, b, output_gate=gate, **NEAR[near])

    def theirs(q, k, v, a, b, gate):
        return multiplied(formula(q, k, v, a, b, choice_dtype=inputs[3].dtype, **NEAR[near])[0], gate)

    found = results(ours, [x.clone().requires_grad_() for x in inputs])
    peer = results(theirs, [x.clone().requires_grad_() for x in inputs])
    exact = results(theirs, [x.double().requires_grad_() for x in inputs])
    names = ("out", "dq", "dk", "dv", "da", "db", "doutput_gate")
    floor = {torch.float64: 1e-9, torch.float32: 2e-5}.get(dtype, 5e-2)
    for name, got, right, other in zip(names, found, exact, peer, strict=True):
        assert_close_as_torch(name, got, right, other, floor)


@pytest.mark.parametrize("n_q", [1, 4, 40, 300])
def test_few_rows_and_many(n_q):
    inputs = random_inputs(n_q=n_q, n_k=300)
    gate = gates(inputs[0], inputs[2], 16)
    found = gated_attention(*inputs, output_gate=gate, causal=True, tau=0.6)
    torch.testing.assert_close(found, multiplied(gated_attention(*inputs, causal=True, tau=0.6), gate))


def test_layouts_dtypes_and_modes():
    inputs = random_inputs()
    plain = gated_attention(*inputs, tau=0.5)
    gate = torch.randn(2, 33, 4, 32)[..., ::2].transpose(1, 2)
    torch.testing.assert_close(gated_attention(*inputs, tau=0.5, output_gate=gate), multiplied(plain, gate))
    torch.testing.assert_close(gated_attention(*inputs, tau=0.5, output_gate=gate.double()), multiplied(plain, gate))
    for mode in ("post", "log"):
        found = gated_attention(*inputs, tau=0.5, mode=mode, output_gate=gate)
        torch.testing.assert_close(found, multiplied(gated_attention(*inputs, tau=0.5, mode=mode), gate))
    with torch.autocast("cpu", torch.bfloat16):
        found = gated_attention(*inputs, tau=0.5, output_gate=gate)
    assert found.dtype == torch.bfloat16


def test_a_gate_that_is_shut_or_broken():
    """A shut gate gives 0 and finite gradients; NaN in a gate stays in its row; NaN in v is in the rows that see it."""
    q, k, v, a, b = random_inputs()
    gate = gates(q, v, 16)
    gate[:, :, 3] = -math.inf
    leaves = [x.clone().requires_grad_() for x in (q, k, v, a, b)]
    out = gated_attention(*leaves, output_gate=gate)
    assert not out[:, :, 3].any()
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert gradient.isfinite().all()
    gate[0, 0, 5, 2] = math.nan
    assert gated_attention(q, k, v, a, b, output_gate=gate).isnan().sum() == 1
    v[:, :, 2] = math.nan
    out = gated_attention(q, k, v, a, b, causal=True, output_gate=gates(q, v, 1))
    assert out[:, :, 2:].isnan().all()
    assert out[:, :, :2].isfinite().all()


def kept_pairs(q, n_k, dropout_p, **options):
    """[B, Hq, Nq, Nk], 1 / (1 - p) or 0: out over values of ones of one key each, without a gate, to that without."""
    k = torch.zeros(q.shape[0], 2, n_k, q.shape[3], dtype=q.dtype)
    v = torch.eye(n_k, dtype=q.dtype).expand(q.shape[0], 2, -1, -1)
    a, b = (torch.full((*x.shape[:3],), 30.0) for x in (q, k))
    return gated_attention(q, k, v, a, b, dropout_p=dropout_p, **options) * n_k


@pytest.mark.parametrize("near", range(len(NEAR)))
def test_dropout_is_that_of_the_formula(near):
    """The same seed drops the same pairs in every call, forward and backward, whatever else it computes."""
    inputs = random_inputs(n_q=40, n_k=40)
    torch.manual_seed(5)
    stays = kept_pairs(inputs[0], 40, 0.3)
    assert stays.unique().tolist() == pytest.approx([0.0, 1 / 0.7])

    def ours(*leaves):
        torch.manual_seed(5)
        return gated_attention(*leaves, dropout_p=0.3, **NEAR[near])

    def theirs(q, k, v, a, b):
        """The weights of the operator itself, one key at a time, times what stays."""
        eye = torch.eye(40, dtype=q.dtype).expand(2, 2, -1, -1)
        weights, _ = formula(q, k, eye, a, b, **NEAR[near])
        return (weights * stays.to(q.dtype)) @ v.repeat_interleave(2, 1)

    found = results(ours, [x.clone().requires_grad_() for x in inputs])
    wanted = results(theirs, [x.clone().requires_grad_() for x in inputs])
    for name, got, right in zip(("out", "dq", "dk", "dv", "da", "db"), found, wanted, strict=True):
        torch.testing.assert_close(got, right, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_dropout_is_independent_of_the_way_that_computes_it():
    """Few rows, many rows, other tiers of dtype, threads."""
    q = torch.randn(2, 4, 64, 8)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(1)
            results.append(kept_pairs(q, 64, 0.5, causal=False))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, results[0]) for x in results)
    torch.manual_seed(1)
    half = kept_pairs(q.bfloat16(), 64, 0.5)
    assert torch.equal(half != 0, results[0] != 0)
    torch.manual_seed(1)
    one = kept_pairs(q[:1, :, :2], 64, 0.5)
    torch.manual_seed(1)
    assert torch.equal(one[:, :2] != 0, kept_pairs(q[:1, :, :2], 64, 0.5)[:, :2] != 0)


def test_dropout_drops_its_share_and_nothing_else():
    torch.manual_seed(0)
    stays = kept_pairs(torch.randn(2, 4, 300, 8), 250, 0.2) != 0
    count = stays.numel()
    assert abs(stays.float().mean().item() - 0.8) < 4 * math.sqrt(0.16 / count)
    for dim in (2, 3):  # neither rows nor keys have one of their own
        share = stays.float().mean((0, 1, 5 - dim))
        assert (share - 0.8).abs().max() < 5 * math.sqrt(0.16 * len(share) / count)
    neighbours = (stays[..., 1:] == stays[..., :-1]).float().mean().item()
    assert abs(neighbours - 0.68) < 0.01
    heads = (stays[:, 1:] == stays[:, :-1]).float().mean().item()
    assert abs(heads - 0.68) < 0.01
    again = kept_pairs(torch.randn(2, 4, 300, 8), 250, 0.2) != 0
    assert abs((stays == again).float().mean().item() - 0.68) < 0.01


def test_lse_knows_of_no_dropout():
    inputs = random_inputs()
    _, want = gated_attention(*inputs, tau=0.5, return_lse=True)
    _, found = gated_attention(*inputs, tau=0.5, dropout_p=0.4, output_gate=gates(*inputs[::2][:2], 1), return_lse=True)
    assert torch.equal(found, want)


def test_dropout_in_modes_and_where_values_are_broken():
    inputs = random_inputs()
    for mode in ("post", "log"):
        torch.manual_seed(2)
        found = gated_attention(*inputs, tau=0.5, mode=mode, dropout_p=0.5)
        drawn = torch.stack([gated_attention(*inputs, tau=0.5, mode=mode, dropout_p=0.5) for _ in range(300)]).mean(0)
        plain = gated_attention(*inputs, tau=0.5, mode=mode)
        assert not torch.allclose(found, plain, atol=0.1)
        assert (drawn - plain).abs().mean() < 0.06
    broken = [x.clone() for x in inputs]
    broken[2][:, :, 4] = math.inf
    torch.manual_seed(2)
    stays = kept_pairs(broken[0], 33, 0.5)
    torch.manual_seed(2)
    out = gated_attention(*broken, dropout_p=0.5)
    assert torch.equal(out.isfinite().all(-1), stays[..., 4] == 0)


def test_checkpointing_gives_the_same_gradients():
    inputs = random_inputs()

    def run(*leaves):
        return gated_attention(*leaves, tau=0.5, dropout_p=0.3)

    found = []
    for function in (run, lambda *x: torch.utils.checkpoint.checkpoint(run, *x, use_reentrant=False)):
        torch.manual_seed(4)
        found.append(results(function, [x.clone().requires_grad_() for x in inputs]))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


def test_compiled_and_mapped():
    inputs = random_inputs()
    gate = gates(inputs[0], inputs[2], 16)

    def run(gate):
        return gated_attention(*inputs, output_gate=gate, dropout_p=0.3, tau=0.5)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    out = compiled(gate.clone().requires_grad_())
    out.sum().backward()
    assert out.shape == gate.shape
    mapped = torch.func.vmap(lambda x: gated_attention(*inputs, output_gate=x))(torch.stack((gate, -gate)))
    torch.testing.assert_close(mapped[1], gated_attention(*inputs, output_gate=-gate))
    with pytest.raises((NotImplementedError, RuntimeError), match="no dropout under torch.func.vmap|random operation"):
        torch.func.vmap(run)(torch.stack((gate, gate)))
    with pytest.raises(NotImplementedError, match="no dropout under torch.func.vmap"):
        torch.func.vmap(run, randomness="same")(torch.stack((gate, gate)))


def test_packed_sequences_have_them():
    q, k, v = torch.randn(30, 4, 8), torch.randn(30, 2, 8), torch.randn(30, 2, 8)
    a, b, ends = torch.randn(30, 4), torch.randn(30, 2), torch.tensor([0, 9, 18, 30])
    for gate in (torch.randn(30, 4), torch.randn(30, 4, 8)):
        plain = gated_attention_varlen(q, k, v, a, b, ends, tau=0.5)
        found = gated_attention_varlen(q, k, v, a, b, ends, tau=0.5, output_gate=gate)
        torch.testing.assert_close(found, plain * (gate.unsqueeze(-1) if gate.dim() == 2 else gate).sigmoid())
    assert gated_attention_varlen(q, k, v, a, b, ends, dropout_p=0.9).isfinite().all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            dict(output_gate=torch.zeros(2, 4, 32)),
            r"output_gate is torch.float32 \[2, 4, 32\], expected floating-point",
        ),
        (dict(output_gate=torch.zeros(2, 4, 33, 5)), r"output_gate is .*head_dim_v = 16"),
        (dict(output_gate=torch.zeros(2, 4, 33, dtype=torch.int32)), "output_gate is torch.int32"),
        (dict(output_gate=1.0), "output_gate is float, expected"),
        (dict(dropout_p=1.0), r"dropout_p is 1.0, expected a number in \[0, 1\)"),
        (dict(dropout_p=-0.1), "dropout_p is -0.1, expected"),
        (dict(dropout_p=math.nan), "dropout_p is nan, expected"),
    ],
)
def test_bad_input_is_named(options, text):
    with pytest.raises(ValueError, match=text):
        gated_attention(*random_inputs(), **options)
