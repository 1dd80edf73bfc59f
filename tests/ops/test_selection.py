"""density=: the share of far pairs that is kept is the one that was asked for."""

import math

import pytest
import torch

from torch_sluice import gated_attention
from torch_sluice.selection import select_logit_tau

TOLERANCE, RMS_TOLERANCE = 0.03, 0.01  # what the docstring of select_logit_tau states


def kept_share(a, b, logit_tau, *, causal=False, window=0, sinks=0, key_range=None):
    """Share of the far pairs that the threshold [B, Hq] keeps, by looking at all of them; [B, Hq]."""
    b = b.repeat_interleave(a.shape[1] // b.shape[1], 1)
    n_q, n_k = a.shape[-1], b.shape[-1]
    i, j = torch.arange(n_k - n_q, n_k)[:, None], torch.arange(n_k)[None]
    first = 0 if key_range is None else key_range[:, 0, None, None, None]
    far = ((i - j).abs() >= window) & (j - first >= sinks)
    if causal:
        far = far & (j < i)
    far = far.expand(a.shape[0], 1, n_q, n_k)
    if key_range is not None:
        begin, end = key_range[:, 0, None, None, None], key_range[:, 1, None, None, None]
        far = far & (j >= begin) & (j < end)
    z = a.clamp(-40, 40)[..., :, None] + b.clamp(-40, 40)[..., None, :]
    kept = ~(z < logit_tau[..., None, None]) & far
    return kept.sum((-1, -2)) / far.sum((-1, -2)).clamp(min=1)


def gates(kind, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(1, 4, n, generator=generator), torch.randn(1, 2, n, generator=generator)
    position = torch.linspace(0, 1, n)
    if kind == "drifting":
        a, b = a + 4 * position, b + 3 * (2 * math.pi * 3 * position).sin()
    if kind == "heavy-tailed":
        a, b = a.pow(3), b.pow(5)
    if kind == "only queries":
        b = b * 0.01
    if kind == "only keys":
        a = a * 0.01
    if kind == "few keys":
        b = torch.where(b > 1.5, 8.0, -8.0) + 0.1 * b
    return a, b


KINDS = ("independent", "drifting", "heavy-tailed", "only queries", "only keys", "few keys")


@pytest.mark.parametrize("kind", KINDS)
def test_share_is_kept(kind):
    errors = []
    for n in (129, 400, 800):
        a, b = gates(kind, n)
        for options in (dict(), dict(causal=True), dict(causal=True, window=32, sinks=4)):
            for density in (0.02, 0.1, 0.4):
                share = kept_share(a, b, select_logit_tau(a, b, density, **options), **options)
                errors.append(share - density)
                assert errors[-1].abs().max() <= TOLERANCE, (n, options, density, share)
    assert torch.stack(errors).square().mean().sqrt() <= RMS_TOLERANCE


@pytest.mark.parametrize("causal", [False, True])
def test_exact_up_to_128_tokens(causal):
    a, b = gates("independent", 64)
    far = 64 * 63 // 2 if causal else 64 * 64
    for density in (0.0, 1 / far, 0.3, 1 - 1 / far, 1.0):
        share = kept_share(a, b, select_logit_tau(a, b, density, causal=causal), causal=causal)
        assert (share * far).round().unique().tolist() == [math.ceil(density * far - 1e-9)]


def test_padding_and_unequal_lengths():
    a, b = gates("independent", 700)
    a, b = torch.cat((a, a)), torch.cat((b, b))
    key_range = torch.tensor([[300, 700], [0, 650]])
    options = dict(causal=True, window=16, key_range=key_range)
    share = kept_share(a, b, select_logit_tau(a, b, 0.2, **options), **options)
    assert (share - 0.2).abs().max() <= 2 * TOLERANCE  # the sample is thinner by what is padding
    a = a[..., -100:]  # 100 queries at the end of 700 keys
    share = kept_share(a, b, select_logit_tau(a, b, 0.2, causal=True), causal=True)
    assert (share - 0.2).abs().max() <= TOLERANCE


def test_density_per_head():
    a, b = gates("independent", 600)
    density = torch.tensor([0.1, 0.2, 0.5, 0.9])
    share = kept_share(a, b, select_logit_tau(a, b, density))
    assert (share - density).abs().max() <= TOLERANCE


def test_ties_and_no_far_pairs_are_kept():
    a, b = torch.zeros(1, 2, 50), torch.zeros(1, 2, 50)
    assert (kept_share(a, b, select_logit_tau(a, b, 0.1)) == 1).all()
    assert (select_logit_tau(a, b, 0.1, window=50) == -math.inf).all()
    assert select_logit_tau(a[..., :0], b, 0.1).tolist() == [[-math.inf] * 2]
    assert select_logit_tau(a, b[..., :0], 0.1).tolist() == [[-math.inf] * 2]


def test_same_choice_each_time():
    a, b = gates("independent", 900)
    assert torch.equal(select_logit_tau(a, b, 0.2), select_logit_tau(a.clone(), b.clone(), 0.2))


def test_attention_at_a_density_is_attention_at_its_threshold():
    a, b = gates("independent", 200)
    q, k, v = torch.randn(1, 4, 200, 8), torch.randn(1, 2, 200, 8), torch.randn(1, 2, 200, 8)
    options = dict(causal=True, window=8)
    at_density = gated_attention(q, k, v, a, b, density=0.2, **options)
    tau = select_logit_tau(a, b, 0.2, **options)
    right, *_ = torch.ops.sluice.gated_attention(q, k, v, a, b, tau, *[None] * 7, True, 8, 0, 0, 0.0, 0.0, 8**-0.5)
    assert torch.equal(at_density, right)
    assert not torch.equal(at_density, gated_attention(q, k, v, a, b, **options))
    assert torch.equal(gated_attention(q, k, v, a, b, density=1.0), gated_attention(q, k, v, a, b))
