"""Models that rank: the outputs of a sample stay as they are, or change altogether."""

import pytest
import torch
from torch import nn

import torch_sluice
from torch_sluice.compress.estimate import Score, largest_jump, student_quantile, with_jump


class Picking(nn.Module):
    """Shows the best of some anchors, as a detector its best query, and little of how good it is."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 6)
        self.register_buffer("anchors", torch.randn(6, 8))
        with torch.no_grad():
            self.first.weight[48:] *= 0.1

    def forward(self, x):
        scores = self.second(self.first(x).relu())
        return self.anchors[scores.argmax(1)] + 1e-3 * scores[:, :1]


@pytest.mark.parametrize("seed", [2, 6, 7])
def test_that_no_sample_jumped_is_no_promise_where_others_do(seed):
    model, generator = Picking(seed).eval(), torch.Generator().manual_seed(seed)
    x, fresh = torch.randn(64, 16, generator=generator), torch.randn(4000, 16, generator=generator)
    small = torch_sluice.compress(model, x[:1], [(part, None) for part in x.split(8)], keep=0.97, progress=False)
    with torch.no_grad():
        expected, got = model(fresh), small(fresh)
    assert 1 - float((got - expected).square().sum() / (expected - expected.mean(0)).square().sum()) >= 0.97
    assert any("changed the outputs of a sample altogether" in note for note in small.compression_report.notes)


def test_a_jump_is_what_one_sample_loses_beside_others_that_lose_next_to_nothing():
    scales = torch.ones(64, dtype=torch.float64)
    losses = 1e-7 * scales
    assert largest_jump(losses, scales) == 0
    losses[5] = 2
    assert largest_jump(losses, 2 * scales) == pytest.approx(1)
    assert largest_jump(losses + 0.02, scales) == 0  # the others lose, too: what is seen tells what is lost
    assert largest_jump(losses[5:6], scales[:1]) == 0


def test_a_bound_counts_a_jump_once():
    score = Score(0.999, 0.998, 64)
    low = 0.998 - 2 / 64 * (1 + student_quantile(63))
    assert with_jump(score, 2.0).low == pytest.approx(low)
    assert with_jump(with_jump(score, 1.5), 2.0).low == pytest.approx(low)
    assert with_jump(score, 0.0) is score
    assert with_jump(Score(0.999, 0.999, 1, known=False), 2.0).low == 0.999
