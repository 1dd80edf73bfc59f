"""torch_sluice.GatedAttention, and the sample of the idea that it comes from."""

import pytest
import torch
from support.attention import formula
from support.devices import DEVICES
from torch import nn

from torch_sluice import GatedAttention
from torch_sluice.attention import DensityController

DIM, HEADS, TOKENS = 24, 3, 24  # as many tokens as channels: the sample needs it


class SampleAsWritten(nn.Module):
    """The sample, line by line."""

    def __init__(self, dim, heads=8):
        super().__init__()
        self.scale = (dim // heads) ** -0.5
        self.heads = heads
        self.to_qkv = nn.Linear(dim, dim * 3)
        self.gate = nn.Sequential(nn.Linear(dim * 2, dim), nn.Sigmoid())

    def forward(self, x):
        b, n, _, h = *x.shape, self.heads
        qkv = self.to_qkv(x).chunk(3, dim=-1)
        q, k, v = (t.view(b, n, h, -1).transpose(1, 2) for t in qkv)
        attn = (torch.einsum("bhid,bhjd->bhij", q, k) * self.scale).softmax(dim=-1)
        gate = self.apply_gate(q, k)
        gate = gate.unsqueeze(-1).expand_as(attn)
        out = torch.einsum("bhij,bhjd->bhid", attn * gate, v)
        return out.transpose(1, 2).reshape(b, n, -1)

    def apply_gate(self, q, k):
        return self.gate(torch.cat([q.mean(dim=2), k.mean(dim=2)], dim=-1))


class SampleWithInputWidth(SampleAsWritten):
    """First fix: the gate reads one head of q and of k, which are dim // heads wide each, not dim."""

    def __init__(self, dim, heads=8):
        super().__init__(dim, heads)
        self.gate = nn.Sequential(nn.Linear(dim // heads * 2, dim), nn.Sigmoid())


class SampleWithoutMean(SampleAsWritten):
    """Second and third fix: no mean over tokens, and one number per pair (i, j) instead of dim numbers per head."""

    def __init__(self, dim, heads=8):
        super().__init__(dim, heads)
        self.gate = nn.Sequential(nn.Linear(dim // heads * 2, 1), nn.Sigmoid())

    def apply_gate(self, q, k):
        n = q.shape[2]
        pairs = torch.cat((q.unsqueeze(3).expand(-1, -1, -1, n, -1), k.unsqueeze(2).expand(-1, -1, n, -1, -1)), dim=-1)
        return self.gate(pairs).squeeze(-1)

    def forward(self, x):
        b, n, _, h = *x.shape, self.heads
        q, k, v = (t.view(b, n, h, -1).transpose(1, 2) for t in self.to_qkv(x).chunk(3, dim=-1))
        attn = (torch.einsum("bhid,bhjd->bhij", q, k) * self.scale).softmax(dim=-1)
        out = torch.einsum("bhij,bhjd->bhid", attn * self.apply_gate(q, k), v)
        return out.transpose(1, 2).reshape(b, n, -1)


def test_sample_as_written_has_wrong_widths():
    x = torch.randn(2, TOKENS, DIM)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        SampleAsWritten(DIM, HEADS)(x)
    SampleAsWritten(DIM, heads=1)(x)  # with one head the widths agree, so long as there are as many tokens as channels
    with pytest.raises(RuntimeError, match="expanded size"):
        SampleAsWritten(DIM, heads=1)(x[:, :-1])


def test_sample_unpacks_three_dimensions_only():
    with pytest.raises(ValueError, match="not enough values to unpack"):
        SampleAsWritten(DIM, heads=1)(torch.randn(TOKENS, DIM))


def test_sample_with_mean_gates_queries_by_channel_and_not_pairs():
    """With its widths right, the sample's gate is the same for every key: it cannot pick a pair."""
    torch.manual_seed(0)
    sample = SampleWithInputWidth(DIM, HEADS)
    x = torch.randn(2, TOKENS, DIM)
    gate = sample.apply_gate(torch.randn(2, HEADS, TOKENS, DIM // HEADS), torch.randn(2, HEADS, TOKENS, DIM // HEADS))
    assert gate.shape == (2, HEADS, DIM)  # a channel each, taken for a token each
    assert sample(x).shape == x.shape
    with pytest.raises(RuntimeError, match="expanded size"):
        sample(x[:, :-1])


def ours_with_the_weights_of(sample):
    """The layer that means the same: a gate on q and k is a gate on x, because q and k are linear in x."""
    layer = GatedAttention(DIM, HEADS, tau=0.0)
    layer.to_qkv.load_state_dict(sample.to_qkv.state_dict())
    head_dim = DIM // HEADS
    w_q, w_k, _ = (w.unflatten(0, (HEADS, head_dim)) for w in sample.to_qkv.weight.chunk(3))
    c_q, c_k, _ = (c.unflatten(0, (HEADS, head_dim)) for c in sample.to_qkv.bias.chunk(3))
    gate_q, gate_k = sample.gate[0].weight[0].split(head_dim)
    with torch.no_grad():
        layer.gate.query_weight.copy_(torch.einsum("d,hdx->hx", gate_q, w_q))
        layer.gate.query_bias.copy_(c_q @ gate_q + sample.gate[0].bias)
        layer.gate.key_weight.copy_(torch.einsum("d,hdx->hx", gate_k, w_k))
        layer.gate.key_bias.copy_(c_k @ gate_k)
    return layer


@pytest.mark.parametrize("tokens", [1, TOKENS, 50])
def test_agrees_with_the_fixed_sample(tokens):
    torch.manual_seed(0)
    sample = SampleWithoutMean(DIM, HEADS)
    layer = ours_with_the_weights_of(sample)
    x = torch.randn(2, tokens, DIM)
    x_ours, x_sample = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = layer(x_ours), sample(x_sample)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    out.backward(weight)
    expected.backward(weight)
    torch.testing.assert_close(x_ours.grad, x_sample.grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options", [dict(), dict(causal=True, window=4, sinks=2), dict(kv_heads=1, out_proj=True)], ids=str
)
def test_is_the_formula_of_its_parts(options, device):
    torch.manual_seed(0)
    layer = GatedAttention(24, 4, tau=0.5, device=device, **options)
    for parameter in layer.gate.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 30, 24, device=device)
    kv = options.get("kv_heads", 4)
    q, k, v = layer.to_qkv(x).split([24, kv * 6, kv * 6], dim=-1)
    q, k, v = (t.unflatten(-1, (-1, 6)).transpose(1, 2) for t in (q, k, v))
    chosen = {key: value for key, value in options.items() if key in ("causal", "window", "sinks")}
    out, _ = formula(q, k, v, *layer.gate(x), tau=0.5, **chosen)
    torch.testing.assert_close(layer(x), layer.out_proj(out.transpose(1, 2).flatten(-2)))


def test_starts_open():
    """g = .95 everywhere: plain attention times .95."""
    torch.manual_seed(0)
    layer = GatedAttention(24, 4)
    x = torch.randn(2, 30, 24)
    q, k, v = (t.unflatten(-1, (-1, 6)).transpose(1, 2) for t in layer.to_qkv(x).chunk(3, dim=-1))
    plain = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(layer(x), 0.95 * plain)


@pytest.mark.parametrize("device", DEVICES)
def test_padding(device):
    layer = GatedAttention(24, 4, causal=True, device=device)
    x = torch.randn(2, 30, 24, device=device)
    out = layer(x, key_range=torch.tensor([[10, 30], [0, 30]], device=device))
    torch.testing.assert_close(out[:1, 10:], layer(x[:1, 10:]))
    torch.testing.assert_close(out[1:], layer(x[1:]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtype(dtype, device):
    layer = GatedAttention(24, 4, dtype=dtype, out_proj=True, device=device)
    out = layer(torch.randn(2, 8, 24, dtype=dtype, device=device))
    assert out.dtype == dtype
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(0, 8), (2, 0), (0, 0)], ids=str)
def test_no_batch_and_no_tokens(sizes, device):
    layer = GatedAttention(24, 4, causal=True, window=4, sinks=2, out_proj=True, device=device)
    x = torch.randn(*sizes, 24, device=device, requires_grad=True)
    out = layer(x)
    assert out.shape == (*sizes, 24)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all((p.grad == 0).all() for p in layer.parameters())
    for recipe in (dict(straight_through=1.0, hard=0.0), dict(noise=1.0), dict(hard=1.0)):
        controller = DensityController(layer, 0.5, 4, **recipe)
        assert controller.loss(layer(x).sum()) == 0
        controller.step()
        assert controller.density == 1
        controller.close()


@pytest.mark.parametrize("device", DEVICES)
def test_compile(device):
    torch._dynamo.reset()
    layer = GatedAttention(24, 4, causal=True, device=device)
    x = torch.randn(2, 12, 24, device=device)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dim=24, heads=5), "dim is 24 and heads is 5, expected"),
        (dict(dim=24, heads=0), "dim is 24 and heads is 0, expected"),
        (dict(dim=24, heads=4, kv_heads=3), "heads is 4, expected a multiple of kv_heads = 3"),
        (dict(dim=24, heads=4, tau=1.0), r"tau is 1\.0, expected"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GatedAttention(**arguments)


@pytest.mark.parametrize("shape", [(8, 24), (2, 8, 23)])
def test_bad_input(shape):
    with pytest.raises(ValueError, match=r"x has shape .*, expected \[batch, tokens, 24\]"):
        GatedAttention(24, 4)(torch.randn(shape))
