"""The quantize operators and bad input: what isn't finite, what is empty, what doesn't fit, gradients."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_sluice.quantize import (
    conv2d_dynamic,
    linear_dynamic,
    pack_conv2d_weight,
    pack_linear_weight,
    quantize_dynamic,
    unpack_linear_weight,
)

WEIGHT = pack_linear_weight(torch.ones(5, 6))
CONV = pack_conv2d_weight(torch.ones(4, 2, 3, 3))
IMAGE = torch.zeros(1, 2, 5, 5)
X = torch.zeros(2, 6)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_row_that_is_not_finite_is_nan_and_leaves_the_others_alone(bad, per_token):
    x, w = torch.randn(9, 70), torch.randn(20, 70)
    packed, scale = pack_linear_weight(w)
    options = dict(out_features=20, per_token=per_token)
    clean = x.clone()
    clean[4] = 0
    expected, _ = linear_dynamic(clean, packed, scale, outlier_ratio=0, activation_bits=8, **options)
    x[4, 11] = bad
    out, bits = linear_dynamic(x, packed, scale, outlier_ratio=0, activation_bits=8, **options)
    others = torch.arange(9) != 4
    assert out[4].isnan().all()
    assert bits[4] == 0
    assert torch.equal(out[others], expected[others])
    with_side, _ = linear_dynamic(x, packed, scale, outlier_ratio=3.0, **options)
    assert torch.equal(with_side.isnan(), out.isnan())
    x[0, 11] = 100  # now the bad value is in a channel that is left out
    with_side, bits = linear_dynamic(x, packed, scale, outlier_ratio=3.0, **options)
    assert torch.equal(with_side.isnan(), out.isnan())
    assert bits[4] == 0


def test_integers_of_a_row_that_is_not_finite_are_zero_with_scale_nan():
    x = torch.randn(3, 8)
    x[1, 2] = torch.inf
    result = quantize_dynamic(x, 8)
    assert result.scale.isnan().tolist() == [False, True, False]
    assert result.bits.tolist() == [8, 0, 8]
    assert result.q[1].count_nonzero() == 0
    assert result.dequantize()[1].isnan().all()


def test_an_image_that_is_not_finite_is_nan_and_leaves_the_others_alone():
    image = torch.randn(3, 2, 5, 5)
    options = dict(out_channels=4, kernel_size=3)
    expected, _ = conv2d_dynamic(image, *CONV, **options)
    image[1, 0, 2, 2] = torch.nan
    out, bits = conv2d_dynamic(image, *CONV, **options)
    assert out[1].isnan().all()
    assert bits[1] == 0
    assert torch.equal(out[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("bits", ["sqnr", "amax", 4, 8, 16])
def test_rows_without_inputs_are_finite(bits):
    weight = pack_linear_weight(torch.zeros(5, 0))
    for per_token in (True, False):
        _, chosen = linear_dynamic(
            torch.zeros(3, 0), *weight, out_features=5, activation_bits=bits, per_token=per_token
        )
        expected = quantize_dynamic(torch.zeros(3, 0), bits, per_token=per_token).bits
        assert chosen.tolist() == expected.expand(3).tolist()
        assert (chosen != 0).all()


@pytest.mark.parametrize("shape", [(0, 6), (0, 3, 6), (3, 0, 6), (6,), (1, 6)])
def test_few_and_no_rows(shape):
    bias = torch.randn(5)
    out, bits = linear_dynamic(torch.zeros(shape), *WEIGHT, bias, out_features=5)
    assert out.shape == (*shape[:-1], 5)
    assert bits.numel() == out.numel() // 5
    assert torch.equal(out, bias.expand_as(out))


def test_no_inputs_no_outputs_and_one_element():
    packed, scale = pack_linear_weight(torch.zeros(5, 0))
    out, _ = linear_dynamic(torch.zeros(3, 0), packed, scale, torch.arange(5.0), out_features=5)
    assert torch.equal(out, torch.arange(5.0).expand(3, 5))
    packed, scale = pack_linear_weight(torch.zeros(0, 6))
    assert linear_dynamic(X, packed, scale, out_features=0)[0].shape == (2, 0)
    packed, scale = pack_linear_weight(torch.tensor([[2.0]]))
    out, bits = linear_dynamic(torch.tensor([3.0]), packed, scale, out_features=1)
    assert out.item() == pytest.approx(6)
    assert bits.tolist() == [7]  # with 4 bits a number alone has a predicted ratio of 28 dB
    assert quantize_dynamic(torch.zeros(0)).q.shape == (0,)
    assert quantize_dynamic(torch.zeros(3, 0), 8).dequantize().shape == (3, 0)
    assert conv2d_dynamic(IMAGE[:0], *CONV, out_channels=4, kernel_size=3)[0].shape == (0, 4, 3, 3)


def test_zeros_stay_zero():
    out, bits = linear_dynamic(X, *WEIGHT, out_features=5)
    assert out.count_nonzero() == 0
    assert bits.tolist() == [4, 4]
    packed, scale = pack_linear_weight(torch.zeros(5, 6), 4)
    assert linear_dynamic(torch.randn(2, 6), packed, scale, out_features=5, weight_bits=4)[0].count_nonzero() == 0


BAD = {
    "no x": (lambda: quantize_dynamic(None), "^x is None, expected a tensor$"),
    "no weight": (lambda: pack_linear_weight(None), "^weight is None, expected a tensor$"),
    "no convolution's weight": (lambda: pack_conv2d_weight(None), "^weight is None, expected a tensor$"),
    "no packed weight": (
        lambda: linear_dynamic(X, None, WEIGHT[1], out_features=5),
        "^packed is None, expected a tensor$",
    ),
    "x of integers": (lambda: linear_dynamic(X.int(), *WEIGHT, out_features=5), "x is int32 .* expected float32"),
    "x in float64": (lambda: quantize_dynamic(X.double()), r"x is float64 \[2, 6\] on cpu, expected float32"),
    "x without dimensions": (lambda: quantize_dynamic(torch.tensor(1.0)), "x is .*expected at least one dimension"),
    "x of another width": (
        lambda: linear_dynamic(torch.zeros(2, 9), *WEIGHT, out_features=5),
        r"packed is uint8 \[128\]|packed is dtype \d+ \[128\] on cpu, expected contiguous uint8 \[256\]",
    ),
    "packed of another dtype": (
        lambda: linear_dynamic(X, WEIGHT[0].char(), WEIGHT[1], out_features=5),
        "packed is int8 .* expected contiguous uint8",
    ),
    "scale cut off": (
        lambda: linear_dynamic(X, WEIGHT[0], WEIGHT[1][:, :8], out_features=5),
        r"weight_scale is float32 \[1, 8\] on cpu, expected contiguous float32 \[1, 16\]",
    ),
    "bias of another size": (
        lambda: linear_dynamic(X, *WEIGHT, torch.zeros(4), out_features=5),
        r"bias is float32 \[4\] on cpu, expected \[out_features\] = \[5\]",
    ),
    "a width that isn't": (
        lambda: linear_dynamic(X, *WEIGHT, out_features=5, activation_bits=6),
        r"activation_bits is 6, expected 4, 7, 8, 16",
    ),
    "a policy that isn't": (
        lambda: quantize_dynamic(X, "auto"),
        "bits is 'auto', expected 4, 7, 8, 16, 'sqnr' or 'amax'",
    ),
    "target NaN": (lambda: quantize_dynamic(X, target_sqnr=float("nan")), "target_sqnr is -?nan, expected 0 to 200 dB"),
    "ratio below 0": (
        lambda: linear_dynamic(X, *WEIGHT, out_features=5, outlier_ratio=-1.0),
        "outlier_ratio is -1, expected a number above 0",
    ),
    "group size": (lambda: pack_linear_weight(X, 4, 48), "group_size is 48, expected a multiple of 32"),
    "weight bits": (lambda: pack_linear_weight(X, 2), "bits of the weight is 2, expected 8 or 4"),
    "weight of a rank": (lambda: pack_linear_weight(X[0]), r"weight is float32 \[6\] on cpu, expected \[out_features"),
    "weight NaN": (
        lambda: pack_linear_weight(torch.tensor([[0.0, 1.0], [2.0, torch.nan]])),
        "weight has -?nan at output 1, input 1, expected finite values",
    ),
    "unpacked with other sizes": (
        lambda: unpack_linear_weight(*WEIGHT, out_features=5, in_features=60),
        "packed is .* expected contiguous uint8",
    ),
    "image of a rank": (lambda: conv2d_dynamic(X, *CONV, out_channels=4, kernel_size=3), "x is .* expected .images"),
    "kernel larger than the image": (
        lambda: conv2d_dynamic(IMAGE[..., :2], *CONV, out_channels=4, kernel_size=3),
        "width of x is 2 with padding 0, expected at least the kernel's 3",
    ),
    "kernel of another size": (
        lambda: conv2d_dynamic(IMAGE, *CONV, out_channels=4, kernel_size=5),
        "packed is .* expected contiguous uint8",
    ),
    "stride 0": (
        lambda: conv2d_dynamic(IMAGE, *CONV, out_channels=4, kernel_size=3, stride=0),
        r"stride is \(0, 0\), expected at least 1",
    ),
    "groups that don't divide": (
        lambda: pack_conv2d_weight(torch.zeros(4, 2, 3, 3), groups=3),
        "groups is 3, expected a divisor of out_features, which is 4",
    ),
    "three strides": (
        lambda: conv2d_dynamic(IMAGE, *CONV, out_channels=4, kernel_size=3, stride=(1, 2, 3)),
        r"stride is \(1, 2, 3\), expected an integer or two",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_asking_for_a_gradient_is_refused():
    x = torch.randn(2, 6, requires_grad=True)
    for call in (
        lambda: linear_dynamic(x, *WEIGHT, out_features=5),
        lambda: quantize_dynamic(x),
        lambda: conv2d_dynamic(IMAGE.clone().requires_grad_(), *CONV, out_channels=4, kernel_size=3),
    ):
        with pytest.raises(RuntimeError, match=r"has no gradient, and an argument requires one"):
            call()
        with torch.no_grad():
            call()


def test_tracing_refuses_what_the_operators_refuse():
    with FakeTensorMode() as mode:
        packed, scale, x = (mode.from_tensor(tensor) for tensor in (*WEIGHT, X))
        operator = torch.ops.sluice.linear_dynamic
        assert operator(x, packed, scale, None, 5, 8, 0, 8, 0.0, True, 0.0)[0].shape == (2, 5)
        with pytest.raises(ValueError, match=r"packed has shape \[128\], expected \[256\]"):
            operator(torch.zeros(2, 9), packed, scale, None, 5, 8, 0, 8, 0.0, True, 0.0)
        with pytest.raises(ValueError, match="x is torch.float64"):
            operator(x.double(), packed, scale, None, 5, 8, 0, 8, 0.0, True, 0.0)


def test_another_device_is_refused():
    with pytest.raises(ValueError, match=r"^x has the layout sparse_coo, expected a dense tensor"):
        torch.ops.sluice.linear_dynamic(X.to_sparse(), *WEIGHT, None, 5, 8, 0, 8, 0.0, True, 0.0)
