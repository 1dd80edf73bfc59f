"""The gate of an attention layer: its logits, and the one call that attends through it."""

import pytest
import torch

import torch_sluice
from torch_sluice import gated_attention
from torch_sluice.attention import Gate, attend


def random_gate(heads=4, kv_heads=2, dim=16, spread=0.5):
    gate = Gate(dim, heads, kv_heads)
    torch.nn.init.normal_(gate.query_weight, std=spread)
    torch.nn.init.normal_(gate.key_weight, std=spread)
    with torch.no_grad():
        gate.query_bias.fill_(0.0)
        gate.key_bias.fill_(0.0)
    return gate


def random_layer(n=24, heads=4, kv_heads=2, dim=16, batch=2):
    """x, q, k, v of an attention layer."""
    torch.manual_seed(0)
    return (torch.randn(batch, n, dim), *(torch.randn(batch, h, n, 8) for h in (heads, kv_heads, kv_heads)))


def test_gate_starts_at_its_opening_whatever_the_input():
    a, b = Gate(16, 4, 2, opening=0.9)(torch.randn(3, 5, 16))
    assert a.shape == (3, 4, 5)
    assert b.shape == (3, 2, 5)
    torch.testing.assert_close(torch.sigmoid(a[:, :2, :, None] + b[:, :, None, :]), torch.full((3, 2, 5, 5), 0.9))


def test_gate_that_does_not_learn_is_exactly_open_and_frozen():
    gate = Gate(16, 4, learn=False)
    a, b = gate(torch.randn(1, 5, 16))
    assert (torch.sigmoid(a[..., None] + b[..., None, :]) == 1).all()
    assert not any(p.requires_grad for p in gate.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_float32_even_under_autocast(dtype):
    gate = random_gate().to(dtype)
    x = torch.randn(2, 5, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = gate(x)
    assert a.dtype == b.dtype == torch.float32
    expected = x.float() @ gate.query_weight.float().T + gate.query_bias.float()
    torch.testing.assert_close(a, expected.transpose(1, 2))


def test_logits_follow_float64_inputs():
    a, b = Gate(16, 4).double()(torch.randn(1, 3, 16, dtype=torch.float64))
    assert a.dtype == b.dtype == torch.float64


def test_keys_may_come_from_another_input():
    gate = random_gate()
    x, key_x = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    a, b = gate(x, key_x)
    assert torch.equal(a, gate(x)[0])
    assert torch.equal(b, gate(key_x)[1])


def test_state_dict_restores_the_logits():
    gate, x = random_gate(), torch.randn(2, 5, 16)
    other = Gate(16, 4, 2)
    other.load_state_dict(gate.state_dict())
    assert all(torch.equal(old, new) for old, new in zip(gate(x), other(x), strict=True))
    other.reset_parameters()
    assert all(torch.equal(old, new) for old, new in zip(Gate(16, 4, 2)(x), other(x), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0, "heads": 4}, "dim is 0"),
        ({"dim": 16, "heads": -1}, "heads is -1"),
        ({"dim": 16, "heads": 2.0}, r"heads is 2\.0"),
        ({"dim": 16, "heads": 4, "kv_heads": 3}, "heads is 4, expected a multiple of kv_heads = 3"),
        ({"dim": 16, "heads": 4, "opening": 1.0}, "opening is 1.0"),
        ({"dim": 16, "heads": 4, "tau": 1.0}, "tau is 1.0"),
        ({"dim": 16, "heads": 4, "tau": float("nan")}, "tau is nan"),
        ({"dim": 16, "heads": 4, "target_density": 0.0}, "target_density is 0.0"),
    ],
)
def test_gate_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Gate(**arguments)


@pytest.mark.parametrize("x", [torch.zeros(2, 16), torch.zeros(1, 2, 15), torch.zeros(1, 2, 16, dtype=torch.long)])
def test_gate_refuses_bad_inputs(x):
    with pytest.raises(ValueError, match=r"x has shape .* expected a floating-point \[batch, tokens, 16\]"):
        Gate(16, 4)(x)
    with pytest.raises(ValueError, match="key_x has shape"):
        Gate(16, 4)(torch.zeros(1, 2, 16), x)


@pytest.mark.parametrize("training", [True, False])
def test_attend_is_the_operator_at_the_gates_threshold(training):
    gate = random_gate().train(training)
    if not training:  # phases are for training
        gate.phase, gate.noise, gate.rows = "noise", 3.0, 1.0
    x, q, k, v = random_layer()
    a, b = gate(x)
    options = dict(causal=True, window=3, sinks=1)
    expected = gated_attention(q, k, v, a, b, tau=gate.tau, **options)
    assert torch.equal(attend(gate, x, q, k, v, **options), expected)
    assert torch.equal(attend(gate, None, q, k, v, logits=(a, b), **options), expected)


def test_noise_moves_the_choice_and_is_drawn_anew():
    gate = random_gate()
    gate.phase, gate.noise = "noise", 1.0
    x, q, k, v = random_layer()
    first, second = (attend(gate, x, q, k, v, causal=True) for _ in range(2))
    assert not torch.equal(first, second)
    with torch.no_grad():  # nothing is taught without gradients
        assert torch.equal(attend(gate, x, q, k, v), attend(gate, x, q, k, v))


def test_phases_leave_the_output_as_deployed():
    gate = random_gate()
    x, q, k, v = random_layer()
    expected = attend(gate, x, q, k, v, causal=True)
    gate.rows = 1.0
    for gate.phase in ("straight_through", "noise"):  # noise is 0
        assert torch.equal(attend(gate, x, q, k, v, causal=True), expected)


def test_a_gate_is_recorded_only_while_it_is_taught_and_listened_to():
    gate = random_gate()
    x, q, k, v = random_layer()
    attend(gate, x, q, k, v)
    assert gate.record is None
    gate.record = []
    attend(gate.eval(), x, q, k, v)
    with torch.no_grad():
        attend(gate.train(), x, q, k, v)
    assert gate.record == []
    attend(gate, x, q, k, v, causal=True, window=2)
    assert len(gate.record) == 1
    assert gate.record[0].a.requires_grad
    assert gate.record[0].near["window"] == 2


def test_unknown_phase_is_named():
    gate = random_gate()
    gate.phase = "soft"
    with pytest.raises(ValueError, match=r"gate\.phase is 'soft', expected one of"):
        attend(gate, *random_layer())


def test_a_gate_that_is_taught_can_be_traced():
    torch.manual_seed(0)
    layer = torch_sluice.GatedAttention(16, 2, causal=True, window=2)
    gate, x = layer.gate, torch.randn(1, 16, 16)
    gate.phase, gate.rows, gate.record = "straight_through", 1.0, []
    layer(x).square().sum().backward()
    expected = gate.query_weight.grad.clone()
    gate.zero_grad()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    torch.testing.assert_close(gate.query_weight.grad, expected)
    assert len(gate.record) == 2
