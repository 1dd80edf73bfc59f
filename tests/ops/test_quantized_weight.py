"""QuantizedWeight: what it answers, how it is copied, moved, pickled and saved, and what it refuses."""

import copy
import io
import pickle

import pytest
import torch
from support.quantized_layers import NAMES, quantized, relative_error, tied
from torch import nn

from torch_sluice.compress import QuantizedWeight, quantize_layer, unpack_weights
from torch_sluice.compress.layers import stored_bytes
from torch_sluice.compress.quantized import Options, rebuild


def run(layer, x):
    with torch.inference_mode():
        return layer(x)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_stays_what_it_is_and_its_weight_answers_as_before(name):
    layer, original, _ = quantized(name)
    weight = layer.weight
    assert type(layer) is type(original)
    assert isinstance(weight, QuantizedWeight)
    assert isinstance(weight, nn.Parameter)
    assert isinstance(weight, torch.Tensor)
    for attribute in ("dtype", "device", "shape", "ndim", "is_leaf", "layout"):
        assert getattr(weight, attribute) == getattr(original.weight, attribute)
    assert weight.stride() == original.weight.stride()
    assert weight.numel() == original.weight.numel()
    assert [name for name, _ in layer.named_parameters()] == [name for name, _ in original.named_parameters()]
    assert next(iter(layer.parameters())).dtype == torch.float32
    assert list(layer.state_dict()) == list(original.state_dict())
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert relative_error(weight.unpack(), original.weight) < (0.2 if name == "4 bits" else 0.01)
    assert "QuantizedWeight" in repr(weight)
    assert torch.equal(torch.zeros(2).to(weight.dtype), torch.zeros(2))


@pytest.mark.parametrize("name", NAMES)
def test_it_takes_fewer_bytes(name):
    layer = quantize_layer(nn.Conv2d(64, 64, 3) if name == "convolution" else nn.Linear(256, 256))
    assert stored_bytes(layer) < 0.3 * 4 * layer.weight.numel()
    assert layer.weight.nbytes == layer.weight.packed.nbytes + layer.weight.scale.nbytes


@pytest.mark.parametrize("name", NAMES)
def test_other_functions_get_ordinary_values(name):
    layer, _, _ = quantized(name)
    values = layer.weight.unpack()
    assert type(values) is torch.Tensor
    for function in (
        lambda w: w + 1, lambda w: w.abs().sum(), lambda w: w[0], lambda w: torch.cat([w, w]), lambda w: w.reshape(-1),
        lambda w: torch.einsum("i...->...", w), lambda w: torch.from_numpy(w.numpy()), lambda w: w.flatten(1).t(),
        lambda w: torch.zeros_like(w), lambda w: w.float(), lambda w: w.tolist(),
    ):  # fmt: skip
        got, expected = function(layer.weight), function(values)
        if isinstance(got, QuantizedWeight):
            got = got.unpack()
        if isinstance(expected, list):
            assert got == expected
        else:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)  # sums have another order


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": lambda layer: round_trip(layer, weights_only=False),
}


def round_trip(thing, weights_only):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", NAMES)
def test_copies_are_equal_and_apart(name, way):
    layer, _, x = quantized(name)
    twin = COPIES[way](layer)
    assert type(twin.weight) is QuantizedWeight
    assert isinstance(twin.weight, nn.Parameter)
    assert torch.equal(run(twin, x), run(layer, x))
    assert twin.weight.packed.data_ptr() != layer.weight.packed.data_ptr()
    assert twin.weight.options == layer.weight.options


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_goes_through_a_file_without_code(name):
    layer, original, x = quantized(name)
    state = round_trip(layer.state_dict(), weights_only=True)
    fresh = quantized(name)[0]
    fresh.weight.copy_(torch.zeros_like(original.weight))
    assert not torch.equal(run(fresh, x), run(layer, x))
    assert str(fresh.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(run(fresh, x), run(layer, x))
    floating = copy.deepcopy(original)
    floating.load_state_dict(state)  # into a layer that isn't quantised: the values that the integers stand for
    assert torch.equal(floating.weight, layer.weight.unpack())
    fresh.load_state_dict(original.state_dict())  # and back: they are packed
    assert torch.equal(run(fresh, x), run(layer, x))
    fresh.load_state_dict(state, assign=True)
    assert torch.equal(run(fresh, x), run(layer, x))


def test_a_state_dict_is_assigned_as_that_of_a_plain_layer():
    layer, original, x = quantized("linear")
    expected = run(original, x)
    into = quantized("linear")[0]
    into.load_state_dict(original.state_dict(), assign=True)  # floats: the layer is an ordinary one again
    assert type(into.weight) is nn.Parameter
    assert torch.equal(run(into, x), expected)
    empty = copy.deepcopy(original).requires_grad_(True).to("meta")
    with pytest.raises(RuntimeError, match=r'named "weight".*requires_grad_\(True\) .*model.requires_grad_\(False\)'):
        empty.load_state_dict(layer.state_dict(), assign=True)
    empty.requires_grad_(False).load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(run(empty, x), run(layer, x))


def test_tied_weights_stay_tied():
    model, _ = tied()
    ids = torch.arange(5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).to(torch.bfloat16)):
        assert twin.head.weight is twin.embed.weight
    assert len(list(model.parameters())) == 3
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), ids), run(model, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_it_moves_to_another_dtype(name, dtype):
    layer, original, x = quantized(name)
    expected = run(original, x)
    moved = layer.to(dtype)
    assert moved.weight.dtype == dtype
    out = run(moved, x.to(dtype) if x.is_floating_point() else x)
    assert out.dtype == dtype
    assert relative_error(out, expected) < (0.2 if name == "4 bits" else 0.03)
    assert type(moved.weight) is QuantizedWeight
    for again in (moved.float(), moved.half(), moved.bfloat16()):
        assert type(again.weight) is QuantizedWeight


def test_off_the_cpu_it_is_an_ordinary_tensor():
    layer, original, _ = quantized("linear")
    assert layer.to("cpu").weight is layer.weight
    moved = layer.to("meta")
    assert type(moved.weight) is nn.Parameter
    assert moved.weight.shape == original.weight.shape
    assert moved.weight.device.type == "meta"


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1), lambda w: w.data.mul_(2), lambda w: nn.init.normal_(w), lambda w: w.zero_(),
        lambda w: w.__setitem__(0, 1.0), lambda w: torch.add(w, 1, out=w), lambda w: w.detach().fill_(0),
        lambda w: setattr(w, "data", torch.zeros(7, 20)), lambda w: torch.relu_(w), lambda w: w.clamp_(0),
    ],
)  # fmt: skip
def test_writing_raises_and_changes_nothing(write):
    layer, _, _ = quantized("linear")
    before = layer.weight.unpack()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"writes to a quantised weight \[7, 20\].*copy_"):
        write(layer.weight)
    assert torch.equal(layer.weight.unpack(), before)


def test_a_gradient_is_refused_instead_of_none():
    for name in NAMES:
        layer, _, x = quantized(name)
        if x.is_floating_point():
            with pytest.raises(RuntimeError, match="has no gradient, and the input requires one: call it under"):
                layer(x.requires_grad_())
            with torch.no_grad():
                layer(x)
            layer(x.detach())
    layer.bias.requires_grad_(True)
    with pytest.raises(RuntimeError, match="and the bias requires one"):
        layer(x.detach())
    with pytest.raises(RuntimeError, match="requires_grad_\\(True\\) was asked of a quantised weight"):
        layer.requires_grad_(True)
    layer.requires_grad_(False)


def test_unpacked_a_model_is_ordinary_again():
    model, _ = tied()
    quantize_layer(model.hidden)
    ids = torch.arange(7)
    expected = run(model, ids)
    assert unpack_weights(model) is model
    assert model.head.weight is model.embed.weight
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert relative_error(run(model, ids), expected) < 0.03
    model.requires_grad_(True)
    model(ids).sum().backward()
    assert model.embed.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(weight_bits=5), "weight_bits is 5, expected 8 or 4"),
        (dict(weight_bits=True), "weight_bits is True, expected 8 or 4"),
        (dict(policy="best"), "quantize_policy is 'best', expected 'sqnr' or 'amax'"),
        (dict(group_size=-32), "group_size is -32, expected a multiple of 32"),
        (dict(target_sqnr=500.0), "target_sqnr is 500.0, expected 0 to 200 dB"),
        (dict(outlier_ratio=-1.0), "outlier_ratio is -1.0, expected a number of at least 0"),
    ],
)
def test_options_that_are_not_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        quantize_layer(nn.Linear(4, 4), **options)


def test_what_cannot_be_quantised_is_said_and_stays():
    infinite = nn.Linear(4, 4)
    nn.init.constant_(infinite.weight, float("inf"))
    computed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    for layer, error, message in (
        (infinite, ValueError, "weight has inf at output 0, input 0, expected finite"),
        (computed, ValueError, "module's weight is computed from others"),
        (nn.Embedding(4, 4, max_norm=1.0), ValueError, "renormalises the rows of its table"),
        (nn.ReLU(), TypeError, "module is a ReLU, expected nn.Linear, nn.Conv2d, nn.Embedding"),
        (nn.Linear(4, 4, device="meta"), ValueError, "weight is on meta, expected cpu"),
        (quantize_layer(nn.Linear(4, 4)), ValueError, "module has a quantised weight"),
    ):
        kind = type(getattr(layer, "weight", None))
        with pytest.raises(error, match=message):
            quantize_layer(layer)
        assert type(getattr(layer, "weight", None)) is kind


def test_parts_that_do_not_fit_are_refused():
    weight = quantize_layer(nn.Linear(20, 7)).weight
    good = tuple(weight.options)
    for packed, scale, options, message in (
        (weight.packed[:-1], weight.scale, good, r"packed is torch.uint8 \[383\], expected torch.uint8 \[384\]"),
        (weight.packed, weight.scale.double(), good, r"scale is torch.float64 \[1, 16\], expected torch.float32"),
        (weight.packed, None, good, "scale is NoneType"),
        (weight.packed, weight.scale, tuple(weight.options._replace(kind="x")), "kind is 'x', expected one of"),
        (weight.packed, weight.scale, tuple(weight.options._replace(shape=(7, 10**9))), "packed is"),
        (weight.packed, weight.scale, tuple(weight.options._replace(shape=(-7, 20))), "shape is"),
        (weight.packed, weight.scale, tuple(weight.options._replace(groups=0)), "groups is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            rebuild(packed, scale, options, True)


def test_options_are_plain_values():
    assert Options("linear", (2, 3), torch.float32).matrix() == (2, 3)
    assert Options("transposed", (2, 3), torch.float32).matrix() == (3, 2)
    assert Options("conv2d", (4, 3, 2, 2), torch.float32).matrix() == (4, 12)
