"""What a monitor takes from the model by itself: kept pairs, widths of quantised inputs, 16-bit sums of gradients."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import torch_sluice
from torch_sluice.monitor import KeptPairCounter, Monitor, bits, formulas


def watch(model, **options):
    return Monitor(model, peak_flops=1e9, mfu_limit=None, memory_ratio_limit=None, **options)


@pytest.fixture
def gated():
    """A gated attention whose gate keeps some of the pairs, and an input for it."""
    generator = torch.Generator().manual_seed(1)
    model = torch_sluice.GatedAttention(16, 2, window=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.gate.query_bias.zero_()
        model.gate.key_bias.zero_()
    return model, torch.randn(2, 40, 16, generator=generator)


def test_the_density_comes_from_the_gates(gated):
    model, x = gated
    with KeptPairCounter() as counter:
        model(x)
    assert 0 < counter.density < 1
    with watch(model) as monitor, monitor.step():
        model(x)
    assert monitor.density == pytest.approx(counter.density, rel=1e-6)
    assert monitor.latest["density"] == monitor.density


def test_operations_are_counted_as_executed_and_as_dense(gated):
    model, x = gated
    with KeptPairCounter() as counter:
        model(x)
    with watch(model) as monitor, monitor.step():
        model(x).sum().backward()
    count = monitor.flops
    each = (2 + 2 + 6 + 4) * 8  # of a pair of a head of 8, forward and backward
    assert count.gated == counter.kept * each
    assert count.gated_dense_equivalent == counter.total * each
    assert count.dense_equivalent - count.executed == (counter.total - counter.kept) * each
    assert monitor.latest.get("mfu") is None  # a counted step is not timed
    monitor_again = watch(model)
    monitor_again.flops = count
    monitor_again.record(1.0, density=0.25)
    executed = count.executed - count.gated + round(0.25 * count.gated_dense_equivalent)
    assert monitor_again.flops_per_step == executed
    assert monitor_again.latest["mfu_dense_equivalent"] == pytest.approx(count.dense_equivalent / 1e9)
    assert monitor_again.latest["mfu"] == pytest.approx(executed / 1e9)


def test_torch_counts_our_operator_too(gated):
    model, x = gated
    with FlopCounterMode(display=False) as torchs, torch.no_grad():
        model(x)
    with watch(model) as monitor, monitor.step(), torch.no_grad():
        model(x)
    assert torchs.get_total_flops() == monitor.flops.executed


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_model_that_gets_its_gates_after_the_monitor(steps_before):
    model, x = Attending().eval(), torch.randn(2, 12, 16)
    with watch(model) as monitor:
        for _ in range(steps_before):
            with monitor.step():
                model(x)
        before = monitor.parameter_bytes
        torch_sluice.swap_attention(model, target_density=0.5, window=2, sinks=1)
        gate = model.attention.sluice_gate
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.copy_(torch.randn(parameter.shape))
        if steps_before:
            monitor.record(1e6)  # so much later that looking is due again
        with KeptPairCounter() as counter:
            model(x)
        with monitor.step():
            model(x)
        after = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        summary = monitor.summary()
    assert 0 < counter.density < 1
    assert monitor.density == pytest.approx(counter.density, rel=1e-6)
    assert summary["parameter_bytes"] == after > before
    assert summary["memory_ratio"] == summary["peak_bytes"] / after


def test_a_model_that_changes_its_dtype_or_gets_its_parameters_later():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 4))
    with watch(model) as monitor:
        assert monitor.parameter_bytes == 4 * (8 * 4 + 4)
        model(torch.randn(2, 16))
        assert monitor.parameter_bytes == 4 * (16 * 8 + 8 + 8 * 4 + 4)
        model.bfloat16()
        assert monitor.summary()["parameter_bytes"] == 2 * (16 * 8 + 8 + 8 * 4 + 4)


def test_a_density_that_is_given_is_not_looked_for(gated):
    model, x = gated
    with watch(model) as monitor, monitor.step() as figures:
        model(x)
        figures["density"] = 0.125
    assert monitor.density == 0.125


def test_another_models_gates_are_not_heard(gated):
    model, x = gated
    with watch(nn.Linear(2, 2)) as monitor, monitor.step():
        model(x)
    assert monitor.density is None


def test_the_share_of_sixteen_bit_sums_comes_from_the_session():
    model = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch_sluice.accumulate(model, optimizer, every=2, policy="fp16") as session, watch(model) as monitor:
        for _ in range(2):
            with monitor.step():
                for _ in range(2):
                    model(torch.randn(4, 64)).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
    assert monitor.half_share == session.stats().fp16_share > 0


def test_chosen_bits_are_counted():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    bits.record(torch.tensor([4]))  # nobody listens
    with watch(model) as monitor, monitor.step():
        bits.record(torch.tensor([8, 8, 16], dtype=torch.int8), model)
        bits.record(torch.tensor([[4]]))
        bits.record(torch.tensor([16] * 9), other)
    assert monitor.summary()["bits"] == {"4": 0.25, "8": 0.5, "16": 0.25}
    assert monitor.latest["bits_8_share"] == 0.5


def test_nobody_listens_after_a_monitor_that_was_dropped_in_a_step():
    gc.collect()
    bits.record(torch.tensor([4]))
    assert bits.listeners == []
    monitor = watch(nn.Linear(2, 2))
    monitor.begin_step()
    assert len(bits.listeners) == 1
    monitor.abandon_step()
    assert bits.listeners == []
    monitor.record(0.1)
    del monitor
    gc.collect()
    bits.record(torch.tensor([4]))
    assert bits.listeners == []


def test_a_quantised_product_counts_both_passes_of_sixteen_bits():
    x, out = torch.randn(4, 16), torch.randn(4, 8)
    widths = torch.tensor([4, 8, 16, 16], dtype=torch.int8)
    counted = formulas._linear_dynamic(x, None, None, None, 8, 8, 0, 0, 1.0, True, 0.0, out_val=(out, widths))
    assert counted == (round(2 * 4 * 16 * 8 * 1.5), 2 * 4 * 16 * 8)
    image, out = torch.randn(1, 6, 5, 5), torch.randn(1, 4, 3, 3)
    window = ((3, 3), (1, 1), (0, 0), (1, 1), 2)
    counted = formulas._conv2d_dynamic(image, None, None, None, 4, *window, 8, 0, 0, 1.0, out_val=(out, widths[:1]))
    dense = 2 * out.numel() * (6 // 2) * 9
    assert counted == (dense, dense)


def test_a_quantised_recurrent_layer_counts_each_of_its_products():
    x, h, c = torch.randn(5, 2, 16), torch.randn(2, 6), torch.randn(2, 8)
    widths = torch.full((3, 10), 8, dtype=torch.int8)
    widths[1] = 16  # the state
    products = 2 * 16 * 32, 2 * 6 * 32, 2 * 8 * 6
    counted = formulas._lstm_dynamic(x, h, c, None, None, None, None, x, out_val=(x, h, c, widths))
    assert counted == (10 * (sum(products) + products[1]), 10 * sum(products))
    counted = formulas._gru_dynamic(x, c, None, out_val=(x, c, widths[:2]))
    assert counted == (10 * (2 * 16 * 24 + 2 * 2 * 8 * 24), 10 * (2 * 16 * 24 + 2 * 8 * 24))


def _train(monitored):
    torch.manual_seed(3)
    model = nn.Sequential(torch_sluice.GatedAttention(16, 2), nn.Dropout(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 600, 16)  # beyond what is counted exactly, so rows are sampled
    monitor = Monitor(model, mfu_limit=None, memory_ratio_limit=None) if monitored else None
    for _ in range(3):
        with monitor.step() if monitored else torch.enable_grad():
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    if monitored:
        assert monitor.density is not None
        assert monitor.summary()["mfu"] > 0  # so a peak has been measured
        monitor.close()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_a_monitor_changes_no_bit_of_the_training():
    for one, other in zip(_train(True), _train(False), strict=True):
        assert torch.equal(one, other)


def test_layers_with_quantised_weights_are_heard_by_their_own_monitor():
    layer = torch_sluice.compress.quantize_layer(nn.Linear(8, 4))
    monitor, other = watch(layer), watch(nn.Linear(8, 4))
    with monitor, other, monitor.step(), other.step(), torch.no_grad():
        layer(torch.randn(3, 8))
    assert sum(monitor.summary()["bits"].values()) == pytest.approx(1)
    assert not other.summary()["bits"]
