"""LSTM and GRU layers on packed weights against torch's, whose weights are replaced by what the integers stand for."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from torch_sluice.quantize import (
    PackedMatrix,
    gru_dynamic,
    lstm_dynamic,
    pack_linear_weight,
    run_recurrent,
    run_recurrent_cell,
    unpack_linear_weight,
)

ops = torch.ops.sluice
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU}
PRECISE = dict(activation_bits=16, state_bits=16)


@pytest.fixture(autouse=True)
def seeded_inference():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def pack(weight, bits=8, group_size=0):
    return PackedMatrix(*pack_linear_weight(weight, bits, group_size), bits, group_size)


def quantise(module, bits=8, group_size=0):
    """The flat weights, packed; and a copy of the module that has what they stand for."""
    copied, flat = copy.deepcopy(module), []
    for name, parameter in copied.named_parameters():
        if parameter.dim() == 2:
            matrix = pack(parameter, bits, group_size)
            sizes = dict(out_features=parameter.shape[0], in_features=parameter.shape[1])
            parameter.data = unpack_linear_weight(*matrix[:2], **sizes, bits=bits, group_size=group_size)
            flat.append(matrix)
        else:
            flat.append(parameter.detach())
        assert name.startswith(("weight", "bias"))
    return flat, copied


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def make_state(module, batch, dtype=torch.float32):
    runs = module.num_layers * (2 if module.bidirectional else 1)
    hidden = torch.randn(runs, batch, module.hidden_size, dtype=dtype) / 2
    if isinstance(module, nn.GRU):
        return hidden
    return torch.randn(runs, batch, module.proj_size or module.hidden_size, dtype=dtype) / 2, hidden


def run(kind, module, flat, x, hx, batch_sizes=None, **options):
    sizes = module.bias, module.num_layers, module.bidirectional, module.batch_first
    return run_recurrent(kind, x, hx, flat, *sizes, batch_sizes, **options)


def flatten(results):
    out, states = results
    return (out, *states) if isinstance(states, tuple) else (out, states)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(bias=False),
        dict(num_layers=3),
        dict(bidirectional=True),
        dict(num_layers=2, bidirectional=True, batch_first=True, bias=False),
        dict(num_layers=2, bidirectional=True, proj_size=20),
        dict(bias=False, proj_size=7),
    ],
    ids=str,
)
def test_modules_are_those_of_torch(kind, options):
    if kind == "gru" and "proj_size" in options:
        pytest.skip("a GRU has no projection")
    module = KINDS[kind](30, 50, **options)
    flat, expected_module = quantise(module)
    x = torch.randn((4, 9, 30) if module.batch_first else (9, 4, 30))
    hx = make_state(module, 4)
    expected = flatten(expected_module(x, hx))
    results = run(kind, module, flat, x, hx, **PRECISE)
    assert len(results) == len(expected)
    for got, wanted in zip(results, expected, strict=True):
        assert got.shape == wanted.shape
        assert relative_error(got, wanted) < 2e-4
    for got, wanted in zip(run(kind, module, flat, x, hx), flatten(module(x, hx)), strict=True):
        assert relative_error(got, wanted) < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_sequences_of_unequal_length(kind, bidirectional):
    module = KINDS[kind](12, 33, num_layers=2, bidirectional=bidirectional)
    flat, expected_module = quantise(module)
    sequences = [torch.randn(length, 12) for length in (3, 11, 7, 1)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    hx = make_state(module, 4)
    out, *states = run(kind, module, flat, packed.data, hx, packed.batch_sizes, **PRECISE)
    sorted_input = torch.nn.utils.rnn.PackedSequence(packed.data, packed.batch_sizes)
    expected, *expected_states = flatten(expected_module(sorted_input, hx))
    assert relative_error(out, expected.data) < 2e-4
    for got, wanted in zip(states, expected_states, strict=True):
        assert relative_error(got, wanted) < 2e-4
    # Alone, each sequence gives the same.
    order = packed.sorted_indices.tolist()
    for place, index in enumerate(order):
        alone = (hx[:, place : place + 1],) if kind == "gru" else tuple(state[:, place : place + 1] for state in hx)
        single = run(kind, module, flat, sequences[index][:, None], alone[0] if kind == "gru" else alone, **PRECISE)
        assert torch.equal(single[1][:, 0], states[0][:, place])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [(8, 0), (8, 32), (4, 32)])
def test_weights_of_either_width(kind, weight):
    module = KINDS[kind](64, 48)
    flat, expected_module = quantise(module, *weight)
    x, hx = torch.randn(6, 3, 64), make_state(module, 3)
    results = run(kind, module, flat, x, hx, **PRECISE)
    for got, wanted in zip(results, flatten(expected_module(x, hx)), strict=True):
        assert relative_error(got, wanted) < 2e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_what_leaves(kind, dtype):
    module = KINDS[kind](20, 40)
    flat, expected_module = quantise(module)
    x, hx = torch.randn(30, 2, 20, dtype=dtype), make_state(module, 2, dtype)
    wide = hx.float() if kind == "gru" else tuple(state.float() for state in hx)
    results = run(kind, module, flat, x, hx, **PRECISE)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 2**-11
    for got, wanted in zip(results, flatten(expected_module(x.float(), wide)), strict=True):
        assert got.dtype == dtype
        assert relative_error(got, wanted) < tolerance + 2e-4


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_a_layer_before_may_give_half_precision(kind):
    module = KINDS[kind](20, 40)
    flat, _ = quantise(module)
    x, hx = torch.randn(5, 2, 20, dtype=torch.bfloat16), make_state(module, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = flatten(module(x, hx)), run(kind, module, flat, x, hx)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert relative_error(one, other) < 0.03


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_that_of_a_linear_layer_and_below_fbgemms(kind):
    """Both sides have 8-bit weights; rows with large values among the others are what one scale for all loses."""
    module = KINDS[kind](80, 128).eval()
    flat, _ = quantise(module)
    x = torch.randn(60, 4, 80)
    x[:, 0] *= 50
    hx = make_state(module, 4)
    expected = module(x, hx)[0][:, 1:]
    ours = relative_error(run(kind, module, flat, x, hx)[0][:, 1:], expected)
    assert ours < 0.02
    if "fbgemm" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "fbgemm"
        peer = torch.ao.quantization.quantize_dynamic(nn.Sequential(module), {KINDS[kind]})[0]
        assert ours < relative_error(peer(x, hx)[0][:, 1:], expected) / 4


@pytest.mark.parametrize("kind", KINDS)
def test_cells(kind):
    module = nn.LSTMCell(10, 24) if kind == "lstm" else nn.GRUCell(10, 24)
    flat, expected_module = quantise(module)
    x, h, c = torch.randn(5, 10), torch.randn(5, 24), torch.randn(5, 24)
    hx = (h, c) if kind == "lstm" else h
    got, expected = run_recurrent_cell(kind, x, hx, *flat, **PRECISE), expected_module(x, hx)
    for one, other in zip(got, expected, strict=True) if kind == "lstm" else [(got, expected)]:
        assert one.shape == other.shape
        assert relative_error(one, other) < 2e-4


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_in_its_sequence(kind):
    module = KINDS[kind](10, 20, bidirectional=True)
    flat, _ = quantise(module)
    x, hx = torch.randn(7, 3, 10), make_state(module, 3)
    clean = run(kind, module, flat, x, hx)
    x[4, 1, 2] = torch.inf
    spoilt = run(kind, module, flat, x, hx)
    for got, wanted in zip(spoilt, clean, strict=True):
        assert torch.equal(got[:, ::2], wanted[:, ::2])
    forward, backward = spoilt[0][:, 1].isnan().split(20, dim=-1)
    assert forward.all(1).tolist() == forward.any(1).tolist() == [step >= 4 for step in range(7)]
    assert backward.all(1).tolist() == backward.any(1).tolist() == [step <= 4 for step in range(7)]


@pytest.mark.parametrize("kind", KINDS)
def test_widths_are_given_for_each_row(kind):
    module = KINDS[kind](16, 24, num_layers=2)
    flat, _ = quantise(module)
    x, seen = torch.randn(5, 2, 16), []
    run(kind, module, flat, x, make_state(module, 2), on_bits=seen.append, activation_bits=8, state_bits=7)
    assert len(seen) == 2
    for bits in seen:
        assert bits.dtype == torch.int8
        assert bits.tolist() == [[8] * 10, [7] * 10]


def test_strides_do_not_matter():
    module = nn.GRU(16, 24)
    flat, _ = quantise(module)
    x, h = torch.randn(16, 4, 10).permute(2, 1, 0), torch.randn(24, 4).t()[None]
    first = run("gru", module, flat, x, h)
    second = run("gru", module, flat, x.contiguous(), h.contiguous())
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind):
    module = KINDS[kind](8, 16, bidirectional=True)
    flat, _ = quantise(module)
    x, hx = torch.randn(4, 3, 8), make_state(module, 3)

    def call(x, hx):  # without the module: torch.compile breaks the graph where it meets one
        return run_recurrent(kind, x, hx, flat, True, 1, True)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(x, hx), call(x, hx), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_sizes", [None, torch.tensor([3, 3, 1])])
@pytest.mark.parametrize("projected", [False, True])
def test_opcheck(kind, batch_sizes, projected):
    if kind == "gru" and projected:
        pytest.skip("a GRU has no projection")
    gates, state = (4, 5) if projected else (4 if kind == "lstm" else 3, 8)
    ih, hh, hr = pack(torch.randn(gates * 8, 6)), pack(torch.randn(gates * 8, state)), pack(torch.randn(state, 8))
    x = torch.randn(7, 6) if batch_sizes is not None else torch.randn(4, 3, 6)
    tail = ([8, 8, 8][: 2 + projected], [0, 0, 0][: 2 + projected], True, 0, 16, 30.0, 10.0)
    if kind == "gru":
        arguments = (x, torch.randn(3, 8), *ih[:2], *hh[:2], None, torch.randn(24), batch_sizes, *tail)
    else:
        projection = hr[:2] if projected else (None, None)
        states = torch.randn(3, state), torch.randn(3, 8)
        arguments = (x, *states, *ih[:2], *hh[:2], *projection, torch.randn(32), None, batch_sizes, *tail)
    with torch.inference_mode(False):
        arguments = tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in arguments)
        torch.library.opcheck(getattr(ops, f"{kind}_dynamic").default, arguments)


def lstm_arguments():
    return dict(
        x=torch.randn(4, 3, 6), h0=torch.randn(3, 8), c0=torch.randn(3, 8), weight_ih=pack(torch.randn(32, 6)),
        weight_hh=pack(torch.randn(32, 8)), bias_ih=torch.randn(32), bias_hh=torch.randn(32),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.randn(4, 6)), r"x is float32 \[4, 6\] on cpu, expected \[steps, batch, inputs\]"),
        (dict(x=torch.randn(4, 3, 6).double()), "x is float64 .*, expected float32, bfloat16 or float16"),
        (dict(h0=torch.randn(2, 8)), r"h0 is float32 \[2, 8\] .*\[batch, state size\] = \[3, any\]"),
        (dict(h0=torch.randn(3, 8).half()), "h0 is float16 .*, expected x's dtype"),
        (dict(c0=torch.randn(3, 7)), r"c0 is float32 \[3, 7\] .*\[batch, hidden_size\] = \[3, 8\]"),
        (dict(weight_ih=pack(torch.randn(32, 16))), r"packed_ih is uint8 .* of 32 outputs x 6 inputs in 8 bits"),
        (dict(weight_hh=pack(torch.randn(16, 8))), r"packed_hh is uint8 .* of 32 outputs x 8 inputs in 8 bits"),
        (dict(weight_hr=pack(torch.randn(20, 8))), r"packed_hr is uint8 .* of 8 outputs x 8 inputs in 8 bits"),
        (dict(bias_ih=torch.randn(31)), r"bias_ih is float32 \[31\] .*= \[32\]"),
        (dict(bias_hh=torch.randn(32).long()), "bias_hh is int64 .*, expected float32, bfloat16 or float16"),
        (dict(x=torch.randn(5, 6), batch_sizes=torch.tensor([3, 3])), "x has 5 rows, expected the sum of batch_sizes"),
        (dict(x=torch.randn(6, 6), batch_sizes=torch.tensor([2, 4])), r"batch_sizes\[1\] is 4, expected at least 1"),
        (dict(x=torch.randn(6, 6), batch_sizes=torch.tensor([3, 3]).int()), "batch_sizes is int32 .*, expected int64"),
        (dict(batch_sizes=torch.tensor([3])), r"x is float32 \[4, 3, 6\] .*, expected \[rows, inputs\] with batch_s"),
        (dict(activation_bits=5), "activation_bits is 5, expected 4, 7, 8, 16"),
        (dict(state_bits="some"), "state_bits is 'some', expected 4, 7, 8, 16"),
        (dict(target_sqnr=-1.0, activation_bits="sqnr"), "target_sqnr is -1, expected 0 to 200"),
        (dict(outlier_ratio=-2.0), "outlier_ratio is -2, expected"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_input_is_named(changes, message):
    arguments = {**lstm_arguments(), **changes}
    with pytest.raises(ValueError, match=f"^{message}"):
        lstm_dynamic(**arguments)


def test_bad_modules_are_named():
    module = nn.LSTM(6, 8, num_layers=2)
    flat, _ = quantise(module)
    x, hx = torch.randn(4, 3, 6), make_state(module, 3)
    with pytest.raises(ValueError, match="^kind is 'rnn', expected 'lstm' or 'gru'"):
        run("rnn", module, flat, x, hx)
    with pytest.raises(
        ValueError, match=r"^weights has 7 entries, expected 4 \(or with a projection 5\) for each of 2 "
    ):
        run("lstm", module, flat[:-1], x, hx)
    with pytest.raises(ValueError, match=r"^c0 has shape \[1, 3, 8\], expected .* = \[2, ...\]"):
        run("lstm", module, flat, x, (hx[0], hx[1][:1]))
    with pytest.raises(ValueError, match="^hx has 1 tensors, expected h0 and c0"):
        run("lstm", module, flat, x, hx[:1])


def test_gradients_are_refused():
    with torch.inference_mode(False):
        x = torch.randn(4, 3, 6, requires_grad=True)
        with torch.enable_grad(), pytest.raises(RuntimeError, match="^gru_dynamic has no gradient"):
            gru_dynamic(x, torch.randn(3, 8), pack(torch.randn(24, 6)), pack(torch.randn(24, 8)))
