"""Masks of swapped layers: windows that slide, and rows that see nothing."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from torch_sluice.swap.call import attend_open
from torch_sluice.swap.masks import read_mask

N = 9
PLACES = torch.arange(N)
DISTANCE = PLACES[:, None] - PLACES
PADDING = {
    "none": torch.ones(2, N, dtype=torch.bool),
    "left": torch.tensor([3, 0])[:, None] <= PLACES,
    "right": torch.tensor([6, N])[:, None] > PLACES,
}
LEAST = torch.finfo(torch.float32).min


def draw():
    torch.manual_seed(0)
    return [torch.randn(2, heads, N, 8, requires_grad=True) for heads in (4, 2, 2)]


def by_torch(q, k, v, mask):
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("dropped", [None, LEAST, -torch.inf], ids=["bool", "least", "inf"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("window", [1, 3, None])
@pytest.mark.parametrize("causal", [True, False])
def test_open_attention_is_that_of_torch(causal, window, padding, dropped):
    q, k, v = draw()
    keep = (DISTANCE >= 0) if causal else torch.ones(N, N, dtype=torch.bool)
    if window is not None:
        keep = keep & (DISTANCE.abs() < window)
    mask = keep & PADDING[padding][:, None, None]
    mask = mask if dropped is None else torch.zeros(mask.shape).masked_fill(~mask, dropped)
    pattern = read_mask(mask, 2, N, N, causal)
    assert pattern.window == (window or 0) or window == 1
    expected = by_torch(q, k, v, mask)
    with torch.no_grad():
        torch.testing.assert_close(attend_open(q, k, v, mask=mask, causal=causal, scale=None), expected)
    out = attend_open(q, k, v, mask=mask, causal=causal, scale=None)
    assert (out is None) == (pattern.uniform is not None)  # rows of means have a gradient that is torch's to give
    if out is None:
        return
    weights = torch.randn_like(out)
    ours = torch.autograd.grad((out * weights).sum(), (q, k, v))
    for mine, other in zip(ours, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(mine, other)


def test_masks_that_are_no_window():
    window = ((DISTANCE >= 0) & (DISTANCE < 3)).expand(2, 1, N, N)
    assert read_mask(window, 2, N, N, True).window == 3
    for i, j in ((4, 0), (8, 4), (0, 5)):
        other = window.clone()
        other[1, 0, i, j] = True
        assert read_mask(other, 2, N, N, True) is None
    hole = window.clone()
    hole[1, 0, 4, 4] = False
    assert read_mask(hole, 2, N, N, True) is None
    chunks = (PLACES[:, None] // 3 == PLACES // 3) & (DISTANCE >= 0)
    assert read_mask(chunks[None, None], 2, N, N, True) is None


def test_rows_of_two_kinds_of_nothing():
    """Where -inf and the most negative number meet, the mean is that of some values: it is left to torch."""
    mask = torch.zeros(2, 1, N, N).masked_fill(~(DISTANCE >= 0), LEAST)
    mask[0, :, 0, 0] = -torch.inf
    assert read_mask(mask, 2, N, N, True) is None


def test_shapes_that_torch_broadcasts():
    q, k, v = draw()
    assert attend_open(q[:1], k, v, mask=None, causal=False, scale=None) is None
    assert attend_open(q, k, v.double(), mask=None, causal=False, scale=None) is None
    assert attend_open(q, k, v, mask=torch.zeros(N, N), causal=False, scale=None) is None
    assert attend_open(q, k, v, mask=torch.zeros(2, 1, N, N, dtype=torch.long), causal=False, scale=None) is None
