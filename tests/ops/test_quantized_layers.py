"""Layers with quantised weights: close to their originals, whatever calls them; what they count, and who hears it."""

import pytest
import torch
import torch.nn.functional as F
from support.quantized_layers import Conv1D, quantized, relative_error, tied
from torch import nn

from torch_sluice.compress import QuantizedWeight, count_bits, quantize_layer
from torch_sluice.monitor import bits as widths

BOUNDS = {8: 0.03, 4: 0.2}  # of a layer's output, with weights of these bits


@pytest.fixture
def never_unpacked(monkeypatch):
    """Fails a test in which a weight is unpacked: what it calls has to be served in integers."""

    def refuse(self):
        raise AssertionError("a quantised weight was unpacked")

    monkeypatch.setattr(QuantizedWeight, "unpack", refuse)


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("never_unpacked")
def test_a_linear_layer_is_close_to_its_original(weight_bits, bias, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(100, 33, bias=bias).requires_grad_(False)
    x = torch.randn(2, 7, 100).to(dtype)
    expected = linear(x.float())
    out = quantize_layer(linear, weight_bits=weight_bits, group_size=32 if weight_bits == 4 else 0)(x)
    assert out.dtype == dtype
    assert out.shape == (2, 7, 33)
    assert relative_error(out, expected) < BOUNDS[weight_bits]


CONVOLUTIONS = [
    dict(kernel_size=3), dict(kernel_size=3, padding=1, stride=2), dict(kernel_size=(1, 3), padding=(0, 1)),
    dict(kernel_size=3, padding="same", dilation=2), dict(kernel_size=3, padding="valid", groups=2),
    dict(kernel_size=1), dict(kernel_size=3, padding=1, padding_mode="reflect"),
    dict(kernel_size=3, padding=(2, 1), padding_mode="circular", stride=(1, 2)),
]  # fmt: skip


@pytest.mark.parametrize("arguments", CONVOLUTIONS)
@pytest.mark.usefixtures("never_unpacked")
def test_a_convolution_is_close_to_its_original(arguments):
    torch.manual_seed(0)
    for bias in (True, False):
        conv = nn.Conv2d(8, 18, bias=bias, **arguments).requires_grad_(False)
        x = torch.randn(3, 8, 12, 11)
        inputs = (x, x.to(memory_format=torch.channels_last), x[0], x[:1])
        expected = [conv(some) for some in inputs]
        quantize_layer(conv)
        for some, wanted in zip(inputs, expected, strict=True):
            out = conv(some)
            assert out.shape == wanted.shape
            assert relative_error(out, wanted) < BOUNDS[8]
        if conv.padding_mode == "zeros":  # other paddings are copies of torch's own
            assert conv(inputs[1]).is_contiguous(memory_format=torch.channels_last)


def test_a_convolution_whose_padding_is_lopsided_is_computed_unpacked():
    conv = nn.Conv2d(3, 4, 2, padding="same").requires_grad_(False)
    x = torch.randn(2, 3, 5, 5)
    expected = conv(x)
    assert relative_error(quantize_layer(conv)(x), expected) < 0.02
    assert torch.equal(conv(x), F.conv2d(x, conv.weight.unpack(), conv.bias, padding="same"))


@pytest.mark.parametrize("groups", [2, 3, 18])
def test_the_weight_of_a_grouped_convolution_unpacks(groups):
    conv = nn.Conv2d(18, 36, (3, 2), groups=groups)
    values = conv.weight.detach().clone()
    assert relative_error(quantize_layer(conv).weight.unpack(), values) < 0.01


@pytest.mark.parametrize("name", ["Conv1D", "subclass"])
@pytest.mark.usefixtures("never_unpacked")
def test_subclasses_and_transformers_own_layers_are_served(name):
    layer, original, x = quantized(name)
    assert relative_error(layer(x), original(x)) < BOUNDS[8]


@pytest.mark.usefixtures("never_unpacked")
def test_functions_that_multiply_by_the_weight_are_served():
    linear, conv1d = quantize_layer(nn.Linear(16, 9)), quantize_layer(Conv1D(9, 16))
    x, w, v = torch.randn(4, 16), linear.weight, conv1d.weight
    expected = F.linear(x, w)
    for out in (
        x @ w.t(), x @ w.T, x @ w.mT, torch.matmul(x, w.transpose(0, 1)), torch.mm(x, w.t()), x.mm(w.permute(1, 0)),
        F.linear(x, w.t().t()), F.linear(x, w.detach()), F.linear(input=x, weight=w), torch.matmul(x[0], w.t())[None],
        torch.addmm(torch.zeros(9), x, w.t()), torch.addmm(torch.zeros(4, 9), x, w.t()), (x[:, None] @ w.T)[:, 0],
    ):  # fmt: skip
        torch.testing.assert_close(out, expected[: len(out)], rtol=0.05, atol=0.05)
    torch.testing.assert_close(x @ v, F.linear(x, v.t()))
    torch.testing.assert_close(torch.addmm(conv1d.bias, x, v), F.linear(x, v.t(), conv1d.bias))


def test_products_that_no_kernel_has_are_computed_unpacked():
    linear = quantize_layer(nn.Linear(16, 9))
    x, w, values = torch.randn(4, 9), linear.weight, linear.weight.unpack()
    for got, expected in (
        (x @ w, x @ values), (w @ x[:, :1].expand(4, 16).t(), values @ x[:, :1].expand(4, 16).t()), (w * 2, values * 2),
        (torch.addmm(x[:, :1], x, w, beta=2, alpha=3), torch.addmm(x[:, :1], x, values, beta=2, alpha=3)),
        (F.linear(torch.ones(2, 16).double(), w.double()), F.linear(torch.ones(2, 16).double(), values.double())),
        (F.embedding_bag(torch.tensor([[1, 2]]), w), F.embedding_bag(torch.tensor([[1, 2]]), values)),
        (F.conv1d(x[None], w[:, None, :1].expand(9, 4, 1)), F.conv1d(x[None], values[:, None, :1].expand(9, 4, 1))),
        (F.bilinear(x, x, torch.ones(2, 9, 9), w[:2, 0]), F.bilinear(x, x, torch.ones(2, 9, 9), values[:2, 0])),
    ):  # fmt: skip
        torch.testing.assert_close(got, expected)
    for wrong in (
        lambda: linear(torch.zeros(2, 15)), lambda: x @ w.t(), lambda: torch.mm(torch.zeros(1, 2, 16), w.t()),
        lambda: linear(torch.tensor(1.0)), lambda: quantize_layer(nn.Conv2d(3, 4, 1))(torch.zeros(1, 4, 5, 5)),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, ValueError)):
            wrong()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("never_unpacked")
def test_an_embedding_is_within_half_a_step(dtype):
    table = nn.Embedding(100, 48, dtype=dtype, padding_idx=2).requires_grad_(False)
    table.weight[3], table.weight[4] = 0, table.weight[4] * 1e-30
    ids = torch.tensor([[0, 3], [4, 99]])
    wanted = table(ids)
    out = quantize_layer(table, weight_bits=4)(ids)  # a table that is only looked up has 8 bits
    assert out.shape == wanted.shape
    assert out.dtype == dtype
    step = wanted.float().abs().amax(-1, keepdim=True) / 127
    slack = 0.51 if dtype == torch.float32 else 1.1  # bfloat16 has 8 bits itself
    assert ((out.float() - wanted.float()).abs() <= slack * step).all()
    assert (out[0, 1] == 0).all()
    for wrong in (torch.tensor([100]), torch.tensor([-1])):
        with pytest.raises(IndexError):
            table(wrong)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.usefixtures("never_unpacked")
def test_one_packed_weight_serves_lookup_and_product(dtype):
    model, original = tied()
    assert model.head.weight is model.embed.weight
    ids = torch.tensor([[0, 7, 299], [5, 5, 1]], dtype=dtype)
    assert torch.equal(model.embed(ids.long()), model.embed(ids))
    assert relative_error(model.embed(ids), original.embed(ids)) < 0.01
    assert relative_error(model(ids), original(ids)) < 0.03
    assert torch.equal(model.embed(ids[:, :0]), torch.zeros(2, 0, 40))
    with pytest.raises(ValueError, match="rows has 300 at 0, expected at least 0 and less than out_features"):
        model.embed(torch.tensor([300], dtype=dtype))


def test_rows_with_inf_or_nan_stay_apart():
    layer = quantize_layer(nn.Linear(20, 7))
    x = torch.randn(5, 20)
    clean = layer(x)
    x[1, 3], x[4, 0] = torch.inf, torch.nan
    out = layer(x)
    assert out[[1, 4]].isnan().all()
    assert torch.equal(out[[0, 2, 3]], clean[[0, 2, 3]])


def test_empty_and_single_inputs():
    layer = quantize_layer(nn.Linear(20, 7))
    for shape in ((0, 20), (20,), (1, 1, 20), (2, 0, 20)):
        assert layer(torch.zeros(shape)).shape == (*shape[:-1], 7)
    assert quantize_layer(nn.Linear(1, 1))(torch.ones(1, 1)).shape == (1, 1)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x, padding=None):
        return self.encoder(x, src_key_padding_mask=padding)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.usefixtures("never_unpacked")
def test_the_attention_of_torch_is_served_and_not_fused(padded):
    torch.manual_seed(0)
    model, x = Encoder().eval().requires_grad_(False), torch.randn(2, 5, 32)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    expected = model(x, padding)
    for layer in model.encoder.layers:
        attention = layer.self_attn
        attention.in_proj_weight = nn.Parameter(
            QuantizedWeight.from_float(attention.in_proj_weight), requires_grad=False
        )
        for part in (attention.out_proj, layer.linear1, layer.linear2):
            quantize_layer(part)
    count_bits(model)
    with torch.inference_mode():
        out = model(x, padding)
    rows = ~padding if padded else torch.ones(2, 5, dtype=torch.bool)
    assert relative_error(out[rows], expected[rows]) < 0.03
    assert sum(count_bits(model).values()) == 2 * 4 * 10


def first(out):
    return out[0] if isinstance(out, tuple) else out


def quantize_matrices(layer, only=""):
    for name, parameter in list(layer.named_parameters()):
        if parameter.dim() == 2 and name.startswith(only):
            setattr(layer, name, nn.Parameter(QuantizedWeight.from_float(parameter), requires_grad=False))
    return layer


RECURRENT = {
    "lstm": lambda: nn.LSTM(12, 8),
    "projected": lambda: nn.LSTM(12, 8, 2, bidirectional=True, proj_size=5, batch_first=True),
    "gru": lambda: nn.GRU(12, 8, 2, bias=False, bidirectional=True),
    "lstm cell": lambda: nn.LSTMCell(12, 8),
    "gru cell": lambda: nn.GRUCell(12, 8),
}


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.usefixtures("never_unpacked")
def test_recurrent_layers_are_served(name):
    torch.manual_seed(0)
    layer, x = RECURRENT[name]().requires_grad_(False), torch.randn(5, 12)
    inputs = [x]
    if "cell" not in name:
        packed = nn.utils.rnn.pack_sequence([torch.randn(4, 12), torch.randn(2, 12)])
        inputs += [torch.randn(5, 3, 12), packed]
    expected = [first(layer(some)) for some in inputs]
    quantize_matrices(layer)
    count_bits(layer)
    for some, wanted in zip(inputs, expected, strict=True):
        out = first(layer(some))
        assert relative_error(getattr(out, "data", out), getattr(wanted, "data", wanted)) < 0.03
    assert sum(count_bits(layer).values()) > 0


@pytest.mark.parametrize("name", [*RECURRENT, "rnn", "rnn cell"])
def test_recurrent_layers_of_which_a_part_is_quantised_run_unpacked(name):
    torch.manual_seed(0)
    plain = {"rnn": lambda: nn.RNN(12, 8), "rnn cell": lambda: nn.RNNCell(12, 8)}
    layer, x = {**RECURRENT, **plain}[name]().requires_grad_(False), torch.randn(5, 12)
    expected = first(layer(x))
    assert relative_error(first(quantize_matrices(layer, "weight_ih")(x)), expected) < 0.03


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "convolution"])
def test_the_widths_that_inputs_take_are_counted(kind):
    model = nn.Sequential(quantize_layer(nn.Linear(64, 8), target_sqnr=30.0))
    assert count_bits(model) == {0: 0, 4: 0, 7: 0, 8: 0, 16: 0}
    x = torch.randn(10, 64)
    x[0] = 0
    x[1, 0] = torch.nan
    model(x)
    counts = count_bits(model, enabled=False)
    assert sum(counts.values()) == 10
    assert counts[0] == 1
    assert counts[7] == 8
    model(x)
    assert count_bits(model) == counts
    layer, _, x = quantized(kind)
    count_bits(layer)
    layer(x)
    assert sum(count_bits(layer).values()) == (2 if kind == "convolution" else x[..., 0].numel())


def test_widths_by_the_largest_value():
    amax = nn.Sequential(quantize_layer(nn.Linear(64, 8), policy="amax"))
    count_bits(amax)
    amax(torch.full((3, 64), 0.05))
    amax(torch.full((2, 64), 0.5))
    assert count_bits(amax) == {0: 0, 4: 0, 7: 0, 8: 3, 16: 2}


def test_monitors_hear_of_the_widths(monkeypatch):
    layer, heard = quantize_layer(nn.Linear(20, 7)), []
    monkeypatch.setattr(widths, "listeners", [lambda bits, source: heard.append((bits, source))])
    layer(torch.randn(3, 20))
    ((bits, source),) = heard
    assert source is layer.weight
    assert bits.shape == (3,)


@pytest.mark.parametrize("turn", [lambda w: w.t(), lambda w: w.T, lambda w: w.transpose(0, 1), lambda w: w.mT])
def test_a_weight_made_before_is_turned_in_inference_mode(turn):
    torch.manual_seed(0)
    w, x = nn.Parameter(QuantizedWeight.from_float(torch.randn(8, 16)), requires_grad=False), torch.randn(3, 16)
    expected = F.linear(x, w)
    with torch.inference_mode():
        assert torch.equal(x @ turn(w), expected)
        assert turn(w).shape == (16, 8)
