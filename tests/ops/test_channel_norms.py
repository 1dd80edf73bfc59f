"""sluice::channel_norms against torch: values, any layout, threads, tracing, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_sluice.compress.norms import channel_norms

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def reference(weight, dim):
    others = [d for d in range(weight.dim()) if d != dim % weight.dim()]
    return weight.double().abs().sum(others) if others else weight.double().abs()


@st.composite
def weights(draw):
    """A weight of any shape whose memory is permuted, strided, offset or expanded."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 17, 33]), min_size=1, max_size=4))
    order = draw(st.permutations(range(len(shape))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    padded = [shape[d] for d in order]
    step = draw(st.sampled_from([1, 1, 2, 3]))
    padded[-1] *= step
    base = torch.randn(padded, generator=generator).to(draw(st.sampled_from(DTYPES)))[..., ::step]
    weight = base.permute([order.index(d) for d in range(len(shape))])
    if draw(st.booleans()) and 1 in shape:
        weight = weight.expand([4 if size == 1 else size for size in shape])
    return weight, draw(st.integers(-len(shape), len(shape) - 1))


@settings(max_examples=150)
@given(weights())
def test_norms_are_those_of_torch_in_float64(case):
    weight, dim = case
    norms, expected = channel_norms(weight, dim), reference(weight, dim)
    assert norms.shape == (weight.shape[dim],)
    assert norms.dtype == (torch.float64 if weight.dtype == torch.float64 else torch.float32)
    tolerance = 1e-13 if weight.dtype == torch.float64 else 6.1e-8  # half a unit in the last place of the result
    torch.testing.assert_close(norms.double(), expected, rtol=tolerance, atol=0)


def test_equal_channels_tie_and_zeros_are_zero():
    weight = torch.randn(1, 40, 3, 3).repeat(6, 1, 1, 1)
    weight[4] = 0
    for layout in (weight, weight.to(memory_format=torch.channels_last), weight.double()):
        norms = channel_norms(layout, 0)
        assert norms[4] == 0
        assert norms[[0, 1, 2, 3, 5]].unique().numel() == 1


def test_parameters_are_read_without_a_graph():
    assert not channel_norms(torch.nn.Linear(3, 4).weight, 1).requires_grad


def test_the_same_bits_with_any_number_of_threads():
    weight, threads = torch.randn(300, 700), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([channel_norms(weight, 0), channel_norms(weight, 1)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_what_is_not_finite_shows_in_its_channel_only():
    weight = torch.randn(50, 30)
    weight[3, 7], weight[9, 0] = torch.nan, -torch.inf
    norms = channel_norms(weight, 0)
    assert norms.isnan().nonzero().tolist() == [[3]]
    assert norms.isinf().nonzero().tolist() == [[9]]


def test_opcheck_and_tracing():
    operator = torch.ops.sluice.channel_norms.default
    for weight, dim in ((torch.randn(5, 6), 0), (torch.randn(2, 3, 4, 5).half(), -3), (torch.randn(3).double(), 0)):
        torch.library.opcheck(operator, (weight, dim))
    torch._dynamo.reset()
    compiled = torch.compile(lambda w: operator(w * 2, 1), fullgraph=True, backend="aot_eager")
    weight = torch.randn(7, 9)
    assert torch.equal(compiled(weight), operator(weight * 2, 1))


@pytest.mark.parametrize(
    ("weight", "dim", "message"),
    [
        (torch.tensor(1.0), 0, r"weight .*\[\].*, expected a rank of 1 to 8"),
        (torch.zeros([1] * 9), 0, r"weight .*, expected a rank of 1 to 8"),
        (torch.zeros(2, 3), 2, r"dim is 2, expected -2 to 1"),
        (torch.zeros(2, 3), -3, r"dim is -3, expected -2 to 1"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            0,
            r"weight is .*int64.*, expected float32, bfloat16, float16 or float64",
        ),
    ],
)
def test_bad_input_is_refused_with_its_value(weight, dim, message):
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=message):
            channel_norms(weight.to(device), dim)
