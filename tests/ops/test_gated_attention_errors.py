"""Bad input to torch_sluice.gated_attention: the error names the argument, its value, and what was expected."""

import math

import pytest
import torch
from support.attention import random_inputs

from torch_sluice import gated_attention

q, k, v, a, b = random_inputs(batch=2, heads=4, heads_kv=2, n_q=5, n_k=7, head_dim=8, head_dim_v=8)


def call(**changes):
    arguments = dict(q=q, k=k, v=v, a=a, b=b) | changes
    return gated_attention(**arguments)


BAD = {
    "q is None": (dict(q=None), r"^q is None, expected a tensor$"),
    "k is a list": (dict(k=[1.0]), r"^k is list, expected a tensor$"),
    "b is None": (dict(b=None), r"^b is None, expected a tensor$"),
    "rank of q": (dict(q=q[0]), r"q has shape \[4, 5, 8\], expected \[batch, heads_q, n_q, head_dim\]"),
    "rank of k": (dict(k=k[0]), r"k is float32 \[2, 7, 8\] on cpu, expected \[batch, heads_kv, n_k, head_dim\]"),
    "rank of v": (dict(v=v[0]), r"v is float32 \[2, 7, 8\] on cpu, expected \[batch, heads_kv, n_k, head_dim_v\]"),
    "rank of a": (dict(a=a[..., None]), r"a is .*\[2, 4, 5, 1\].*expected \[batch, heads_q, n_q\] = \[2, 4, 5\]"),
    "rank of b": (dict(b=b[0]), r"b is .*\[2, 7\].*expected \[batch, heads_kv, n_k\] = \[2, 2, 7\]"),
    "batch of k": (dict(k=k[:1]), r"k is .*\[1, 2, 7, 8\].*expected .*= \[2, 2, 7, 8\]"),
    "tokens of v": (dict(v=v[:, :, :6]), r"v is .*\[2, 2, 6, 8\].*expected .*= \[2, 2, 7, 8\]"),
    "channels of k": (dict(k=k[..., :7]), r"k is .*\[2, 2, 7, 7\].*expected .*= \[2, 2, 7, 8\]"),
    "tokens of a": (dict(a=a[..., :4]), r"a is .*\[2, 4, 4\].*expected .*= \[2, 4, 5\]"),
    "heads of b": (dict(b=b[:, :1]), r"b is .*\[2, 1, 7\].*expected .*= \[2, 2, 7\]"),
    "dtype of k": (dict(k=k.half()), r"k is (float16|dtype \d+) .*expected .*of the same dtype"),
    "dtype of q": (dict(q=q.int(), k=k.int(), v=v.int()), r"q is int32 .*expected float32, bfloat16"),
    "complex q": (dict(q=q.cfloat(), k=k.cfloat(), v=v.cfloat()), r"q is .*expected float32, bfloat16"),
    "dtype of a": (dict(a=a.long()), r"a is torch\.int64, expected floating-point gate logits"),
    "dtype of b": (dict(b=b > 0), r"b is torch\.bool, expected floating-point gate logits"),
    "heads that don't divide": (
        dict(q=q[:, :3], a=a[:, :3]),
        r"heads_q is 3, expected a multiple of heads_kv, which is 2",
    ),
    "no key heads": (dict(k=k[:, :0], v=v[:, :0], b=b[:, :0]), r"heads_kv is 0, expected at least 1"),
    "no channels": (dict(q=q[..., :0], k=k[..., :0]), r"head_dim is 0, expected at least 1"),
    "mode": (dict(mode="after"), r"mode is 'after', expected one of 'select', 'post', 'log'"),
    "tau of 1": (dict(tau=1.0), r"tau is 1\.0, expected a number in \[0, 1\)"),
    "negative tau": (dict(tau=-0.1), r"tau is -0\.1, expected"),
    "NaN tau": (dict(tau=math.nan), r"tau is nan, expected"),
    "shape of tau": (dict(tau=torch.zeros(3)), r"tau has shape \[3\], expected \[heads_q\] or .*= \[2, 4\]"),
    "value in tau": (dict(tau=torch.tensor([0, 0, 0, 1.5])), r"tau is 1\.5, expected every element in \[0, 1\)"),
    "NaN in tau": (dict(tau=torch.tensor([0, 0, 0, math.nan])), r"tau is nan, expected every element in \[0, 1\)"),
    "density": (dict(density=1.5), r"density is 1\.5, expected a number in \[0, 1\]"),
    "value in density": (dict(density=torch.tensor([0, 1, 0.5, 1.5])), r"density is 1\.5, expected every element in"),
    "negative density": (dict(density=torch.tensor([-1.0])), r"density is -1\.0, expected every element in \[0, 1\]"),
    "NaN in density": (dict(density=torch.tensor([0, 1, 0.5, math.nan])), r"density is nan, expected every element in"),
    "shape of density": (dict(density=torch.zeros(3)), r"density has shape \[3\], expected .* broadcasts to \[2, 4\]"),
    "tau and density": (dict(tau=0.5, density=0.5), r"tau is 0\.5 and density is 0\.5, expected at most one"),
    "window": (dict(window=-1), r"window is -1, expected at least 0"),
    "sinks": (dict(sinks=-2), r"sinks is -2, expected at least 0"),
    "scale": (dict(scale=math.inf), r"scale is inf, expected a finite number"),
    "NaN scale": (dict(scale=math.nan), r"scale is -?nan, expected a finite number"),
    "shape of key_range": (dict(key_range=torch.zeros(2, 3).long()), r"key_range is .*\[2, 3\].*expected .*= \[2, 2\]"),
    "dtype of key_range": (dict(key_range=torch.zeros(2, 2).int()), r"key_range is int32"),
    "order of key_range": (dict(key_range=torch.tensor([[0, 7], [5, 3]])), r"key_range\[1\] is \[5, 3\), expected"),
    "more than [batch] of q_offset": (dict(q_offset=torch.zeros(2, 1).long()), r"q_offset is .*\[2, 1\].*= \[2\]"),
    "dtype of q_offset": (dict(q_offset=torch.zeros(2).int()), r"q_offset is torch.int32 .*expected int64"),
    "a number as q_offset": (dict(q_offset=2), r"q_offset is 2, expected an int64 tensor \[batch\]"),
    "device of q_offset": (
        dict(q_offset=torch.zeros(2, device="meta").long()),
        r"q_offset is .* on meta, .*device of q",
    ),
    "negative q_offset": (dict(q_offset=torch.tensor([0, -1])), r"q_offset\[1\] is -1, expected 0 <= q_offset <="),
    "q_offset beyond the keys": (dict(q_offset=torch.tensor([1, 9])), r"q_offset\[1\] is 9, .*<= n_k - n_q = 2"),
    "shape of text_begin": (dict(text_begin=torch.zeros(3).long()), r"text_begin is .*\[3\].*= \[2\]"),
    "text_begin behind the first key": (
        dict(text_begin=torch.tensor([0, 1])),
        r"text_begin\[1\] is 1, .*first valid key",
    ),
    "end of key_range": (dict(key_range=torch.tensor([[0, 7], [0, 8]])), r"key_range\[1\] is \[0, 8\), .*n_k = 7"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_head_dim_too_large():
    with pytest.raises(IndexError, match="head_dim is 257, expected at most 256"):
        call(q=torch.zeros(2, 4, 5, 257), k=torch.zeros(2, 2, 7, 257))


def test_sizes_too_large_to_index():
    huge = torch.zeros(1).expand
    with pytest.raises(IndexError, match=r"batch \* heads_q \* tokens is .* expected a product of at most 2\^46"):
        gated_attention(
            huge(1 << 20, 1 << 20, 1 << 10, 8), huge(1 << 20, 1, 8, 8), huge(1 << 20, 1, 8, 8),
            huge(1 << 20, 1 << 20, 1 << 10), huge(1 << 20, 1, 8),
        )  # fmt: skip


@pytest.mark.parametrize("which", range(1, 5), ids="kvab")
def test_meta_beside_cpu(which):
    inputs = [q, k, v, a, b]
    inputs[which] = inputs[which].to("meta")
    message = f"^{'qkvab'[which]} is on meta, expected the device of q, which is cpu$"
    with pytest.raises(ValueError, match=message):
        gated_attention(*inputs)


def test_cpu_beside_meta():
    with pytest.raises(ValueError, match="^k is on cpu, expected the device of q, which is meta$"):
        gated_attention(q.to("meta"), k, v, a, b)


def test_meta_gives_shapes():
    out, lse = gated_attention(*(x.to("meta") for x in (q, k, v, a, b)), return_lse=True)
    assert out.is_meta
    assert out.shape == (2, 4, 5, 8)
    assert lse.shape == (2, 4, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("which", range(1, 5), ids="kvab")
def test_cpu_beside_cuda(which):
    inputs = [x.cuda() for x in (q, k, v, a, b)]
    inputs[which] = inputs[which].cpu()
    message = rf"^{'qkvab'[which]} is float32 .* on cpu, expected the device of q, which is float32 .* on cuda:\d"
    with pytest.raises(ValueError, match=message):
        gated_attention(*inputs)


def test_second_order_gradient():
    leaf = q.clone().requires_grad_()
    (dq,) = torch.autograd.grad(call(q=leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="first-order gradients only"):
        dq.sum().backward()


def test_failed_call_leaves_the_operator_usable():
    with pytest.raises(ValueError, match="window"):
        call(window=-1)
    assert call().isfinite().all()
