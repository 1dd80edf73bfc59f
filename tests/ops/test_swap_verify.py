"""With example inputs a swap proves itself, or is undone."""

import pytest
import torch
from torch import nn

from torch_sluice import gate_parameters, swap_attention

DIM = 16


class Picky(nn.Module):
    """Does something else where its attention is not of the class that it made."""

    def __init__(self):
        super().__init__()
        self.good, self.bad = (nn.MultiheadAttention(DIM, 2, batch_first=True) for _ in range(2))

    def forward(self, x):
        x = self.good(x, x, x, need_weights=False)[0]
        return self.bad(x, x, x * (1.0 if type(self.bad) is nn.MultiheadAttention else 1.01), need_weights=False)[0]


X = torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("target_density", [None, 0.5])
@pytest.mark.parametrize("example", [(X,), {"x": X}], ids=["tuple", "dict"])
def test_a_swap_that_changes_outputs_is_undone(target_density, example):
    model = Picky().train()
    with pytest.raises(ValueError, match=r"bad \(MultiheadAttention\) gives other outputs on example.*differ by 0\.0"):
        swap_attention(model, target_density=target_density, example=example)
    assert type(model.good) is nn.MultiheadAttention
    assert not gate_parameters(model)
    assert model.training
    assert model.bad.training
    swap_attention(model, target_density=target_density, example=example, modules=["good"])
    assert type(model.bad) is nn.MultiheadAttention


def test_a_model_that_draws_is_compared_with_the_same_draws():
    class Noisy(Picky):
        def forward(self, x):
            return self.good(x + torch.randn_like(x), x, x, need_weights=False)[0]

    state = torch.get_rng_state()
    swap_attention(Noisy(), example=(X,), modules=["good"])
    torch.set_rng_state(state)


def test_nan_is_no_difference_where_it_was():
    model = nn.MultiheadAttention(DIM, 2, batch_first=True)
    everything = torch.ones(2, 5, dtype=torch.bool)
    everything[0] = False
    swap_attention(model, example=dict(query=X, key=X, value=X, key_padding_mask=everything, need_weights=False))
