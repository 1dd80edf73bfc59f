"""The quantize operators against torch in float64: values, widths, outliers, layouts, tracing."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_sluice.quantize import (
    conv2d_dynamic,
    linear_dynamic,
    operators,
    pack_conv2d_weight,
    pack_linear_weight,
    quantize_dynamic,
    unpack_linear_weight,
)

ops = torch.ops.sluice
LARGEST = {4: 7, 7: 63, 8: 127, 16: 32639}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def linear(x, weight, bias=None, weight_bits=8, group_size=0, **options):
    """The layer, and what it should give: a float64 product with the weight that the integers stand for."""
    packed, scale = pack_linear_weight(weight, weight_bits, group_size)
    sizes = dict(out_features=weight.shape[0], group_size=group_size)
    used = unpack_linear_weight(packed, scale, in_features=weight.shape[1], bits=weight_bits, **sizes)
    out, bits = linear_dynamic(x, packed, scale, bias, weight_bits=weight_bits, **sizes, **options)
    expected = F.linear(x.double(), used.double(), None if bias is None else bias.double())
    return out, bits, expected


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=2),
    st.integers(1, 200),
    st.sampled_from(DTYPES),
    st.sampled_from([4, 7, 8, 16]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_integers_times_scale_are_within_half_a_step(rows, columns, dtype, bits, per_token, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn([*rows, columns], generator=generator).mul(10 ** (seed % 7 - 3)).to(dtype)
    result = quantize_dynamic(x, bits, per_token=per_token)
    assert result.q.shape == x.shape
    assert result.q.dtype == (torch.int16 if bits == 16 else torch.int8)
    assert result.scale.shape == ((math.prod(rows),) if per_token else (1,))
    assert (result.bits == bits).all()
    if x.numel() == 0:
        return
    assert result.q.abs().max() == LARGEST[bits]
    steps = result.scale.reshape([*rows, 1]) if per_token else result.scale
    assert ((result.dequantize() - x.float()).abs() <= 0.501 * steps).all()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 150),
    st.integers(1, 40),
    st.sampled_from([(8, 0), (8, 64), (4, 32), (4, 0)]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_products_are_those_of_the_rounded_operands(rows, inputs, outputs, weight, dtype, per_token, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    w, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    packed, scale = pack_linear_weight(w, *weight)
    used = unpack_linear_weight(
        packed, scale, out_features=outputs, in_features=inputs, bits=weight[0], group_size=weight[1]
    )
    rounded = quantize_dynamic(x, "sqnr", per_token=per_token)
    options = dict(out_features=outputs, weight_bits=weight[0], group_size=weight[1], per_token=per_token)
    out, bits = linear_dynamic(x, packed, scale, bias, outlier_ratio=0, **options)
    assert torch.equal(bits, rounded.bits.expand(rows))
    expected = F.linear(rounded.dequantize().double(), used.double(), bias.double())
    magnitude = F.linear(rounded.dequantize().abs().double(), used.abs().double(), bias.abs().double())
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert ((out.double() - expected).abs() <= 2e-6 * magnitude + 1.01 * rounding * expected.abs() + 1e-7).all()


def test_the_widths_are_the_smallest_that_meet_the_target():
    """And the prediction is right: what comes out has the ratio that was asked for."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 512, generator=generator) * torch.logspace(0, 2.5, 300)[:, None].pow(0.3)
    x[torch.arange(300), torch.randint(512, (300,), generator=generator)] *= torch.logspace(0, 2, 300)
    for target in (15.0, 25.0, 40.0):
        result = quantize_dynamic(x, "sqnr", target_sqnr=target)
        crest = x.abs().amax(1) / x.square().mean(1).sqrt()
        for bits in (4, 7, 8):
            predicted = 10 * torch.log10(12 * LARGEST[bits] ** 2 / crest**2)
            assert torch.equal(result.bits <= bits, predicted >= target)
        noise = (result.dequantize() - x).square().mean(1)
        measured = 10 * torch.log10(x.square().mean(1) / noise)
        assert ((measured > target - 2) | (result.bits == 16)).all()
    assert {4, 7} <= set(quantize_dynamic(x, "sqnr", target_sqnr=15.0).bits.tolist())
    assert {8, 16} <= set(quantize_dynamic(x, "sqnr", target_sqnr=40.0).bits.tolist())


def test_the_amax_rule_decides_at_a_tenth():
    x = torch.tensor([[0.0999, -0.05], [0.1, 0.0], [-3.0, 2.0], [0.0, 0.0]])
    assert quantize_dynamic(x, "amax").bits.tolist() == [8, 16, 16, 8]
    assert quantize_dynamic(x, "amax", per_token=False).bits.tolist() == [16]
    assert quantize_dynamic(x[:1], "amax", per_token=False).bits.tolist() == [8]


def seed_quantizer(x):
    """The rule as its source has it: rounds first, and then divides."""
    if x.abs().max() < 0.1:
        return x.round().to(torch.int8) / 256
    return x.round().to(torch.int16) / 65536


def test_dividing_by_256_or_65536_loses_all_below_one_half_where_a_scale_does_not():
    small = torch.linspace(-0.0999, 0.0999, 400)
    medium = torch.linspace(-0.4999, 0.4999, 400)
    for x in (small, medium):
        assert seed_quantizer(x).count_nonzero() == 0
        result = quantize_dynamic(x, "amax")
        assert relative_error(result.dequantize(), x.double()) < 0.01
    # What it doesn't lose it changes: nothing multiplies by 65536 again, and 0.6 and 1.4 are the same.
    assert seed_quantizer(torch.tensor([0.6, 1.4])).tolist() == [2**-16, 2**-16]


def test_outlier_tokens_leak_nowhere():
    """Where one scale for the tensor, as FBGEMM has it, loses the other rows."""
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(32, 768, generator=generator), torch.randn(256, 768, generator=generator)
    x[3] *= 200
    layer = torch.nn.Linear(768, 256, bias=False)
    layer.weight.data = w
    rows = torch.arange(32) != 3
    expected = F.linear(x.double(), w.double())
    out, _, _ = linear(x, w)
    ours = relative_error(out[rows], expected[rows])
    assert ours < 0.02
    if "fbgemm" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "fbgemm"
        peer = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear})
        assert ours < relative_error(peer(x)[rows], expected[rows]) / 4


def test_outlier_channels_are_multiplied_in_float():
    generator = torch.Generator().manual_seed(2)
    x, w = torch.randn(40, 256, generator=generator), torch.randn(64, 256, generator=generator)
    x[:, 17] *= 100
    with_side, _, expected = linear(x, w, activation_bits=8, outlier_ratio=8)
    without, _, _ = linear(x, w, activation_bits=8, outlier_ratio=0)
    rest = F.linear(x[:, 17:18].double(), unpacked(w)[:, 17:18])  # what the outlier channel itself gives
    assert relative_error(with_side - rest.float(), expected - rest) < 0.012
    assert relative_error(without - rest.float(), expected - rest) > 0.08
    x[:, ::5] *= 100  # too many: all stay
    many, _, _ = linear(x, w, activation_bits=8, outlier_ratio=1.5)
    none, _, _ = linear(x, w, activation_bits=8, outlier_ratio=0)
    assert torch.equal(many, none)


@pytest.mark.parametrize("rows", [1, 2, 8, 64])
@pytest.mark.parametrize("size", [30, 100, 10000])
def test_outlier_channels_are_found_in_any_number_of_rows(rows, size):
    """In few rows they are most of the tensor's root mean square, which hides them from a multiple of it."""
    generator = torch.Generator().manual_seed(rows)
    x, w = torch.randn(rows, 768, generator=generator), torch.randn(64, 768, generator=generator)
    channels = [5, 100, 333, 767]
    x[:, channels] = size * torch.randn(rows, 4, generator=generator).sign()
    out, bits, expected = linear(x, w)
    assert bits.max() <= 8
    theirs = F.linear(x[:, channels].double(), unpacked(w)[:, channels])
    assert relative_error(out - theirs, expected - theirs) < 0.03


def unpacked(w):
    packed, scale = pack_linear_weight(w)
    return unpack_linear_weight(packed, scale, out_features=w.shape[0], in_features=w.shape[1]).double()


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_in_and_out(dtype):
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(2, 5, 96, generator=generator).to(dtype), torch.randn(30, 96, generator=generator)
    out, bits, expected = linear(x, w, torch.randn(30).to(dtype))
    assert out.dtype == dtype
    assert out.shape == (2, 5, 30)
    assert bits.shape == (10,)
    assert relative_error(out, expected) < 0.015


def test_any_strides_of_x():
    base, w = torch.randn(6, 5, 64), torch.randn(9, 64)
    packed, scale = pack_linear_weight(w)
    expected, _ = linear_dynamic(base, packed, scale, out_features=9)
    for x in (base.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([base, base], -1)[..., 0]):
        assert torch.equal(linear_dynamic(x, packed, scale, out_features=9)[0], expected)
        assert torch.equal(quantize_dynamic(x).q, quantize_dynamic(base).q)
    one_row = base[0, :1].expand(7, 64)
    assert torch.equal(linear_dynamic(one_row, packed, scale, out_features=9)[0], expected[0, :1].expand(7, 9))


CONVOLUTIONS = {
    "3x3": dict(shape=(2, 16, 9, 8), out=24, kernel=(3, 3), padding=1),
    "stride and odd channels": dict(shape=(2, 3, 11, 9), out=7, kernel=(3, 3), stride=2, padding=(1, 0)),
    "1x1": dict(shape=(1, 20, 5, 6), out=33, kernel=(1, 1)),
    "long, one channel": dict(shape=(2, 1, 100, 1), out=20, kernel=(32, 1), stride=(4, 1), padding=(14, 0)),
    "long": dict(shape=(1, 24, 40, 1), out=16, kernel=(16, 1)),
    "depth-wise": dict(shape=(1, 10, 7, 7), out=10, kernel=(3, 3), padding=1, groups=10),
    "groups, dilated": dict(shape=(1, 12, 9, 9), out=6, kernel=(3, 2), padding=2, dilation=(2, 1), groups=3),
    "one element": dict(shape=(1, 1, 1, 1), out=1, kernel=(1, 1)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("weight_bits", [8, 4])
def test_convolutions_are_those_of_torch(name, weight_bits):
    case = CONVOLUTIONS[name]
    generator = torch.Generator().manual_seed(4)
    stride, padding, dilation, groups = (case.get(k, d) for k, d in _DEFAULTS.items())
    x = torch.randn(case["shape"], generator=generator)
    w = torch.randn(case["out"], x.shape[1] // groups, *case["kernel"], generator=generator)
    bias = torch.randn(case["out"], generator=generator)
    packed, scale = pack_conv2d_weight(w, weight_bits, 32 if weight_bits == 4 else 0, groups)
    expected = F.conv2d(x.double(), w.double(), bias.double(), stride, padding, dilation, groups)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        out, bits = conv2d_dynamic(
            x.to(memory_format=memory_format),
            packed,
            scale,
            bias,
            out_channels=case["out"],
            kernel_size=case["kernel"],
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            weight_bits=weight_bits,
            group_size=32 if weight_bits == 4 else 0,
        )
        assert out.shape == expected.shape
        assert bits.shape == (x.shape[0],)
        assert relative_error(out, expected) < (0.02 if weight_bits == 8 else 0.15)
        results.append(out)
    if x.shape[1] > 1:  # with one channel both formats are the same
        assert results[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


_DEFAULTS = dict(stride=1, padding=0, dilation=1, groups=1)


def test_the_same_bits_with_any_number_of_threads():
    x, w, image = torch.randn(130, 256), torch.randn(200, 256), torch.randn(2, 16, 40, 40)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out, bits, _ = linear(x, w, weight_bits=4, group_size=64, outlier_ratio=4)
            packed = pack_conv2d_weight(w[:32, :144].reshape(32, 16, 3, 3))
            results.append((out, bits, conv2d_dynamic(image, *packed, out_channels=32, kernel_size=3)[0]))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def samples():
    packed, scale = pack_linear_weight(torch.randn(20, 64), 4, 32)
    conv = pack_conv2d_weight(torch.randn(6, 4, 3, 3))
    image = torch.randn(2, 4, 7, 6)
    options = [6, [3, 3], [1, 2], [1, 0], [1, 1], 1, 8, 0, 0, 30.0]
    return {
        "quantize_dynamic": [(torch.randn(2, 3, 10), 8, 0.0, True), (torch.randn(5).half(), 0, 30.0, False)],
        "pack_linear_weight": [(torch.randn(20, 70), 8, 0), (torch.randn(5, 70).bfloat16(), 4, 32)],
        "unpack_linear_weight": [(packed, scale, 20, 64, 4, 32)],
        "pack_conv2d_weight": [(torch.randn(6, 2, 3, 3), 8, 0, 2)],
        "linear_dynamic": [
            (torch.randn(2, 3, 64), packed, scale, torch.randn(20), 20, 4, 32, 0, 30.0, True, 5.0),
            (torch.randn(64).half(), packed, scale, None, 20, 4, 32, 16, 0.0, False, 0.0),
        ],
        "conv2d_dynamic": [
            (image, *conv, torch.randn(6), *options),
            (image.to(memory_format=torch.channels_last), *conv, None, *options),
        ],
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name):
    for arguments in samples()[name]:
        torch.library.opcheck(getattr(ops, name).default, arguments)


def test_the_layer_traces_into_a_whole_graph_with_a_free_number_of_rows():
    torch._dynamo.reset()
    packed, scale = pack_linear_weight(torch.randn(20, 64))

    def layer(x):
        return linear_dynamic(x, packed, scale, out_features=20)[0].relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.inference_mode():
        for rows in (3, 8, 1):
            x = torch.randn(rows, 64)
            assert torch.equal(compiled(x), layer(x))


def test_the_constants_are_those_of_the_header(repository):
    header = (repository / "ops/sluice/quantize.h").read_text()
    assert f"#define SL_QUANTIZE_PANEL {operators.PANEL}\n" in header
    assert f"#define SL_QUANTIZE_DEPTH {operators.DEPTH}\n" in header
