"""QuantizedLinear and QuantizedConv2d: close to their floating-point originals, saved, traced, counted; folding."""

import pytest
import torch
from support.devices import INDUCTOR
from torch import nn

from torch_sluice.compress import QuantizedConv2d, QuantizedLinear, count_bits
from torch_sluice.compress.folding import fold_batch_norms
from torch_sluice.monitor import bits as widths
from torch_sluice.quantize import unpack_linear_weight


def relative_error(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def has_convolution():
    return torch._C._dispatch_has_kernel_for_dispatch_key("sluice::conv2d_dynamic", "CPU")


CONVOLUTION = pytest.mark.skipif(not has_convolution(), reason="the operator library has no conv2d_dynamic")
BOUNDS = {8: 0.03, 4: 0.2}  # of a layer's output, with weights of these bits


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_linear_layer_is_close_to_its_original(weight_bits, bias, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(100, 33, bias=bias)
    quantized = QuantizedLinear.from_float(linear, weight_bits=weight_bits, group_size=32 if weight_bits == 4 else 0)
    x = torch.randn(2, 7, 100).to(dtype)
    with torch.no_grad():
        out, expected = quantized(x), linear(x.float())
    assert out.dtype == dtype
    assert out.shape == (2, 7, 33)
    assert relative_error(out, expected) < BOUNDS[weight_bits]
    assert sum(b.numel() * b.element_size() for b in quantized.buffers()) < 0.75 * 4 * 100 * 33


@CONVOLUTION
@pytest.mark.parametrize(
    "arguments",
    [
        dict(kernel_size=3), dict(kernel_size=3, padding=1, stride=2), dict(kernel_size=(1, 3), padding=(0, 1)),
        dict(kernel_size=3, padding="same", dilation=2), dict(kernel_size=3, padding="valid", groups=2),
        dict(kernel_size=1),
    ],
)  # fmt: skip
def test_a_convolution_is_close_to_its_original(arguments):
    torch.manual_seed(0)
    for bias in (True, False):
        conv = nn.Conv2d(8, 18, bias=bias, **arguments)
        quantized = QuantizedConv2d.from_float(conv)
        x = torch.randn(3, 8, 12, 11)
        with torch.no_grad():
            for inputs in (x, x.to(memory_format=torch.channels_last), x[0], x[:1]):
                out, expected = quantized(inputs), conv(inputs)
                assert out.shape == expected.shape
                assert relative_error(out, expected) < BOUNDS[8]


def test_what_a_convolution_cannot_be_is_said():
    for conv, reason in (
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "padding_mode is 'reflect'"),
        (nn.Conv2d(3, 4, 2, padding="same"), "padding is not the same on both sides"),
    ):
        with pytest.raises(ValueError, match=reason):
            QuantizedConv2d.from_float(conv)


def layers():
    torch.manual_seed(0)
    yield QuantizedLinear.from_float(nn.Linear(20, 7)), torch.randn(5, 20)
    yield QuantizedLinear.from_float(nn.Linear(64, 9, bias=False), weight_bits=4, group_size=32), torch.randn(2, 3, 64)
    if has_convolution():
        yield QuantizedConv2d.from_float(nn.Conv2d(3, 5, 3, padding=1)), torch.randn(2, 3, 6, 6)


def test_state_and_config_recreate_a_layer():
    for layer, x in layers():
        twin = type(layer)(**layer.config())
        twin.load_state_dict(layer.state_dict())
        with torch.no_grad():
            assert torch.equal(twin(x), layer(x))
        for text in ("weight_bits=", "policy='sqnr'", "bias="):
            assert text in repr(layer)


def test_layers_are_exported_and_compiled():
    for layer, x in layers():
        model = nn.Sequential(layer, nn.ReLU()).requires_grad_(False)
        with torch.no_grad():
            expected = model(x)
            assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
            torch._dynamo.reset()
            assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


@INDUCTOR
def test_a_model_is_compiled_ahead_for_batches_of_any_size(tmp_path):
    layer, _ = next(layers())
    model = nn.Sequential(layer, nn.ReLU()).requires_grad_(False)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, layer.in_features),), dynamic_shapes=({0: batch},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        run = torch._inductor.aoti_load_package(path)
        for rows in (1, 5):
            x = torch.randn(rows, layer.in_features)
            assert torch.equal(run(x), model(x))


@INDUCTOR
def test_inductor_takes_a_quantised_layer():
    layer, x = next(layers())
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_rows_with_inf_or_nan_stay_apart():
    layer = QuantizedLinear.from_float(nn.Linear(20, 7))
    x = torch.randn(5, 20)
    with torch.no_grad():
        clean = layer(x)
        x[1, 3], x[4, 0] = torch.inf, torch.nan
        out = layer(x)
    assert out[[1, 4]].isnan().all()
    assert torch.equal(out[[0, 2, 3]], clean[[0, 2, 3]])


def test_empty_and_single_inputs():
    layer = QuantizedLinear.from_float(nn.Linear(20, 7))
    with torch.no_grad():
        for shape in ((0, 20), (20,), (1, 1, 20), (2, 0, 20)):
            assert layer(torch.zeros(shape)).shape == (*shape[:-1], 7)
        one = QuantizedLinear.from_float(nn.Linear(1, 1))
        assert one(torch.ones(1, 1)).shape == (1, 1)


def test_the_widths_that_inputs_take_are_counted():
    model = nn.Sequential(QuantizedLinear.from_float(nn.Linear(64, 8), target_sqnr=30.0))
    assert count_bits(model) == {0: 0, 4: 0, 7: 0, 8: 0, 16: 0}
    x = torch.randn(10, 64)
    x[0] = 0
    x[1, 0] = torch.nan
    with torch.no_grad():
        model(x)
    counts = count_bits(model, enabled=False)
    assert sum(counts.values()) == 10
    assert counts[0] == 1
    assert counts[7] == 8
    with torch.no_grad():
        model(x)
    assert count_bits(model) == counts
    amax = nn.Sequential(QuantizedLinear.from_float(nn.Linear(64, 8), policy="amax"))
    count_bits(amax)
    with torch.no_grad():
        amax(torch.full((3, 64), 0.05))
        amax(torch.full((2, 64), 0.5))
    assert count_bits(amax) == {0: 0, 4: 0, 7: 0, 8: 3, 16: 2}


def test_monitors_hear_of_the_widths(monkeypatch):
    layer, heard = QuantizedLinear.from_float(nn.Linear(20, 7)), []
    monkeypatch.setattr(widths, "listeners", [lambda bits, module: heard.append((bits, module))])
    with torch.no_grad():
        layer(torch.randn(3, 20))
    ((bits, module),) = heard
    assert module is layer
    assert bits.shape == (3,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(weight_bits=5), "weight_bits is 5, expected 8 or 4"),
        (dict(policy="best"), "quantize_policy is 'best', expected 'sqnr' or 'amax'"),
        (dict(group_size=-32), "group_size is -32, expected a multiple of 32"),
        (dict(target_sqnr=500.0), "target_sqnr is 500.0, expected 0 to 200 dB"),
    ],
)
def test_options_that_are_not_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        QuantizedLinear.from_float(nn.Linear(4, 4), **options)


def test_weights_that_are_not_finite_are_refused():
    linear = nn.Linear(4, 4)
    nn.init.constant_(linear.weight, float("inf"))
    with pytest.raises(ValueError, match="expected"):
        QuantizedLinear.from_float(linear)


def test_weights_are_those_that_the_integers_stand_for():
    linear = nn.Linear(40, 6)
    layer = QuantizedLinear.from_float(linear)
    weight = unpack_linear_weight(layer.packed, layer.weight_scale, out_features=6, in_features=40)
    assert (weight - linear.weight).abs().max() <= 0.51 * linear.weight.abs().max() / 127


class Shared(nn.Module):
    """A norm behind a layer whose output something else reads, too: folding must leave it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.linear, self.norm1 = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        y = self.conv(x)
        return self.norm1(self.linear((self.norm(y) + y).mean((2, 3))))


def test_batch_norms_are_folded_where_that_changes_nothing():
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(4, 3, 8, 8)
    for norm in (model.norm, model.norm1):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        expected = model(x)
        assert fold_batch_norms(model, x) == ["norm1"]
        assert isinstance(model.norm, nn.BatchNorm2d)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
