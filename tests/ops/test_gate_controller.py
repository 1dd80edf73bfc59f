"""Controllers: they drive a toy to a density or a quality, lead gates through their phases, and survive a restart."""

import warnings

import pytest
import torch
from torch import nn

import torch_sluice
from torch_sluice.attention import DensityController, Gate, QualityController, attend, parameter_groups
from torch_sluice.attention.density import kept_pairs


class Toy(nn.Module):
    """Two gated layers over a few tokens."""

    def __init__(self, learn=True, window=2):
        super().__init__()
        self.gates = nn.ModuleList(Gate(8, 2, learn=learn) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.window = window

    def forward(self, x):
        for gate, qkv in zip(self.gates, self.qkv, strict=True):
            q, k, v = qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
            out = attend(gate, x, q, k, v, causal=True, window=self.window)
            x = x + out.transpose(1, 2).flatten(2)
        return x


def make_toy(seed=0, **options):
    torch.manual_seed(seed)
    return Toy(**options)


def loss_of(model, x):
    """Predict the mean of the past: what far pairs are good for."""
    wanted = x.cumsum(1) / torch.arange(1, x.shape[1] + 1).view(1, -1, 1)
    return (model(x) - wanted).square().mean()


def run(model, controller, steps, n=32, rate=1e-2):
    optimizer = torch.optim.Adam(parameter_groups(model, rate))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = loss_of(model, torch.randn(2, n, 8, generator=generator))
        controller.loss(loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()


@pytest.mark.parametrize(
    "recipe", [dict(), dict(noise=1.0, rows=0.0), dict(straight_through=0.3, rows=0.0), dict(gain=1.0, ramp=0.0)]
)
def test_density_reaches_the_target(recipe):
    model = make_toy()
    controller = DensityController(model, 0.4, 60, **recipe)
    assert controller.goal == (0.4 if recipe.get("ramp") == 0.0 else 1.0)
    assert controller.density == 1.0
    run(model, controller, 60)
    assert controller.goal == pytest.approx(0.4)
    assert controller.density < 0.45
    controller.close()
    assert controller.phase == "hard"
    assert all(gate.record is None for gate in model.gates)


def test_density_is_that_of_the_last_step_over_all_layers():
    model = make_toy()
    with torch.no_grad():  # the second layer keeps its window of 2 only: 63 of 528 pairs
        model.gates[1].query_bias.fill_(-9.0)
    controller = DensityController(model, 0.4, 10)
    run(model, controller, 1, rate=0.0)
    assert controller.density == pytest.approx((1 + 63 / 528) / 2)


def test_loss_gains_the_mean_gate_times_the_strength():
    model = make_toy()
    controller = DensityController(model, 0.4, 10)
    controller.strength = 3.0
    loss = loss_of(model, torch.randn(2, 32, 8))
    torch.testing.assert_close(controller.loss(loss), loss + 3.0 * 0.95)


def test_micro_batches_are_measured_together():
    model = make_toy()
    controller = DensityController(model, 0.12, 10, ramp=0.0, gain=1.0)
    for bias in (9.0, -9.0):
        with torch.no_grad():
            for gate in model.gates:
                gate.query_bias.fill_(bias)
        controller.loss(loss_of(model, torch.randn(2, 32, 8)))
    controller.step()
    assert controller.density == pytest.approx((1 + 63 / 528) / 2)
    assert controller.strength == pytest.approx(controller.density - 0.12)


def test_a_forward_without_loss_does_not_count():
    model = make_toy()
    controller = DensityController(model, 0.4, 10)
    model(torch.randn(2, 32, 8))
    with torch.no_grad():
        for gate in model.gates:
            gate.query_bias.fill_(-9.0)
    loss = loss_of(model, torch.randn(2, 32, 8))
    model.eval()(torch.randn(2, 32, 8))
    controller.loss(loss)
    controller.step()
    assert controller.density == pytest.approx(63 / 528)


def test_quality_controller_closes_while_the_loss_allows():
    model = make_toy()
    controller = QualityController(model, 10.0, 60, gain=0.3)
    run(model, controller, 60)
    assert controller.density < 0.45
    assert controller.strength > 1


def test_quality_controller_never_closes_for_a_ceiling_that_the_loss_is_above():
    model = make_toy()
    controller = QualityController(model, 1e-6, 30, gain=0.3)
    run(model, controller, 5)
    assert controller.count == 5
    assert controller.smoothed_loss > 1e-3
    assert controller.strength == 0


def test_quality_controller_backs_off_above_the_ceiling():
    model = make_toy()
    controller = QualityController(model, 0.01, 10, gain=1.0, smoothing=0.0)
    controller.strength = 5.0
    controller.loss(loss_of(model, torch.randn(2, 32, 8)) * 0 + 0.03)
    controller.step()
    assert controller.smoothed_loss == pytest.approx(0.03)
    assert controller.strength == pytest.approx(5.0 - 2.0)


def test_phases_come_in_order():
    model = make_toy()
    controller = DensityController(model, 0.4, 10, straight_through=0.3, rows=0.25, noise=0.5, hard=0.2)
    seen = []
    for _ in range(11):
        gate = model.gates[1]
        seen.append((controller.phase, gate.rows, gate.noise if gate.phase == "noise" else None))
        controller.step()
    assert seen == [("straight_through", 1.0, None)] * 3 + [("noise", 0.25, 0.5)] * 5 + [("hard", 0.0, None)] * 3


@pytest.mark.parametrize("kind", [DensityController, QualityController])
def test_a_restart_goes_on_where_it_stopped(kind):
    whole, halves = make_toy(), make_toy()
    options = dict(rows=0.0)
    once, first = kind(whole, 0.5, 20, **options), kind(halves, 0.5, 20, **options)
    run(whole, once, 8, rate=0.0)
    run(halves, first, 8, rate=0.0)
    first.close()
    second = kind(halves, 0.5, 20, **options)
    second.load_state_dict(first.state_dict())
    run(whole, once, 5, rate=0.0)
    run(halves, second, 5, rate=0.0)
    assert second.state_dict() == once.state_dict()
    assert second.phase == once.phase
    assert once.count == 13


@pytest.mark.parametrize("bad", [{}, {"count": 1, "strength": float("nan"), "density": 1.0}])
def test_a_restart_refuses_a_bad_state(bad):
    with pytest.raises(ValueError, match="state"):
        DensityController(make_toy(), 0.5, 20).load_state_dict(bad)


def test_a_target_that_the_window_forbids_is_said_once():
    model = make_toy(window=16)
    controller = DensityController(model, 0.2, 4, ramp=0.0)
    with pytest.warns(UserWarning, match=r"target_density is 0.2, but window and sinks alone keep 0.742"):
        run(model, controller, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, controller, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 10), "target_density is 0.0"),
        ((1.5, 10), "target_density is 1.5"),
        ((float("nan"), 10), "target_density is nan"),
        ((0.5, 0), "steps is 0"),
        ((0.5, 1.5), "steps is 1.5"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DensityController(make_toy(), *arguments)


@pytest.mark.parametrize(
    "option", [dict(gain=-1.0), dict(ramp=2.0), dict(rows=-0.1), dict(noise=float("inf")), dict(straight_through=0.95)]
)
def test_bad_options_are_named(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is"):
        DensityController(make_toy(), 0.5, 10, **option)


@pytest.mark.parametrize("options", [dict(ceiling=0.0), dict(ceiling=1.0, smoothing=1.0), dict(ceiling=1.0, gain=-1.0)])
def test_bad_quality_options_are_named(options):
    with pytest.raises(ValueError, match=f"{list(options)[-1]} is"):
        QualityController(make_toy(), steps=10, **options)


def test_a_model_without_a_gate_that_learns_is_refused():
    for model in (nn.Linear(2, 2), make_toy(learn=False)):
        for target in (0.5, None):
            with pytest.raises(ValueError, match="without a gate that learns"):
                DensityController(model, target, 10)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_the_target_is_that_of_the_gates_unless_given(wrap):
    swapped = torch_sluice.swap_attention(nn.TransformerEncoderLayer(8, 2, 16), target_density=0.3)
    layer = torch_sluice.GatedAttention(8, 2, target_density=0.25)
    for model, target in ((swapped, 0.3), (layer, 0.25)):
        assert DensityController(wrap(model), steps=10).target_density == target
        assert DensityController(wrap(model), 0.5, 10).target_density == 0.5


def test_gates_without_a_target_or_with_two_are_refused():
    with pytest.raises(ValueError, match=r"target_density is None, expected a number in \(0, 1\] here or"):
        DensityController(make_toy(), steps=10)
    two = nn.ModuleList(torch_sluice.GatedAttention(8, 2, target_density=target) for target in (0.3, 0.2))
    with pytest.raises(ValueError, match=r"target_density is None and the gates of model have \[0\.2, 0\.3\]"):
        DensityController(two, steps=10)
    with pytest.raises(ValueError, match="steps is None"):
        DensityController(two[0])


def test_gates_that_were_frozen_since_are_said_once():
    """As an adapter's library freezes all that it has not made itself."""
    model = make_toy()
    controller = DensityController(model, target_density=0.5, steps=10)
    x = torch.randn(2, 16, 8)
    controller.loss(loss_of(model, x))
    model.requires_grad_(False)
    adapter = torch.zeros(8, requires_grad=True)
    with pytest.warns(UserWarning, match="no gate learns: none of their parameters .*gate_parameters") as caught:
        for _ in range(3):
            controller.loss(loss_of(model, x + adapter))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for parameter in torch_sluice.gate_parameters(model):
            parameter.requires_grad_(True)
        controller.loss(loss_of(model, x + adapter))


def test_loss_without_a_forward_is_refused():
    controller = DensityController(make_toy(), 0.5, 10)
    with pytest.raises(RuntimeError, match="no gate was used since the last loss"):
        controller.loss(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"loss is 1\.0, expected a tensor of one element"):
        controller.loss(1.0)
    controller.step()  # nothing was measured, and nothing moves
    assert controller.count == 1
    assert controller.strength == 0
    assert controller.density == 1


def test_gates_are_a_group_of_their_own():
    model = make_toy()
    rest, gates = parameter_groups(model, 1e-3, 0.1)
    assert gates["lr"] == pytest.approx(1e-2)
    assert gates["weight_decay"] == 0
    assert rest["weight_decay"] == 0.1
    assert {id(p) for p in gates["params"]} == {id(p) for gate in model.gates for p in gate.parameters()}
    assert len(rest["params"]) + len(gates["params"]) == len(list(model.parameters()))
    assert parameter_groups(model, 1e-3, gate_lr=0.5)[1]["lr"] == 0.5
    model.qkv[0].weight.requires_grad_(False)
    for gate in model.gates:
        gate.requires_grad_(False)
    (only,) = parameter_groups(model, 1e-3)
    assert len(only["params"]) == 3


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_density_is_what_the_kernel_counted_but_for_noise(noise):
    torch.manual_seed(0)
    heads, n = 2, 1024  # 2^21 pairs, of which a sample would look at a quarter
    model = torch_sluice.GatedAttention(8, heads, window=2)
    with torch.no_grad():
        for parameter in model.gate.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    controller = DensityController(model, 0.4, 10, noise=noise, rows=0.0, hard=0.0)
    x = torch.randn(1, n, 8)
    controller.loss(model(x).square().mean())
    controller.step()
    kept, possible = kept_pairs(*model.gate(x), tau=model.gate.tau, causal=model.causal, window=2)
    density = float(kept.sum() / (possible.sum() * heads))
    assert controller.density == pytest.approx(density, abs=0.05 if noise else 1e-9)
    assert noise == 0 or controller.density != pytest.approx(density, abs=1e-6)
