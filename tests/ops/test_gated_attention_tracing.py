"""The operator under torch's machinery: opcheck, torch.compile, autocast, checkpointing."""

import pytest
import torch
from support.attention import random_inputs
from support.devices import DEVICES, INDUCTOR

from torch_sluice import gated_attention

FORWARD = torch.ops.sluice.gated_attention.default
BACKWARD = torch.ops.sluice.gated_attention_backward.default


def operator_arguments(dtype, with_optional, device):
    inputs = random_inputs(n_q=6, n_k=9, dtype=dtype, device=device)
    logit_tau = torch.full((2, 4), 0.2, dtype=inputs[3].dtype, device=device) if with_optional else None
    key_range = torch.tensor([[0, 9], [2, 7]], device=device) if with_optional else None
    q_offset = torch.tensor([0, 2], device=device) if with_optional else None
    text_begin = torch.tensor([-1, 2], device=device) if with_optional else None
    attn_mask = torch.randn(1, 4, 6, 9, device=device) if with_optional else None
    alibi_slopes = torch.full_like(logit_tau, 0.1) if with_optional else None
    output_gate = torch.randn(2, 4, 6, 16, device=device).to(dtype) if with_optional and device == "cpu" else None
    dropout_seed = torch.tensor([5]) if output_gate is not None else None
    of_scores = (7, 3.0) if with_optional else (0, 0.0)
    tensors = (logit_tau, key_range, q_offset, text_begin, attn_mask, alibi_slopes, output_gate, dropout_seed)
    return *inputs, *tensors, True, 2, 1, *of_scores, 0.0 if dropout_seed is None else 0.3, 0.25


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_optional", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck_forward(dtype, with_optional, device):
    arguments = operator_arguments(dtype, with_optional, device)
    torch.library.opcheck(FORWARD, arguments)
    learning = (0, 1, 2, 3, 4, 9, 11) if with_optional and arguments[11] is not None else (0, 1, 2, 3, 4)
    torch.library.opcheck(FORWARD, [x.requires_grad_() if i in learning else x for i, x in enumerate(arguments)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_optional", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_backward(dtype, with_optional, device):
    arguments = operator_arguments(dtype, with_optional, device)
    out, lse, _ = FORWARD(*arguments)
    dlse = torch.randn_like(lse) if with_optional else None
    tensors, options = arguments[:13], arguments[13:]
    torch.library.opcheck(BACKWARD, (torch.randn_like(out), dlse, *tensors, out, lse, *options, with_optional))


def gradients(function, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out, *torch.autograd.grad(out.float().square().sum(), leaves)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options", [dict(tau=0.4), dict(density=0.3), dict(tau=torch.tensor([0, 0.2, 0.4, 0.6]))], ids=str
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(options, dynamic, device):
    torch._dynamo.reset()

    def attention(*inputs):
        return gated_attention(*inputs, causal=True, window=3, **options)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (20, 31):
        inputs = random_inputs(n_q=n, n_k=n, device=device)
        for ours, eager in zip(gradients(compiled, inputs), gradients(attention, inputs), strict=True):
            assert torch.equal(ours, eager)


@INDUCTOR
@pytest.mark.parametrize("device", DEVICES)
def test_inductor(device):
    """The code generator behind torch.compile, with the operator amid what it generates code for."""
    torch._dynamo.reset()

    def attention(q, k, v, a, b):
        return gated_attention(2 * q, k, v.tanh(), a, b + 1, causal=True, tau=0.4, window=3).sigmoid()

    inputs = random_inputs(batch=1, heads=2, heads_kv=1, n_q=20, n_k=20, device=device)
    compiled = torch.compile(attention, fullgraph=True)
    for ours, eager in zip(gradients(compiled, inputs), gradients(attention, inputs), strict=True):
        torch.testing.assert_close(ours, eager)


def test_compiled_bad_shape():
    torch._dynamo.reset()
    q, k, v, a, b = random_inputs()
    compiled = torch.compile(gated_attention, backend="aot_eager")
    with pytest.raises(Exception, match=r"b has shape .*expected .*heads_kv, n_k"):
        compiled(q, k, v, a, b[..., :5])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    inputs = random_inputs(device=device)
    rounded = [x.to(dtype) for x in inputs[:3]] + list(inputs[3:])
    with torch.autocast(device, dtype=dtype):
        out, *ours = gradients(lambda *x: gated_attention(*x, causal=True, tau=0.5), inputs)
        half_gates = gated_attention(*inputs[:3], inputs[3].to(dtype), inputs[4].to(dtype))
    assert out.dtype == half_gates.dtype == dtype
    assert all(x.dtype == torch.float32 for x in ours)
    expected, *theirs = gradients(lambda *x: gated_attention(*x, causal=True, tau=0.5), rounded)
    assert torch.equal(out, expected)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other.float())


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_leaves_float64_alone(device):
    inputs = random_inputs(dtype=torch.float64, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert gated_attention(*inputs).dtype == torch.float64


@pytest.mark.parametrize("device", DEVICES)
def test_checkpoint(device):
    inputs = random_inputs(device=device)

    def attention(*x):
        return gated_attention(*x, causal=True, tau=0.5)

    def checkpointed(*x):
        return torch.utils.checkpoint.checkpoint(attention, *x, use_reentrant=False)

    for ours, plain in zip(gradients(checkpointed, inputs), gradients(attention, inputs), strict=True):
        assert torch.equal(ours, plain)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, *x):
            return gated_attention(*x, causal=True, tau=0.5)

    inputs = random_inputs()
    program = torch.export.export(Layer(), inputs)
    assert torch.equal(program.module()(*inputs), Layer()(*inputs))
