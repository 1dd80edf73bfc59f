"""A controller over activation checkpointing of either kind: what it measures and teaches is what it is without."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_sluice import GatedAttention, gate_parameters
from torch_sluice.attention import DensityController


class Layers(nn.Module):
    """Gated layers with dropout behind them; those of ``again`` are run again in backward."""

    def __init__(self, again=(), reentrant=True, dropout=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(GatedAttention(8, 2, causal=True, window=1, target_density=0.3) for _ in range(3))
        self.dropout, self.again, self.reentrant = nn.Dropout(dropout), again, reentrant

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            if number in self.again:
                x = x + checkpoint(self.run, layer, x, use_reentrant=self.reentrant)
            else:
                x = x + self.run(layer, x)
        return x

    def run(self, layer, x):
        return self.dropout(layer(self.dropout(x)))


def draw(seed=0):
    return torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def passes(model, controller, order):
    """The gradients of a step: ``order`` has a number for each forward, and the minus of it for its backward."""
    torch.manual_seed(3)
    losses, controller.strength = {}, 2.0
    for number in order:
        if number > 0:
            losses[number] = controller.loss(model(draw(number)).square().mean())
        else:
            (losses.pop(-number) / 4).backward()
    found = [parameter.grad for parameter in model.parameters()]
    controller.step()
    return found, controller.density


ORDERS = {"one": (1, -1), "in turn": (1, -1, 2, -2), "first out": (1, 2, -1, -2), "last out": (1, 2, -2, -1)}


@pytest.mark.parametrize("phase", [{}, dict(noise=1.0, rows=0.5), dict(straight_through=0.5)], ids=str)
@pytest.mark.parametrize("again", [(0, 1, 2), (1,)], ids=["all", "one"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_checkpointing_changes_neither_gradients_nor_density(order, reentrant, again, phase):
    results = []
    for layers in ((), again):
        model = Layers(layers, reentrant).train()
        controller = DensityController(model, steps=10, **phase)
        results.append(passes(model, controller, ORDERS[order]))
        controller.close()
    (ours, density), (expected, wanted) = results[1], results[0]
    assert density == pytest.approx(wanted)
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_the_mean_gate_is_what_moves_the_gates():
    """Without the controller's share the gradients of a re-entrant checkpoint are others."""
    model = Layers((0, 1, 2), dropout=0.0).train()
    controller = DensityController(model, steps=10, rows=0.0)
    gradients = []
    for strength in (0.0, 2.0):
        controller.strength = strength
        controller.loss(model(draw()).square().mean()).backward()
        gradients.append([parameter.grad.clone() for parameter in gate_parameters(model)])
        model.zero_grad()
    assert all(not torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("phase", [{}, dict(noise=1.0, rows=0.5), dict(straight_through=0.5)], ids=str)
@pytest.mark.parametrize("again", [(), (0, 2)], ids=["flat", "nested"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_a_checkpoint_around_the_whole_model(order, reentrant, again, phase):
    results = []
    for whole in (False, True):
        model = Layers(again if whole else (), reentrant).train()
        controller = DensityController(model, steps=10, **phase)
        results.append(passes(Whole(model, reentrant) if whole else model, controller, ORDERS[order]))
        controller.close()
    (ours, density), (expected, wanted) = results[1], results[0]
    assert density == pytest.approx(wanted)
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other)


class Whole(nn.Module):
    """A model within a checkpoint."""

    def __init__(self, model, reentrant=True):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


def test_a_forward_between_the_loss_of_another_and_its_backward():
    """What a checkpoint runs again leaves the records of a forward alone whose loss is still to come."""
    found = []
    for whole in (False, True):
        model = Layers(dropout=0.0).train()
        controller = DensityController(model, steps=10)
        controller.strength = 2.0
        wrapped = Whole(model) if whole else model
        first = controller.loss(wrapped(draw(1)).square().mean())
        out = wrapped(draw(2))
        first.backward()
        controller.loss(out.square().mean()).backward()
        controller.step()
        found.append([controller.density, *(p.grad for p in model.parameters())])
    for mine, other in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, other)


def test_a_loss_within_a_checkpoint():
    model = Layers().train()
    controller = DensityController(model, steps=10)
    with pytest.raises(RuntimeError, match=r"loss\(\) is called within a re-entrant checkpoint, expected it behind"):
        checkpoint(lambda x: controller.loss(model(x).square().mean()), draw(), use_reentrant=True)


def test_two_losses_in_one_backward():
    expected = None
    for again in ((), (0, 1, 2)):
        model = Layers(again, dropout=0.0).train()
        controller = DensityController(model, steps=10)
        controller.strength = 2.0
        sum(controller.loss(model(draw(seed)).square().mean()) for seed in (1, 2)).backward()
        found = [parameter.grad for parameter in model.parameters()]
        for mine, other in zip(found, expected or found, strict=True):
            torch.testing.assert_close(mine, other)
        expected = found


def test_what_runs_without_gradients_otherwise_counts_for_nothing():
    """A sample drawn in training mode between a forward and its loss, and a loss that nobody went back from."""
    gradients = []
    for again in ((0, 1, 2), ()):
        model = Layers(again, dropout=0.0).train()
        controller = DensityController(model, steps=10, rows=0.0)
        controller.strength = 2.0
        if again:
            controller.loss(model(draw(5)).square().mean())
        loss = model(draw(1)).square().mean()
        if again:
            with torch.no_grad():
                for layer in model.layers:
                    layer(draw(2))
        controller.loss(loss).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_copy_owes_nothing():
    model = Layers((0, 1, 2)).train()
    controller = DensityController(model, steps=10)
    loss = controller.loss(model(draw()).square().mean())
    copied = copy.deepcopy(model)
    assert not any(layer.gate.owed or layer.gate.recomputes for layer in copied.layers)
    loss.backward()
    controller.step()
    assert not any(layer.gate.owed for layer in model.layers)
