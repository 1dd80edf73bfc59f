"""Places in the text: caches longer than the text, chunks of a prompt, and texts that lost their first tokens."""

import pytest
import torch
from support.attention import formula, formula_with_gradients, random_inputs
from support.devices import DEVICES
from torch.func import vmap

from torch_sluice import gated_attention
from torch_sluice.attention import kept_pairs
from torch_sluice.attention.counterfactual import add_counterfactual_gradient
from torch_sluice.attention.density import sample_gate
from torch_sluice.monitor import KeptPairCounter, count_kept_pairs

NEAR = [
    dict(causal=True),
    dict(causal=True, window=3, sinks=4),
    dict(window=2, sinks=3),
    dict(causal=True, sinks=2, key_range=torch.tensor([[0, 30], [5, 19]])),
    dict(causal=True, window=3, sinks=4, sliding_window=9),
    dict(window=2, sinks=3, sliding_window=9),
]
PLACES = [
    dict(q_offset=torch.tensor([0, 7])),
    dict(q_offset=torch.tensor([23, 11]), text_begin=torch.tensor([-1, 0])),
    dict(text_begin=torch.tensor([-3, -100])),
]


def draw(n_q=8, n_k=31, **options):
    return random_inputs(n_q=n_q, n_k=n_k, **options)


def on(device, options):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("places", range(len(PLACES)))
@pytest.mark.parametrize("near", range(len(NEAR)))
@pytest.mark.parametrize("n_q", [1, 8])
def test_it_is_the_formula_with_its_gradients(n_q, near, places, device):
    options = on(device, NEAR[near] | PLACES[places])
    inputs = draw(n_q, device=device)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out, lse = gated_attention(*leaves, tau=0.6, return_lse=True, **options)
    dout = torch.randn_like(out)
    found = (out, lse, *torch.autograd.grad(out, leaves, dout))
    expected = formula_with_gradients(inputs, dout, exact=True, tau=0.6, **options)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want.float(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [dict(window=3, sinks=2), dict(sinks=2), {}], ids=str)
def test_a_prompt_in_chunks_is_the_prompt(options):
    """Into a cache that is longer, whose rest may hold anything."""
    n, length = 29, 40
    q, k, v, a, b = random_inputs(n_q=n, n_k=n)
    whole = gated_attention(q, k, v, a, b, causal=True, tau=0.6, **options)
    cache = [torch.full((*x.shape[:2], length, *x.shape[3:]), torch.nan) for x in (k, v, b)]
    for first, last in ((0, 11), (11, 12), (12, 27), (27, 29)):
        for stored, x in zip(cache, (k, v, b), strict=True):
            stored[:, :, first:last] = x[:, :, first:last]
        found = gated_attention(
            q[:, :, first:last], *cache[:2], a[:, :, first:last], cache[2], causal=True, tau=0.6,
            q_offset=torch.full((2,), first), **options,
        )  # fmt: skip
        torch.testing.assert_close(found, whole[:, :, first:last])


@pytest.mark.parametrize("places", range(len(PLACES)))
@pytest.mark.parametrize("near", range(len(NEAR)))
def test_what_counts_pairs_counts_those_of_the_operator(near, places):
    """A value of ones over a softmax of equal scores: out is the share that gates take, and 0 gates nothing."""
    options = NEAR[near] | PLACES[places]
    q, k, _, a, b = draw()
    v = torch.eye(31).expand(2, 2, 31, 31)
    kept = (gated_attention(0 * q, k, v, a, b, tau=0.6, **options) != 0).sum((2, 3))
    everything = (gated_attention(0 * q, k, v, a, b, **options) != 0).sum((2, 3))
    found, possible = kept_pairs(a, b, tau=0.6, **options)
    assert torch.equal(found, kept)
    assert torch.equal(possible, everything[:, 0])
    _, *counts = sample_gate(a, b, tau=0.6, **options)
    assert (round(counts[0].item()), counts[2].item()) == (kept.sum(), everything.sum())
    tau = torch.full((2, 4), 0.6).logit()
    near = {name: options[name] for name in ("causal", "window", "sinks", "sliding_window") if name in options}
    rest = (options.get(name) for name in ("key_range", "q_offset", "text_begin"))
    assert count_kept_pairs(a, b, tau, *rest, **near) == (kept.sum(), everything.sum())
    with KeptPairCounter() as counter:
        gated_attention(0 * q, k, v, a, b, tau=0.6, **options)
    assert (counter.kept, counter.total) == (kept.sum(), everything.sum())


@pytest.mark.parametrize("near", range(len(NEAR)))
def test_density_is_that_of_the_far_pairs_that_are_there(near):
    options = NEAR[near] | PLACES[1]
    q, k, _, a, b = draw()
    v = torch.eye(31).expand(2, 2, 31, 31)

    def count(**choice):
        return (gated_attention(0 * q, k, v, a, b, **choice, **options) != 0).sum((2, 3))

    always = count(density=0.0)
    far = (count() - always).double()
    for density in (0.3, 0.8):
        assert torch.equal(count(density=density) - always, (far * density - 1e-9).ceil().long())


@pytest.mark.parametrize("near", range(len(NEAR)))
def test_what_dropped_pairs_teach_is_that_of_the_text_alone(near):
    """A text in a longer cache against the text; without causality the rest is out of its range."""
    options = dict(NEAR[near])
    q, k, v, a, b = random_inputs(n_q=8, n_k=20)
    begin = options.pop("key_range", torch.tensor([[0, 20], [0, 20]]))[:, :1]
    alone = options | dict(key_range=torch.cat((begin, torch.full_like(begin, 20)), 1))
    longer = [torch.cat((x, torch.randn_like(x)), dim=2) for x in (k, v, b)]

    def gradients(k, v, b, near):
        a_leaf, b_leaf = a.clone().requires_grad_(), b.clone().requires_grad_()
        out, lse = gated_attention(q, k, v, a, b, tau=0.6, return_lse=True, scale=0.3, **near)
        near = dict(window=0, sinks=0, causal=False, scale=0.3) | near
        out = add_counterfactual_gradient(out, lse, q, k, v, a_leaf, b_leaf, tau=0.6, rows=1.0, **near)
        return torch.autograd.grad(out.square().sum(), (a_leaf, b_leaf))

    da, db = gradients(k, v, b, alone)
    found, found_b = gradients(*longer, alone | dict(q_offset=torch.tensor([12, 12])))
    torch.testing.assert_close(found, da)
    torch.testing.assert_close(found_b[:, :, :20], db)
    assert not found_b[:, :, 20:].any()


def test_vmap_maps_over_places():
    inputs = draw()
    offsets, begins = torch.tensor([[0, 7], [3, 3], [23, 11]]), torch.tensor([[0, 0], [-1, -9], [-2, 0]])
    options = dict(causal=True, tau=0.6, window=2, sinks=3)
    found = vmap(lambda i, j: gated_attention(*inputs, q_offset=i, text_begin=j, **options))(offsets, begins)
    for got, i, j in zip(found, offsets, begins, strict=True):
        assert torch.equal(got, gated_attention(*inputs, q_offset=i, text_begin=j, **options))


def test_a_compiled_call_takes_other_places_without_compiling_anew():
    inputs, graphs = draw(), []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def run(offset, begin):
        return gated_attention(*inputs, causal=True, tau=0.6, sinks=2, q_offset=offset, text_begin=begin)

    for first in (0, 5, 23):
        places = torch.tensor([first, 23 - first]), torch.tensor([-first, 0])
        expected = gated_attention(*inputs, causal=True, tau=0.6, sinks=2, q_offset=places[0], text_begin=places[1])
        assert torch.equal(run(*places), expected)
    assert len(graphs) == 1
    with pytest.raises(ValueError, match=r"q_offset has shape \[1\]|q_offset is .*\[1\]"):
        torch.compile(lambda x: gated_attention(*inputs, q_offset=x), backend="eager")(torch.tensor([0]))


def test_the_formula_places_sinks_by_the_text():
    """The formula itself: a text that lost two tokens keeps one of three sinks, and none if it lost three."""
    q, k, v, a, b = draw()
    v = torch.eye(31).expand(2, 2, 31, 31)
    shut = torch.full_like(a, -20), torch.full_like(b, -20)
    out, _ = formula(0 * q, k, v, *shut, tau=0.5, sinks=3, text_begin=torch.tensor([-2, -3]))
    assert (out[0] != 0).sum(-1).unique().tolist() == [1]
    assert not out[1].any()
    assert torch.equal(out[0].argmax(-1).unique(), torch.tensor([0]))
