"""Counting the pairs that a gate keeps, against counting them one by one."""

import itertools
import math

import pytest
import torch

from torch_sluice.attention import kept_pairs
from torch_sluice.attention.density import sample_gate
from torch_sluice.monitor import count_kept_pairs


def count_one_by_one(a, b, *, tau, causal=False, window=0, sinks=0, key_range=None):
    """kept [B, Hq], possible [B], and the mean gate and number of the far pairs."""
    n_q, n_k = a.shape[-1], b.shape[-1]
    i, j = torch.arange(n_q)[:, None] + n_k - n_q, torch.arange(n_k)
    z = a[..., None] + b.repeat_interleave(a.shape[1] // b.shape[1], 1)[..., None, :]
    valid = (j <= i) if causal else torch.ones(n_q, n_k, dtype=torch.bool)
    valid = valid.expand(len(a), 1, n_q, n_k)
    if key_range is not None:
        begin, end = key_range[:, :, None, None, None].unbind(1)
        valid = valid & (j >= begin) & (j < end)
    first = 0 if key_range is None else key_range[:, 0, None, None, None]
    fixed = ((i - j).abs() < window) | (j - first < sinks) | (causal & (i == j))
    kept = (fixed | ~(z < (math.log(tau / (1 - tau)) if tau else -math.inf))) & valid
    far = (valid & ~fixed).expand(z.shape)
    return kept.sum((-1, -2)), valid.sum((1, 2, 3)), (z.sigmoid() * far).sum() / far.sum().clamp(min=1), far.sum()


@pytest.mark.parametrize(("n_q", "n_k"), [(64, 64), (40, 70), (70, 40), (1, 30)])
@pytest.mark.parametrize("causal", [True, False])
def test_count_is_exact(n_q, n_k, causal):
    torch.manual_seed(0)
    padding = torch.tensor([[2, n_k - 1], [0, n_k]])
    for window, sinks, tau, key_range in itertools.product((0, 5, 200), (0, 3, 100), (0.0, 0.5), (None, padding)):
        # Multiples of 1/4, so that ties with the threshold and with each other are common.
        a, b = (torch.randn(2, 4, n_q) * 4).round() / 4, (torch.randn(2, 2, n_k) * 4).round() / 4
        options = dict(tau=tau, causal=causal, window=window, sinks=sinks, key_range=key_range)
        kept, possible = kept_pairs(a, b, **options)
        expected_kept, expected_possible, expected_mean, far = count_one_by_one(a, b, **options)
        assert torch.equal(kept, expected_kept)
        assert torch.equal(possible, expected_possible)
        mean, sampled, near, total = sample_gate(a, b, **options)  # small enough that the sample is everything
        torch.testing.assert_close(mean, expected_mean, atol=1e-6, rtol=1e-6)
        assert round(sampled.item()) == kept.sum()
        assert total == possible.sum() * 4
        assert total - near == far


def test_count_is_exact_at_a_length_with_many_levels():
    torch.manual_seed(1)
    a, b = torch.randn(1, 2, 700), torch.randn(1, 1, 700)
    options = dict(tau=0.6, causal=True, window=16, sinks=4)
    assert torch.equal(kept_pairs(a, b, **options)[0], count_one_by_one(a, b, **options)[0])


def test_nan_and_huge_logits_count_as_the_operator_takes_them():
    a, b = torch.tensor([[[0.0, 50.0, -50.0, float("nan")]]]), torch.tensor([[[1.0, float("nan"), -45.0, 45.0]]])
    kept, possible = kept_pairs(a, b, tau=0.5)
    # By row: 0 keeps 1, NaN, 45; 50, clamped, keeps all (40 - 40 = 0 is kept); -50 NaN and 45; NaN keeps all.
    assert kept.item() == 3 + 4 + 2 + 4
    assert possible.item() == 16


def test_sample_of_rows_estimates_count_and_mean():
    torch.manual_seed(2)
    a, b = torch.randn(1, 4, 2048), torch.randn(1, 4, 2048) - 0.5
    options = dict(tau=0.5, causal=True, window=32, sinks=4)
    kept, possible = kept_pairs(a, b, **options)
    draws = torch.tensor([[float(x) for x in sample_gate(a, b, **options)] for _ in range(20)])
    share = kept.sum().item() / (possible.item() * 4)
    assert (draws[:, 1] / draws[:, 3]).mean().item() == pytest.approx(share, abs=0.01)
    assert (draws[:, 1] / draws[:, 3]).std() < 0.03
    assert draws[:, 3].eq(possible.item() * 4).all()


def test_mean_gate_pushes_every_far_token_down_and_no_other():
    a, b = torch.zeros(1, 2, 8, requires_grad=True), torch.zeros(1, 1, 8, requires_grad=True)
    sample_gate(a, b, causal=True, window=3, sinks=1)[0].backward()
    assert (a.grad[..., :4] == 0).all()
    assert (a.grad[..., 4:] > 0).all()
    assert (b.grad[..., 1:5] > 0).all()
    assert b.grad[..., 0].item() == 0
    assert (b.grad[..., 5:] == 0).all()


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 4, 0)])
def test_empty_inputs_keep_nothing(shape):
    a, b = torch.zeros(shape, requires_grad=True), torch.zeros(shape)
    kept, possible = kept_pairs(a, b)
    assert kept.sum() == 0
    assert possible.sum() == 0
    mean = sample_gate(a, b)[0]
    mean.backward()
    assert mean == 0


@pytest.mark.parametrize("sliding_window", [0, 7])
def test_pairs_behind_a_mask_are_neither_kept_nor_possible(sliding_window):
    a, b = torch.randn(2, 4, 20), torch.randn(2, 2, 20)
    options = dict(causal=True, window=3, sinks=2, sliding_window=sliding_window)
    for shape in ((2, 4, 20, 20), (1, 1, 20, 20), (2, 1, 1, 20)):
        mask = torch.rand(shape) < 0.7
        for each in (mask, torch.zeros(shape).masked_fill(~mask, -math.inf)):
            mean, kept, near, possible = sample_gate(a, b, tau=0.6, attn_mask=each, **options)
            logit_tau = torch.full((2, 4), 0.6).logit()
            assert (kept.round(), possible) == count_kept_pairs(a, b, logit_tau, attn_mask=each, **options)
            counted = kept_pairs(a, b, tau=0.6, attn_mask=each, **options)
            assert tuple(x.sum() for x in counted) == (kept.round(), possible)
            everything = torch.full((2, 4), math.inf)
            assert near == count_kept_pairs(a, b, everything, attn_mask=each, **options)[0]
            i, j = torch.arange(20)[:, None], torch.arange(20)
            far = (j <= i - 3) & (j >= 2) & mask.expand(2, 4, 20, 20)
            far &= (i - j < sliding_window) if sliding_window else True
            gates = (a.unsqueeze(-1) + b.repeat_interleave(2, 1).unsqueeze(-2)).sigmoid()
            torch.testing.assert_close(mean, gates[far].mean())
