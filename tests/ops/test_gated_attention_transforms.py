"""Gated attention under torch.func, and what derivatives it has not."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from torch_sluice import gated_attention

RANGE = torch.tensor([[0, 12], [3, 10]])
OPTIONS = dict(causal=True, tau=0.5, window=2, sinks=1, key_range=RANGE)
ALL = (0, 1, 2, 3, 4)


def draw(*sizes):
    """q, k, v, a, b with these dimensions in front."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 10, 8), (2, 2, 12, 8), (2, 2, 12, 8), (2, 4, 10), (2, 2, 12)
    return [torch.randn(*sizes, *shape, generator=generator) for shape in shapes]


def loss(*inputs, **options):
    return gated_attention(*inputs, **{**OPTIONS, **options}).square().sum()


def by_autograd(inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(*leaves), leaves)


def test_grad_and_vjp_are_those_of_autograd():
    inputs = draw()
    expected = by_autograd(inputs)
    for found in (grad(loss, argnums=ALL)(*inputs), vjp(loss, *inputs)[1](torch.tensor(1.0))):
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_gradients_of_each_sample():
    inputs = draw(3)
    found = vmap(grad(loss, argnums=ALL))(*inputs)
    for number in range(3):
        expected = by_autograd([x[number] for x in inputs])
        assert all(torch.equal(x[number], y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("mapped", [ALL, (0,), (1, 2), (4,)], ids=str)
@pytest.mark.parametrize("dim", [0, 2])
def test_vmap_is_a_loop(mapped, dim):
    plain, many = draw(), draw(3)
    arguments = [many[i].movedim(0, dim) if i in mapped else plain[i] for i in ALL]
    dims = tuple(dim if i in mapped else None for i in ALL)
    found, lse = vmap(lambda *x: gated_attention(*x, return_lse=True, **OPTIONS), in_dims=dims)(*arguments)
    for number in range(3):
        one = [many[i][number] if i in mapped else plain[i] for i in ALL]
        expected = gated_attention(*one, return_lse=True, **OPTIONS)
        assert torch.equal(found[number], expected[0])
        assert torch.equal(lse[number], expected[1])


def test_vmap_in_vmap_over_nothing_and_of_thresholds():
    inputs = draw(2, 3)
    found = vmap(vmap(lambda *x: gated_attention(*x, **OPTIONS)))(*inputs)
    assert torch.equal(found[1, 2], gated_attention(*(x[1, 2] for x in inputs), **OPTIONS))
    assert vmap(lambda *x: gated_attention(*x))(*(x[:0] for x in draw(1))).shape == (0, 2, 4, 10, 8)
    q, *rest = draw()
    assert vmap(lambda q: gated_attention(q[:, :, :0], *rest[:2], rest[2][:, :, :0], rest[3]))(q[None]).numel() == 0


def test_the_operator_itself_under_vmap():
    q, k, v, a, b = draw()
    run = torch.ops.sluice.gated_attention
    found = vmap(lambda q: run(q, k, v, a, b, *[None] * 8, False, 0, 0, 0, 0.0, 0.0, 0.3)[0])(torch.stack((q, -q)))
    assert torch.equal(found[1], run(-q, k, v, a, b, *[None] * 8, False, 0, 0, 0, 0.0, 0.0, 0.3)[0])
    with pytest.raises(NotImplementedError, match=r"call torch_sluice\.gated_attention instead"):
        grad(lambda q: run(q, k, v, a, b, *[None] * 8, False, 0, 0, 0, 0.0, 0.0, 0.3)[0].sum())(q)


def test_jacobian_in_reverse():
    q, *rest = draw()
    found = jacrev(lambda q: gated_attention(q, *rest).sum((0, 1, 3)))(q)
    expected = torch.autograd.functional.jacobian(lambda q: gated_attention(q, *rest).sum((0, 1, 3)), q)
    torch.testing.assert_close(found, expected)


def by_operator(q, *rest):
    return torch.ops.sluice.gated_attention(q, *rest, *[None] * 8, False, 0, 0, 0, 0.0, 0.0, 0.3)[0]


@pytest.mark.parametrize("run", [gated_attention, by_operator])
def test_forward_mode_is_refused_by_name(run):
    """A tangent of 0 would be wrong without a word."""
    inputs = draw()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        jvp(lambda *x: run(*x), tuple(inputs), tuple(inputs))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        jacfwd(lambda b: run(*inputs[:4], b))(inputs[4])
    with forward_ad.dual_level():
        for place in ALL:
            dual = [forward_ad.make_dual(x, x) if i == place else x for i, x in enumerate(inputs)]
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                run(*dual)
        assert forward_ad.unpack_dual(run(*inputs)).tangent is None  # nothing carries one


def test_second_order_is_refused_by_name():
    q, *rest = draw()
    with pytest.raises(NotImplementedError, match="first-order gradients only"):
        grad(lambda q: grad(lambda q: loss(q, *rest))(q).sum())(q)
