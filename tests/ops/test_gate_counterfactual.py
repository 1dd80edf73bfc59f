"""The gradient that tells a gate what the pairs it drops would have changed, against dropping and admitting them."""

import math

import pytest
import torch

from torch_sluice import gated_attention
from torch_sluice.attention import Gate, attend
from torch_sluice.attention.counterfactual import add_counterfactual_gradient
from torch_sluice.attention.sampling import sample_rows

TAU, WINDOW, SINKS = 0.5, 3, 1


def random_case(n_q=12, n_k=12, batch=2, heads=4, kv_heads=2, channels=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(batch, heads, n_q, channels), *(normal(batch, kv_heads, n_k, channels) for _ in range(2))
    return q, k, v, normal(batch, heads, n_q), normal(batch, kv_heads, n_k), normal(batch, heads, n_q, channels)


def gate_gradient(case, rows=1.0, **options):
    """Gradient of <out, dout> with respect to a and b that the counterfactual adds to the operator's."""
    q, k, v, a, b, dout = case
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    out, lse = gated_attention(q, k, v, a.detach(), b.detach(), tau=TAU, return_lse=True, **options)
    out.requires_grad_()
    scale = 1 / math.sqrt(q.shape[-1])
    taught = add_counterfactual_gradient(out, lse, q, k, v, a, b, tau=TAU, rows=rows, **{"scale": scale, **options})
    assert torch.equal(taught, out)
    taught.backward(dout)
    assert torch.equal(out.grad, dout)
    return a.grad, b.grad


def row_scores(case, where, keys, softcap=0.0, alibi_slopes=None, attn_mask=None, **_):
    """Scores of one row."""
    q, k = case[:2]
    batch, head, query = where
    scores = k[batch, head // (q.shape[1] // k.shape[1]), keys] @ q[batch, head, query] / math.sqrt(q.shape[-1])
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[head] * (query + k.shape[2] - q.shape[2] - torch.tensor(keys)).abs()
    return scores if attn_mask is None else scores + attn_mask[batch, head, query, keys]


def row_output(case, where, kept, **options):
    """Output of one row that keeps the given keys: {key: gate}."""
    q, k, v = case[:3]
    batch, head, _ = where
    if not kept:
        return v.new_zeros(v.shape[-1])
    weights = row_scores(case, where, list(kept), **options).softmax(0) * v.new_tensor(list(kept.values()))
    return weights @ v[batch, head // (q.shape[1] // k.shape[1]), list(kept)]


def toggled_gradient(case, causal, key_range=None, sliding_window=10**9, attn_mask=None, **options):
    """The same by dropping each kept pair and admitting each dropped one, one at a time."""
    q, k, _, a, b, dout = case
    options["attn_mask"] = attn_mask
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    n_q, n_k, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    for batch, head, query in [(i, h, t) for i in range(len(q)) for h in range(q.shape[1]) for t in range(n_q)]:
        position = query + n_k - n_q
        begin, end = (0, n_k) if key_range is None else key_range[batch].tolist()
        keys = [j for j in range(begin, end) if j <= position or not causal]
        keys = [j for j in keys if abs(position - j) < sliding_window]
        if attn_mask is not None:
            keys = [j for j in keys if attn_mask[batch, head, query, j] != -math.inf]
        near = {j for j in keys if abs(position - j) < WINDOW or j - begin < SINKS}
        gates = torch.sigmoid(a[batch, head, query] + b[batch, head // group]).tolist()
        kept = {j: 1.0 if j in near else gates[j] for j in keys if j in near or gates[j] >= TAU}
        here = (batch, head, query)
        whole = row_output(case, here, kept, **options)
        for j in set(keys) - near:
            if j in kept:
                without = row_output(case, here, {i: g for i, g in kept.items() if i != j}, **options)
                share = row_scores(case, here, list(kept), **options).softmax(0)[list(kept).index(j)]
                # What dropping changes, per share that it leaves to the others: the derivative at presence 1.
                change = (whole - without) * (1 - share)
            else:
                change = row_output(case, here, kept | {j: TAU}, **options) - whole
            dz = gates[j] * (1 - gates[j]) * (change @ dout[batch, head, query])
            da[batch, head, query] += dz
            db[batch, head // group, j] += dz
    return da, db


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n_q", [12, 7])
def test_gradient_is_what_toggling_each_pair_changes(causal, padded, n_q):
    case = random_case(n_q=n_q)
    key_range = torch.tensor([[2, 12], [0, 9]]) if padded else None
    found = gate_gradient(case, causal=causal, window=WINDOW, sinks=SINKS, key_range=key_range)
    expected = toggled_gradient(case, causal, key_range)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert theirs.abs().max() > 0.01


@pytest.mark.parametrize("causal", [True, False])
def test_what_bends_scores_bends_what_pairs_teach(causal):
    case, generator = random_case(n_q=9), torch.Generator().manual_seed(5)
    bias = torch.randn(2, 4, 9, 12, generator=generator, dtype=torch.float64)
    bias = bias.masked_fill(torch.rand(bias.shape, generator=generator) < 0.2, -math.inf)
    slopes = torch.tensor([0.3, 0.1, 0.0, 0.2], dtype=torch.float64)
    for options in (
        dict(attn_mask=bias), dict(sliding_window=6), dict(softcap=0.8), dict(alibi_slopes=slopes),
        dict(attn_mask=bias[:, :1].expand_as(bias), sliding_window=7, softcap=2.0, alibi_slopes=slopes),
    ):  # fmt: skip
        ours = dict(options, alibi_slopes=slopes.expand(2, 4)) if "alibi_slopes" in options else options
        found = gate_gradient(case, causal=causal, window=WINDOW, sinks=SINKS, **ours)
        for got, wanted in zip(found, toggled_gradient(case, causal, **options), strict=True):
            torch.testing.assert_close(got, wanted)


def test_a_row_that_kept_nothing_learns_from_what_it_could_have():
    case = random_case(n_q=3, n_k=5)
    case[3].fill_(-3.0)
    case[4].fill_(-3.0)
    da, db = gate_gradient(case, causal=False, window=0, sinks=0)
    slope = torch.sigmoid(torch.tensor(-6.0, dtype=torch.float64))
    slope = slope * (1 - slope)
    effect = case[5].unflatten(1, (2, 2)).flatten(2, 3) @ case[2].transpose(2, 3)  # an admitted pair takes all
    torch.testing.assert_close(db, slope * TAU * effect.sum(2), rtol=1e-6, atol=1e-9)
    assert torch.isfinite(da).all()


def test_sampled_rows_give_the_same_on_average():
    case = random_case(n_q=16, n_k=16, batch=1, heads=2)
    options = dict(causal=True, window=WINDOW, sinks=SINKS)
    exact = gate_gradient(case, **options)
    torch.manual_seed(0)
    draws = [gate_gradient(case, rows=0.25, **options) for _ in range(600)]
    for position, expected in enumerate(exact):
        samples = torch.stack([draw[position] for draw in draws])
        error = samples.std(0) / math.sqrt(len(draws))
        assert ((samples.mean(0) - expected).abs() <= 5 * error + 1e-12).all()
    assert all((draw[0] != 0).sum() <= 4 * 2 for draw in draws)


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_rows_are_drawn_one_from_each_stratum_all_alike(share):
    n, draws = 50, 400
    torch.manual_seed(0)
    counts, wanted = torch.zeros(n), math.ceil(share * n)
    for _ in range(draws):
        rows = sample_rows(n, share, "cpu")
        strata = torch.arange(wanted) * (n / wanted)
        assert len(rows) == wanted
        assert (rows >= strata.floor()).all()
        assert (rows < strata + n / wanted).all()
        counts.index_add_(0, rows, torch.ones(wanted))
    expected = draws * wanted / n
    assert (counts - expected).abs().max() <= 5 * math.sqrt(expected)


def test_straight_through_reaches_pairs_that_the_operator_cannot():
    torch.manual_seed(0)
    gate, x = Gate(8, 2), torch.randn(1, 10, 8)
    q, k, v = torch.randn(3, 1, 2, 10, 4)
    with torch.no_grad():
        gate.query_bias.fill_(-2.0)  # every far pair is dropped
        gate.key_bias.fill_(-2.0)
    attend(gate, x, q, k, v, causal=True, window=2).square().sum().backward()
    assert all((p.grad == 0).all() for p in gate.parameters())
    gate.phase, gate.rows = "straight_through", 1.0
    attend(gate, x, q, k, v, causal=True, window=2).square().sum().backward()
    assert all((p.grad != 0).all() for p in gate.parameters())


def test_gradients_of_q_k_and_v_are_those_of_the_deployed_function():
    torch.manual_seed(0)
    gate, x = Gate(8, 2), torch.randn(1, 10, 8)
    inputs = [torch.randn(1, 2, 10, 4, requires_grad=True) for _ in range(3)]
    hard = torch.autograd.grad(attend(gate, x, *inputs, causal=True).square().sum(), inputs)
    gate.phase, gate.rows = "straight_through", 1.0
    soft = torch.autograd.grad(attend(gate, x, *inputs, causal=True).square().sum(), inputs)
    assert all(torch.equal(one, other) for one, other in zip(hard, soft, strict=True))


def test_saturated_logits_and_empty_sequences_stay_finite():
    case = list(random_case(n_q=6, n_k=6))
    case[3][..., 0], case[3][..., 1] = 100.0, -100.0
    da, db = gate_gradient(case, causal=True, window=0, sinks=0)
    assert torch.isfinite(da).all()
    assert torch.isfinite(db).all()
    assert (da[..., :2] == 0).all()
    empty = random_case(n_q=0, n_k=0)
    assert gate_gradient(empty, causal=True, window=0, sinks=0)[0].shape == (2, 4, 0)


def test_half_precision_keeps_the_gates_gradient_in_float32():
    torch.manual_seed(0)
    gate, x = Gate(8, 2), torch.randn(1, 10, 8)
    gate.phase, gate.rows = "straight_through", 1.0
    q, k, v = torch.randn(3, 1, 2, 10, 4)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        gate.zero_grad()
        attend(gate, x, *(t.to(dtype) for t in (q, k, v)), causal=True).float().square().sum().backward()
        gradients.append(gate.key_bias.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.03, atol=0.03)
