"""Masks of swapped layers: windows that slide, and rows that see nothing."""

import warnings

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from torch_sluice import gate_parameters, swap_attention
from torch_sluice.attention import Gate
from torch_sluice.swap.call import GateOptions, attend_gated, attend_open
from torch_sluice.swap.dense import dense_gated_attention
from torch_sluice.swap.masks import operator_mask, read_mask

N = 9
PLACES = torch.arange(N)
DISTANCE = PLACES[:, None] - PLACES
PADDING = {
    "none": torch.ones(2, N, dtype=torch.bool),
    "left": torch.tensor([3, 0])[:, None] <= PLACES,
    "right": torch.tensor([6, N])[:, None] > PLACES,
}
LEAST = torch.finfo(torch.float32).min


def draw():
    torch.manual_seed(0)
    return [torch.randn(2, heads, N, 8, requires_grad=True) for heads in (4, 2, 2)]


def by_torch(q, k, v, mask):
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("dropped", [None, LEAST, -torch.inf], ids=["bool", "least", "inf"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("window", [1, 3, None])
@pytest.mark.parametrize("causal", [True, False])
def test_open_attention_is_that_of_torch(causal, window, padding, dropped):
    q, k, v = draw()
    keep = (DISTANCE >= 0) if causal else torch.ones(N, N, dtype=torch.bool)
    if window is not None:
        keep = keep & (DISTANCE.abs() < window)
    mask = keep & PADDING[padding][:, None, None]
    mask = mask if dropped is None else torch.zeros(mask.shape).masked_fill(~mask, dropped)
    pattern = read_mask(mask, 2, N, N, causal)
    assert pattern.window == (window or 0) or window == 1
    expected = by_torch(q, k, v, mask)
    with torch.no_grad():
        torch.testing.assert_close(attend_open(q, k, v, mask=mask, causal=causal, scale=None), expected)
    out = attend_open(q, k, v, mask=mask, causal=causal, scale=None)
    assert (out is None) == (pattern.uniform is not None)  # rows of means have a gradient that is torch's to give
    if out is None:
        return
    weights = torch.randn_like(out)
    ours = torch.autograd.grad((out * weights).sum(), (q, k, v))
    for mine, other in zip(ours, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(mine, other)


def test_masks_that_are_no_window():
    window = ((DISTANCE >= 0) & (DISTANCE < 3)).expand(2, 1, N, N)
    assert read_mask(window, 2, N, N, True).window == 3
    for i, j in ((4, 0), (8, 4), (0, 5)):
        other = window.clone()
        other[1, 0, i, j] = True
        assert read_mask(other, 2, N, N, True) is None
    hole = window.clone()
    hole[1, 0, 4, 4] = False
    assert read_mask(hole, 2, N, N, True) is None
    chunks = (PLACES[:, None] // 3 == PLACES // 3) & (DISTANCE >= 0)
    assert read_mask(chunks[None, None], 2, N, N, True) is None


def test_of_two_readings_that_of_the_layer_is_taken():
    """Two queries of cross attention, and one token of padding on the right: the causal mask is the same."""
    mask = torch.ones(2, 1, 2, N, dtype=torch.bool)
    mask[..., -1] = False
    assert not read_mask(mask.clone(), 2, 2, N, False).causal
    assert read_mask(mask, 2, 2, N, True).causal


def test_rows_of_two_kinds_of_nothing():
    """Where -inf and the most negative number meet, the mean is that of some values: it is left to torch."""
    mask = torch.zeros(2, 1, N, N).masked_fill(~(DISTANCE >= 0), LEAST)
    mask[0, :, 0, 0] = -torch.inf
    assert read_mask(mask, 2, N, N, True) is None


def test_shapes_that_torch_broadcasts():
    q, k, v = draw()
    assert attend_open(q[:1], k, v, mask=None, causal=False, scale=None) is None
    assert attend_open(q, k, v.double(), mask=None, causal=False, scale=None) is None
    assert attend_open(q, k, v, mask=torch.zeros(N, N), causal=False, scale=None) is None
    assert attend_open(q, k, v, mask=torch.zeros(2, 1, N, N, dtype=torch.long), causal=False, scale=None) is None


@pytest.mark.parametrize("how", ["data", "numpy", "inference"])
def test_a_mask_that_changed_in_silence_is_read_again(how):
    """Writes that raise no version: what was read of a mask is compared with what it holds."""
    if how == "inference":
        with torch.inference_mode():
            mask = torch.ones(1, 1, N, N, dtype=torch.bool).tril()
    else:
        mask = torch.ones(1, 1, N, N, dtype=torch.bool).tril()
    assert read_mask(mask, 1, N, N, True).key_range is None
    if how == "data":
        mask.data[..., :2] = False
    elif how == "numpy":
        mask.numpy()[..., :2] = False
    else:
        with torch.inference_mode():
            mask[..., :2] = False
    assert read_mask(mask, 1, N, N, True).key_range.tolist() == [[2, N]]


def masks_beyond_patterns():
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    hole = causal.clone()
    hole[4:, 2] = False
    bias = torch.randn(1, 4, N, N).masked_fill(~causal, torch.finfo(torch.float32).min)
    strided = causal & ((torch.arange(N)[:, None] - torch.arange(N)) % 3 != 1)
    return dict(hole=hole[None, None], bias=bias, strided=strided[None, None])


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("name", masks_beyond_patterns())
def test_masks_beyond_patterns_are_the_operators(name, sinks):
    """Values, weights and gradients are those of the dense formula, without a warning; dropped pairs teach."""
    if name == "strided" and sinks:
        pytest.skip("texts that begin at different keys of a row: computed densely")
    torch.manual_seed(0)
    mask = masks_beyond_patterns()[name]
    gate = Gate(8, 4, 2, tau=0.5)
    q, k, v = torch.randn(2, 4, N, 8), torch.randn(2, 2, N, 8), torch.randn(2, 2, N, 8)
    a, b = torch.randn(2, 4, N), torch.randn(2, 2, N)
    results = []
    for dense in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, a, b)]
        *qkv, one, other = leaves
        if dense:
            options = dict(mask=mask, keep_self=True, tau=0.5, window=1, sinks=sinks)
            out, weights = dense_gated_attention(*qkv, one, other, **options)
        else:
            gate.eval()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                out, compute = attend_gated(gate, (one, other), GateOptions(1, sinks), *qkv, mask=mask, causal=True)
            weights = compute()
        results.append((out, weights, *torch.autograd.grad(out.square().sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    gate.train()
    gate.phase, gate.rows, gate.record = "straight_through", 1.0, []
    leaves = [x.clone().requires_grad_() for x in (a, b)]
    out, _ = attend_gated(gate, tuple(leaves), GateOptions(1, sinks), q, k, v, mask=mask, causal=True)
    taught = torch.autograd.grad(out.square().sum(), leaves)
    assert not torch.allclose(taught[0], results[0][5], atol=1e-3)
    assert len(gate.record) == 1


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("target_density", [None, 0.5])
def test_a_compiled_model_that_adds_to_its_masks(target_density, padded):
    """Falcon with ALiBi hands numbers to SDPA that are positions and hide later keys."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=4, vocab_size=50, initializer_range=0.3, alibi=True
    )
    model = transformers.FalconForCausalLM(config).eval()
    ids = torch.arange(24).view(2, 12)
    seen = torch.ones_like(ids)
    seen[0, : 4 * padded] = 0
    with torch.no_grad():
        dense = model(ids, attention_mask=seen, use_cache=False).logits[seen.bool()]
        swap_attention(model, target_density=target_density, window=1, sinks=2)
        for parameter in gate_parameters(model):
            parameter.normal_(std=2)
        expected = model(ids, attention_mask=seen, use_cache=False).logits[seen.bool()]
        compiled = torch.compile(model, backend="aot_eager")
        found = compiled(ids, attention_mask=seen, use_cache=False).logits[seen.bool()]
    torch.testing.assert_close(found, expected)
    assert torch.allclose(expected, dense, atol=1e-4) == (target_density is None)


def test_a_compiled_bias_is_added():
    """A compiler can't look at a mask: numbers may say more than who sees whom."""
    q, k, v = draw()
    bias = torch.randn(2, 1, N, N).masked_fill(DISTANCE < 0, LEAST)

    @torch.compile(backend="eager")
    def run(q, k, v, mask):
        return attend_open(q, k, v, mask=mask, causal=True, scale=None)

    with torch.no_grad():
        run(q, k, v, torch.zeros(2, 1, N, N).masked_fill(DISTANCE < 0, LEAST))
        torch.testing.assert_close(run(q, k, v, bias), by_torch(q, k, v, bias))


def test_layers_share_what_was_read_of_a_mask():
    """Also of one beyond the patterns; not of one that learns, nor what inference mode made, which trains nobody."""
    mask = masks_beyond_patterns()["hole"]
    first = operator_mask(mask, 2, N, N, True, 2)
    assert operator_mask(mask, 2, N, N, True, 2) is first
    with torch.inference_mode():
        assert operator_mask(mask, 2, N, N, True, 2) is not first
    mask.data[..., 5, 3] = False
    assert not operator_mask(mask, 2, N, N, True, 2).attn_mask[0, 0, 5, 3]
    bias = masks_beyond_patterns()["bias"].requires_grad_()
    assert operator_mask(bias, 2, N, N, True, 0) is not operator_mask(bias, 2, N, N, True, 0)
