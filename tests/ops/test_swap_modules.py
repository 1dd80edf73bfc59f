"""swap_attention and restore on plain torch models: nn.MultiheadAttention and callers of SDPA."""

import copy
import pickle

import pytest
import torch
from support.devices import DEVICES
from torch import nn
from torch.nn import functional as F

from torch_sluice import gate_parameters, restore, swap_attention
from torch_sluice.attention import Gate

DIM, HEADS, TOKENS = 16, 4, 11
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
PADDING = torch.zeros(3, TOKENS, dtype=torch.bool)
PADDING[0, :4], PADDING[1, -3:] = True, True
HOLES = torch.zeros(3, TOKENS, dtype=torch.bool)
HOLES[0, 5] = True
BIAS = torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(3))
MASKS = {
    "none": dict(),
    "causal bool": dict(attn_mask=CAUSAL),
    "causal float": dict(attn_mask=nn.Transformer.generate_square_subsequent_mask(TOKENS)),
    "causal hint": dict(attn_mask=CAUSAL, is_causal=True),
    "padding": dict(key_padding_mask=PADDING),
    "padding float": dict(key_padding_mask=torch.zeros(3, TOKENS).masked_fill(PADDING, -torch.inf)),
    "causal and padding": dict(attn_mask=CAUSAL, key_padding_mask=PADDING, is_causal=True),
    "holes": dict(key_padding_mask=HOLES),
    "bias": dict(attn_mask=BIAS),
    "per head": dict(attn_mask=CAUSAL.expand(3 * HEADS, -1, -1)),
}


def randomise_gates(model, spread=1.0):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in gate_parameters(model):
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))


def same(ours, theirs, keep=None):
    if keep is not None:
        ours, theirs = ours[keep], theirs[keep]
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_open_gates_change_nothing(name, need_weights, batch_first):
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first)
    x = torch.randn(3, TOKENS, DIM) if batch_first else torch.randn(TOKENS, 3, DIM)
    options = MASKS[name] | dict(need_weights=need_weights)
    out, weights = mha(x, x, x, **options)
    swap_attention(mha)
    assert not gate_parameters(mha)
    ours, our_weights = mha(x, x, x, **options)
    # A query that is given no key at all is NaN in torch and 0 here.
    seen = ~out.isnan()
    same(ours, out, seen)
    assert (our_weights is None) == (weights is None)
    if need_weights:
        same(our_weights, weights)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.filterwarnings("ignore:this attention mask is not")
def test_multihead_gates_follow_the_formula(name, batch_first, window):
    """Gates move what passes: out is (softmax over kept pairs * gate) v, and so are the weights that are returned."""
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first, dropout=0.0)
    swap_attention(mha, target_density=0.5, window=window, sinks=1)
    randomise_gates(mha)
    x = torch.randn(3, TOKENS, DIM)
    given = x if batch_first else x.transpose(0, 1)
    out, weights = mha(given, given, given, average_attn_weights=False, **MASKS[name])
    same(mha(given, given, given, need_weights=False, **MASKS[name])[0], out)
    v = F.linear(x, mha.in_proj_weight[2 * DIM :], mha.in_proj_bias[2 * DIM :])
    v = v.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    expected = mha.out_proj((weights @ v).transpose(1, 2).flatten(-2))
    same(out if batch_first else out.transpose(0, 1), expected)
    a, b = mha.sluice_gate(x)
    z = a[..., None] + b[..., None, :]
    i = torch.arange(TOKENS)
    padding = MASKS[name].get("key_padding_mask", torch.zeros(3, TOKENS))
    unseen = padding if padding.dtype == torch.bool else padding < 0
    first = (~unseen).long().argmax(-1).view(-1, 1, 1, 1)  # the sink of a padded row is its first token
    near = ((i[:, None] - i).abs() < max(window, 1)) | (i == first)
    assert (weights[(z < 0).logical_and(~near)] == 0).all()
    assert (weights > 0).any()


def test_multihead_unbatched_cross_and_separate_widths():
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(DIM, HEADS, kdim=10, vdim=12, bias=False, batch_first=True)
    cases = [
        (torch.randn(2, 5, DIM), torch.randn(2, 9, 10), torch.randn(2, 9, 12)),
        (torch.randn(5, DIM), torch.randn(9, 10), torch.randn(9, 12)),
    ]
    expected = [mha(*case, need_weights=False)[0] for case in cases]
    swap_attention(mha)
    for case, right in zip(cases, expected, strict=True):
        same(mha(*case, need_weights=False)[0], right)


def test_multihead_cross_attention_with_a_gate():
    torch.manual_seed(0)
    mha = swap_attention(nn.MultiheadAttention(DIM, HEADS, batch_first=True), target_density=0.5, window=0, sinks=0)
    randomise_gates(mha)
    query, key = torch.randn(2, 5, DIM), torch.randn(2, 9, DIM)
    out, weights = mha(query, key, key, average_attn_weights=False)
    same(mha(query, key, key, need_weights=False)[0], out)
    a, b = mha.sluice_gate(query, key)
    assert torch.equal(weights > 0, a[..., None] + b[..., None, :] >= 0)


class Encoder(nn.Module):
    def __init__(self, norm_first=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)

    def forward(self, x, **masks):
        return self.body(x, **masks)


@pytest.mark.parametrize("training", [True, False])
def test_encoder_fast_path_is_not_taken(training):
    torch.manual_seed(0)
    model = Encoder().train(training)
    x = torch.randn(3, TOKENS, DIM)
    cases = [dict(), dict(mask=CAUSAL), dict(src_key_padding_mask=PADDING.flip(0) & (torch.arange(TOKENS) > 7))]
    with torch.no_grad():
        expected = [model(x, **case) for case in cases]
        swap_attention(model)
        for case, right in zip(cases, expected, strict=True):
            ours = model(x, **case)
            keep = ~case["src_key_padding_mask"] if "src_key_padding_mask" in case else None  # the rest is padding
            same(ours, right, keep)
        restore(model)
        swap_attention(model, target_density=0.5)
        randomise_gates(model, 3.0)
        assert not torch.allclose(model(x), expected[0])  # the gates are really asked
        restore(model)
        assert torch.equal(model(x, **cases[2]), expected[2])


@pytest.mark.parametrize("device", DEVICES)
def test_decoder_layer(device):
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(DIM, HEADS, 32, dropout=0.0, batch_first=True, device=device)
    x, memory = torch.randn(3, TOKENS, DIM, device=device), torch.randn(3, 5, DIM, device=device)
    expected = model(x, memory, tgt_mask=CAUSAL.to(device), tgt_is_causal=True)
    swap_attention(model)
    same(model(x, memory, tgt_mask=CAUSAL.to(device), tgt_is_causal=True), expected)


class Attention(nn.Module):
    """As a small GPT writes it."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.n_head, self.dropout = HEADS, dropout
        self.c_attn, self.c_proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x, mask=None, past=None):
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, dim=-1))
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=p, is_causal=mask is None and past is None
        )
        return self.c_proj(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(DIM), Attention(dropout), nn.Linear(DIM, DIM)

    def forward(self, x, **options):
        x = x + self.attn(self.norm(x), **options)
        return x + self.mlp(x).relu()


class GPT(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(50, DIM), nn.ModuleList(Block(dropout) for _ in range(2))
        self.head = nn.Linear(DIM, 50)

    def forward(self, ids, **options):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, **options)
        return self.head(x)


IDS = torch.arange(3 * TOKENS).view(3, TOKENS) % 50


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "mask", [None, ~CAUSAL, BIAS, (~PADDING)[:, None, None, :]], ids=["no", "causal", "bias", "padding"]
)
def test_sdpa_open_gates_change_nothing(mask, device):
    torch.manual_seed(0)
    model, ids, mask = GPT().to(device), IDS.to(device), None if mask is None else mask.to(device)
    expected = model(ids, mask=mask)
    expected.square().mean().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    swap_attention(model)
    out = model(ids, mask=mask)
    same(out, expected)
    out.square().mean().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        same(parameter.grad, gradient)


@pytest.mark.parametrize("device", DEVICES)
def test_sdpa_gates_are_asked_and_learn(device):
    torch.manual_seed(0)
    model, ids = swap_attention(GPT().to(device), target_density=0.5), IDS.to(device)
    assert [name for name, m in model.named_modules() if isinstance(m, Gate)] == [
        "blocks.0.attn.sluice_gate",
        "blocks.1.attn.sluice_gate",
    ]
    assert len(gate_parameters(model)) == 8
    assert {id(p) for p in gate_parameters(model)} <= {id(p) for p in model.parameters()}
    plain = model(ids)
    plain.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gate_parameters(model))
    randomise_gates(model, 3.0)
    model.blocks[0].attn.sluice_options = model.blocks[0].attn.sluice_options._replace(window=1)
    assert not torch.allclose(model(ids), plain)


@pytest.mark.parametrize("target_density", [None, 0.5])
@pytest.mark.filterwarnings("ignore:this attention mask is not")
def test_a_bias_that_learns_gets_its_gradient(target_density):
    """Though it is all zeros at first, as a mask that keeps everything is."""
    model = swap_attention(GPT(), target_density=target_density)
    bias = torch.zeros(TOKENS, TOKENS, requires_grad=True)
    model(IDS, mask=bias).square().mean().backward()
    assert bias.grad.abs().max() > 0


def test_sdpa_causal_and_mask_at_once():
    class Both(Attention):
        def forward(self, x):
            q = x.unsqueeze(1)
            return F.scaled_dot_product_attention(q, q, q, attn_mask=~CAUSAL, is_causal=True).squeeze(1)

    x = torch.randn(3, TOKENS, DIM)
    try:
        expected = Both()(x)
    except RuntimeError:  # older versions of torch refuse it
        with pytest.raises(RuntimeError):
            swap_attention(Both())(x)
    else:
        assert torch.equal(swap_attention(Both())(x), expected)
    with pytest.raises(ValueError, match="is_causal is True and attn_mask is given, expected one of them"):
        swap_attention(Both(), target_density=0.5)(x)


def test_sdpa_with_a_cache_of_its_own():
    model = GPT()
    block, x = model.blocks[0], torch.randn(3, 1, DIM)
    past = torch.randn(2, 3, HEADS, 7, DIM // HEADS)
    expected = block(x, past=past)
    swap_attention(model)
    same(block(x, past=past), expected)
    restore(model)
    swap_attention(model, target_density=0.5)
    with pytest.raises(ValueError, match="attends from 1 to 8 tokens, and its gate saw 1 and 1"):
        block(x, past=past)


def test_sdpa_shapes_that_only_torch_takes():
    class Odd(nn.Module):
        def forward(self, x):
            y = F.scaled_dot_product_attention(x, x, x)  # [B, N, D], no heads
            z = x.unsqueeze(1)
            return y + F.scaled_dot_product_attention(z, z[:, :, :5], z[:, :, :5], is_causal=True).squeeze(1)

    model, x = Odd(), torch.randn(3, TOKENS, DIM)
    expected = model(x)
    swap_attention(model)
    same(model(x), expected)


def test_sizes_are_guessed_or_seen():
    class Nameless(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Parameter(torch.randn(DIM, 3 * DIM))

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (x @ self.qkv).chunk(3, dim=-1))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)

    model = Nameless()
    with pytest.raises(ValueError, match=r"the sizes of the model \(Nameless\) are not to be guessed.*example="):
        swap_attention(model, target_density=0.5)
    assert not list(model.children())
    assert "forward" not in vars(model)
    swap_attention(model, target_density=0.5, example=(torch.randn(1, 5, DIM),))
    assert (model.sluice_gate.dim, model.sluice_gate.heads) == (DIM, 2)
    model(torch.randn(2, 6, DIM))


def test_modules_choose():
    model = swap_attention(GPT(), target_density=0.5, modules=["blocks.1.attn"])
    assert len(gate_parameters(model)) == 4
    model = swap_attention(GPT(), target_density=0.5, modules=lambda name, module: name.startswith("blocks.0"))
    assert hasattr(model.blocks[0].attn, "sluice_gate")
    assert not hasattr(model.blocks[1].attn, "sluice_gate")
    with pytest.raises(ValueError, match=r"modules has 'blocks\.7', expected names or modules of"):
        swap_attention(GPT(), modules=["blocks.7"])


def test_dropout():
    torch.manual_seed(0)
    model, x = GPT(dropout=0.5), IDS
    torch.manual_seed(1)
    expected = model(x)
    swap_attention(model)
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)  # open gates: torch's own path, dropout and all
    restore(model)
    swap_attention(model, target_density=0.5)
    torch.manual_seed(1)
    first = model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), first)
    assert not torch.equal(model(x), first)
    model.eval()(x)


MODELS = {"mha": Encoder, "sdpa": GPT}


@pytest.mark.parametrize("sizes", [(0, TOKENS), (3, 0)], ids=str)
@pytest.mark.parametrize("target_density", [None, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_no_batch_and_no_tokens(name, target_density, sizes):
    model = swap_attention(MODELS[name](), target_density=target_density)
    x = torch.zeros(sizes, dtype=torch.long) if name == "sdpa" else torch.randn(*sizes, DIM)
    out = model(x)
    assert out.shape[:2] == sizes
    out.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("target_density", [None, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_restore_leaves_nothing(name, target_density):
    model = MODELS[name]()
    before = {
        "state": {key: x.data_ptr() for key, x in model.state_dict().items()},
        "types": [type(m) for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "attributes": [set(vars(m)) for m in model.modules()],
        "nested": [getattr(m, "use_nested_tensor", None) for m in model.modules()],
    }
    swap_attention(model, target_density=target_density)
    assert set(model.state_dict()) >= set(before["state"])
    restore(model)
    assert {key: x.data_ptr() for key, x in model.state_dict().items()} == before["state"]
    assert [type(m) for m in model.modules()] == before["types"]
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before["hooks"]
    assert [set(vars(m)) for m in model.modules()] == before["attributes"]
    assert [getattr(m, "use_nested_tensor", None) for m in model.modules()] == before["nested"]


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_copy_and_pickle(name):
    torch.manual_seed(0)
    x = IDS if name == "sdpa" else torch.randn(3, TOKENS, DIM)
    model = swap_attention(MODELS[name]().eval(), target_density=0.5)
    randomise_gates(model)
    expected = model(x)
    other = swap_attention(MODELS[name]().eval(), target_density=0.5)
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        state = set(restore(twin).state_dict())
        assert state == {key for key in model.state_dict() if "sluice" not in key}
    assert torch.equal(model(x), expected)  # untouched by what was done to its copies


@pytest.mark.parametrize("target_density", [None, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_compile(name, target_density):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = swap_attention(MODELS[name](), target_density=target_density)
    x = IDS if name == "sdpa" else torch.randn(3, TOKENS, DIM)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x), model(x)
    same(out, expected)
    ours = torch.autograd.grad(out.square().mean(), list(model.parameters()))
    theirs = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
    for mine, other in zip(ours, theirs, strict=True):
        same(mine, other)


def test_model_without_attention():
    with pytest.raises(ValueError, match="model is a Sequential without attention that can be swapped, expected"):
        swap_attention(nn.Sequential(nn.Linear(3, 3)))


def test_refusals():
    with pytest.raises(ValueError, match=r"model is a function, expected an nn\.Module"):
        swap_attention(test_refusals)
    with pytest.raises(ValueError, match=r"target_density is 1\.5, expected a number in \(0, 1\]"):
        swap_attention(GPT(), target_density=1.5)
    with pytest.raises(ValueError, match="window is -1 and sinks is 4, expected both at least 0"):
        swap_attention(GPT(), window=-1)
    with pytest.raises(ValueError, match="model is not swapped"):
        restore(GPT())
    model = swap_attention(GPT())
    with pytest.raises(ValueError, match="model is swapped already"):
        swap_attention(model)
    with pytest.raises(
        ValueError, match=r"Left alone: the model itself \(MultiheadAttention\): it adds keys of its own"
    ):
        swap_attention(nn.MultiheadAttention(DIM, HEADS, add_bias_kv=True))
