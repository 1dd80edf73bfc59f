"""Attention functions of a user's own: marked, tried at the swap, and then served by the operator."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_sluice
from torch_sluice import attention_function, gate_parameters, restore, swap_attention
from torch_sluice.attention import DensityController
from torch_sluice.swap import call
from torch_sluice.swap.dense import dense_gated_attention

DIM, HEADS, TOKENS = 16, 4, 9
NAMES = dict(query="q", key="k", value="v", scale=None, causal=False)
X = torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(1))


def later(n_q, n_k):
    return torch.ones(n_q, n_k, dtype=torch.bool).triu(n_k - n_q + 1)


@attention_function(**NAMES | dict(causal=True, mask="mask", mask_means="seen"))
def attend(q, k, v, mask=None):
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(later(q.shape[2], k.shape[2]), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


class Layer(nn.Module):
    """q, k and v of its input, and attention by a function of the file."""

    def __init__(self):
        super().__init__()
        self.n_head = HEADS
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def split(self, x):
        return (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))

    def attend(self, q, k, v, mask):
        return attend(q, k, v, mask)

    def forward(self, x, mask=None):
        return self.out(self.attend(*self.split(x), mask).transpose(1, 2).flatten(-2))


@pytest.fixture
def operator_calls(monkeypatch):
    calls, original = [], call.gated_attention
    monkeypatch.setattr(call, "gated_attention", lambda *q, **options: calls.append(options) or original(*q, **options))
    return calls


def make(cls=Layer):
    torch.manual_seed(0)
    return nn.Sequential(cls(), cls()).eval()


def randomise_gates(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in gate_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


PADDING = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
PADDING[0, ..., 6:] = False


@pytest.mark.parametrize("mask", [None, PADDING], ids=["whole", "padded"])
def test_open_gates_change_nothing_and_use_the_operator(mask, operator_calls):
    model = make()
    expected = model[1](model[0](X, mask), mask)
    swap_attention(model)
    torch.testing.assert_close(model[1](model[0](X, mask), mask), expected)
    assert len(operator_calls) == 2
    restore(model)
    assert "forward" not in vars(model[0])


def test_rows_that_see_no_key_are_the_functions_own(operator_calls):
    mask = PADDING.flip(-1)
    model = make()
    expected = model[0](X, mask)
    swap_attention(model)
    torch.testing.assert_close(model[0](X, mask), expected, equal_nan=True)
    assert not operator_calls
    assert expected.isnan().any()


def test_gates_compute_the_formula_and_train():
    model = make()
    swap_attention(model, target_density=0.5, window=2, sinks=1)
    randomise_gates(model)
    layer, gate = model[0], model[0].sluice_gate
    q, k, v = layer.split(X)
    options = dict(causal=True, tau=gate.tau, window=2, sinks=1, mask=PADDING)
    expected = dense_gated_attention(q, k, v, *gate(X), **options)[0]
    torch.testing.assert_close(layer(X, PADDING), layer.out(expected.transpose(1, 2).flatten(-2)))
    controller = DensityController(model.train(), steps=2)
    controller.loss(model(X).square().mean()).backward()
    assert all(p.grad is not None and p.grad.any() for p in gate_parameters(model))
    controller.step()
    controller.close()


@pytest.mark.parametrize("target_density", [None, 0.5])
def test_compiled_copied_and_pickled(target_density):
    model = make()
    swap_attention(model, target_density=target_density)
    randomise_gates(model)
    expected = model(X)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(X), expected)
    torch.testing.assert_close(copy.deepcopy(model)(X), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(X), expected)


def test_outside_of_a_swapped_layer_the_function_is_what_it_was(operator_calls):
    swap_attention(make())
    q = torch.randn(1, 2, 5, 8)
    assert torch.equal(attend(q, q, q), attend.__wrapped__(q, q, q))
    assert not operator_calls


# --- what may be said of a function ---------------------------------------------------------------------------------


def formula(q, k, v, scale=None, bias=0.0):
    return (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias).softmax(-1) @ v


class Method(Layer):
    """A method, a path to its scale, a cap, dropout, numbers as mask, positions as bias; gives the weights, too."""

    def __init__(self):
        super().__init__()
        self.strength, self.drop = 0.4, nn.Dropout(0.1)
        self.positions = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    @attention_function(
        query="q", key="k", value="v", scale="self.strength", causal=False, mask="mask", mask_means="added",
        bias="bias", softcap="cap", dropout="self.drop", key_layout="bhdn", output="bnc",
    )  # fmt: skip
    def core(self, q, k, v, mask=None, bias=None, *, cap):
        scores = q @ k * self.strength
        scores = cap * torch.tanh(scores / cap) + (0 if bias is None else bias) + (0 if mask is None else mask)
        weights = scores.softmax(-1)
        return (self.drop(weights) @ v).transpose(1, 2).flatten(-2), weights

    def forward(self, x, mask=None):
        q, k, v = self.split(x)
        out, self.seen = self.core(q, k.mT, v, mask, self.positions, cap=0.7)
        return self.out(out)


def test_a_method_with_all_that_attention_has():
    model = make(Method)
    numbers = torch.randn(2, 1, TOKENS, TOKENS)
    expected, weights = model[0](X, numbers), model[0].seen
    swap_attention(model, target_density=0.5, window=100)  # all pairs are near, and none gated
    torch.testing.assert_close(model[0](X, numbers), expected)
    torch.testing.assert_close(model[0].seen * 1, weights)
    model[0](X, numbers).sum().backward()
    assert model[0].positions.grad.any()
    model.train()
    assert not torch.equal(model(X), model(X))  # dropout


class Tokens(Layer):
    """flash-attention's layout, and booleans that hide."""

    @staticmethod
    @attention_function(**NAMES | dict(layout="bnhd", mask="hidden", mask_means="hidden"))
    def core(q, k, v, hidden=None):
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        scores = scores if hidden is None else scores.masked_fill(hidden, torch.finfo(q.dtype).min)
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)

    def forward(self, x, mask=None):
        q, k, v = (y.transpose(1, 2) for y in self.split(x))
        return self.out(self.core(q, k, v, mask).flatten(-2))


def test_a_static_method_in_another_layout_whose_hidden_rows_are_means(operator_calls):
    hidden = torch.zeros(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    hidden[1] = True
    model = make(Tokens)
    with torch.no_grad():
        expected = model[0](X, hidden)
        torch.testing.assert_close(swap_attention(model)[0](X, hidden), expected)
    assert len(operator_calls) == 1


class OneHead(nn.Module):
    """No heads at all, of [batch, tokens, head_dim]."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)

    @attention_function(**NAMES | dict(layout="bnd"))
    def core(self, q, k, v):
        return formula(q, k, v)

    def forward(self, x):
        return self.core(*self.qkv(x).chunk(3, -1))


class Core(nn.Module):
    """A module whose forward is the function."""

    @attention_function(**NAMES)
    def forward(self, q, k, v):
        return formula(q, k, v)


class Around(Layer):
    def __init__(self):
        super().__init__()
        self.core = nn.ModuleList([Core()])

    def attend(self, q, k, v, mask):
        return self.core[0](q, k, v)


class Grouped(Layer):
    """Two query heads of each key head, repeated by the function."""

    def __init__(self):
        super().__init__()
        self.num_kv_heads = HEADS // 2

    @attention_function(**NAMES)
    def core(self, q, k, v):
        return formula(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1), v.repeat_interleave(2, 1))

    def attend(self, q, k, v, mask):
        return self.core(q, k[:, ::2], v[:, ::2])


@pytest.mark.parametrize("cls", [OneHead, Around, Grouped])
def test_forms_that_layers_have(cls, operator_calls):
    example = dict(input=X)
    model = make(cls)
    expected = model(X)
    torch.testing.assert_close(swap_attention(model, example=example)(X), expected)
    operator_calls.clear()
    model(X)
    assert len(operator_calls) == 2
    swap_attention(restore(model), target_density=0.5, window=100, example=example)
    torch.testing.assert_close(model(X), expected)
    assert len([name for name, _ in model.named_modules() if name in ("0.sluice_gate", "1.sluice_gate")]) == 2


def through(layer, x):
    q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in layer.qkv(x).chunk(3, -1))
    return attend(q, k, v).transpose(1, 2).flatten(-2)


class Indirect(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x):
        return through(self, x)


def test_a_layer_that_goes_through_a_helper_is_named(operator_calls):
    model = make(Indirect)
    with pytest.raises(ValueError, match=r"through a helper outside of its class, name the layer in modules="):
        swap_attention(model)
    expected = model(X)
    torch.testing.assert_close(swap_attention(model, modules=["0", "1"])(X), expected)
    assert len(operator_calls) == 2


def test_a_call_that_was_not_said_goes_the_old_way_or_is_refused(operator_calls):
    @attention_function(**NAMES)
    def more(q, k, v, twice=False):
        return formula(q, k, v) * (2 if twice else 1)

    class Twice(Layer):
        def attend(self, q, k, v, mask):
            return more(q, k, v, twice=True)

    model = make(Twice)
    expected = model(X)
    torch.testing.assert_close(swap_attention(model)(X), expected)
    assert not operator_calls
    swap_attention(restore(model), target_density=0.5)
    with pytest.raises(ValueError, match=r"Twice calls .*more with twice, of which its mark says nothing"):
        model(X)


@attention_function(**NAMES | dict(causal=True))
def begin(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Few(Layer):
    def __init__(self, function, n_q):
        super().__init__()
        self.function, self.n_q = function, n_q

    def attend(self, q, k, v, mask):
        return self.function(q[:, :, : self.n_q], k, v)


@pytest.mark.parametrize("function", [attend, begin])
@pytest.mark.parametrize("n_q", [1, 4])
def test_few_queries_of_a_causal_function_see_what_they_saw(function, n_q):
    """Queries at the end of the keys, and, as SDPA has them, at their begin."""
    layer = Few(function, n_q)
    expected = layer(X)
    torch.testing.assert_close(swap_attention(layer)(X), expected)


# --- a function proves itself ---------------------------------------------------------------------------------------

WRONG = {
    "another scale": (dict(scale=0.25), lambda q, k, v: formula(q, k, v), "its results differ"),
    "causal": (dict(causal=True), lambda q, k, v: formula(q, k, v), "its results differ"),
    "not causal": (dict(), lambda q, k, v: attend(q, k, v), "its results differ"),
    "linear attention": (dict(), lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v), "its results differ"),
    "transposed": (dict(output="bnhd"), lambda q, k, v: formula(q, k, v), r"its output is \[2, 4, 5, 4\], expected"),
    "dropout": (dict(), lambda q, k, v: F.dropout(formula(q, k, v), 0.5), "its results differ"),
    "raises": (dict(), lambda q, k, v: q @ k, "could not be tried on small tensors: RuntimeError"),
    "mask": (
        dict(mask="m", mask_means="seen"), lambda q, k, v, m=None: attend(q, k, v, None if m is None else ~m),
        "its results differ",
    ),
    "more": (dict(), lambda q, k, v: (formula(q, k, v), q, k), "more than the output and the weights"),
    "no weights": (dict(), lambda q, k, v: (formula(q, k, v), q), "beside the output that is not the weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_said_wrongly_is_refused_by_name(name):
    said, function, reason = WRONG[name]
    function.__qualname__ = "wrong"

    class Wrong(Layer):
        core = staticmethod(attention_function(**NAMES | said)(function))

        def attend(self, q, k, v, mask):
            return self.core(q, k, v)

    model = make(Wrong)
    with pytest.raises(ValueError, match=rf"0 and 1 more \(Wrong\): its attention function .*wrong .*{reason}"):
        swap_attention(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_dropout_that_is_not_said_is_seen():
    class Drops(Layer):
        @attention_function(**NAMES)
        def core(self, q, k, v):
            return F.dropout(formula(q, k, v), 0.3, self.training)

    with pytest.raises(ValueError, match=r"in training mode its results differ: if it has dropout, say so by dropout="):
        swap_attention(make(Drops))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (dict(query="x"), "query is 'x', expected the name of an argument of .*: q, k, v, mask, more"),
        (dict(causal="up"), "causal is 'up', expected True, False, or a path that begins with an argument"),
        (dict(causal=None), "causal is None, expected True, False"),
        (dict(scale="1"), "scale is '1', expected a number, None, or a path"),
        (dict(dropout=None), "dropout is None, expected a number"),
        (dict(layout="hnd"), "layout is 'hnd', expected one of 'bhnd', 'bnhd', 'bnd'"),
        (dict(mask="mask"), "mask is 'mask' and mask_means is None, expected neither, or both"),
        (dict(mask="mask", mask_means="bool"), "mask_means is 'bool', expected neither, or both.*'added', 'seen'"),
        (dict(mask_is_causal=True), "mask_is_causal is True and mask is None"),
        (dict(), "more of .*function has no default, expected it to be said what it is"),
    ],
)  # fmt: skip
def test_bad_marks(said, message):
    def function(q, k, v, mask=None, *, more):
        return q

    with pytest.raises(ValueError, match=message):
        attention_function(**NAMES | said)(function)


def test_what_is_no_function():
    with pytest.raises(ValueError, match="the marked object is a Linear, expected a plain function or a method"):
        attention_function(**NAMES)(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"takes \*arguments, expected arguments with names"):
        attention_function(**NAMES)(lambda *q: q)


# --- models of transformers -----------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")
SPECIAL = dict(vocab_size=50, bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.3)
IDS = torch.arange(2 * 10).view(2, 10) % 47 + 1
ATTENDED = torch.ones_like(IDS)
ATTENDED[0, 7:] = 0
SEEN = ATTENDED.bool()


def mark_neox_japanese(monkeypatch):
    from transformers.models.gpt_neox_japanese import modeling_gpt_neox_japanese as modeling

    mark = attention_function(
        query="query", key="key", value="value", scale=None, causal=False, mask="attention_mask", mask_means="added",
        mask_is_causal=True, dropout="self.attention_dropout",
    )  # fmt: skip
    layer = modeling.GPTNeoXJapaneseAttention
    monkeypatch.setattr(layer, "_attn", mark(layer._attn))
    sizes = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, max_position_embeddings=64)
    return modeling.GPTNeoXJapaneseForCausalLM(transformers.GPTNeoXJapaneseConfig(**sizes, **SPECIAL))


def mark_openai_gpt(monkeypatch):
    from transformers.models.openai import modeling_openai as modeling

    mark = attention_function(
        query="q", key="k", value="v", key_layout="bhdn", scale=None, causal=True, mask="attention_mask",
        mask_means="added", dropout="self.attn_dropout",
    )  # fmt: skip
    monkeypatch.setattr(modeling.Attention, "_attn", mark(modeling.Attention._attn))
    return modeling.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(n_layer=2, n_head=4, n_embd=32, n_positions=64, **SPECIAL)
    )


@attention_function(
    query="q", key="k", value="v", scale="self.softmax_scale", causal=False, mask="hidden", mask_means="hidden",
    mask_is_causal=True, bias="alibi",
)  # fmt: skip
def attend_with_alibi(self, q, k, v, alibi, hidden):
    scores = q @ k.mT * self.softmax_scale + (0 if alibi is None else alibi)
    scores = scores if hidden is None else scores.masked_fill(hidden, torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


def mpt_forward(self, hidden_states, position_bias, cache=None, attention_mask=None, **kwargs):
    """What MptAttention does, with its attention in a function of its own."""
    qkv = self.Wqkv(hidden_states).unflatten(-1, (3, self.n_heads, -1))
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    past = 0 if cache is None else cache.get_seq_length()
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx)
    alibi = position_bias[:, -(past + q.shape[2]) :, -k.shape[2] :][:, -q.shape[2] :]
    out = attend_with_alibi(self, q, k, v, alibi, attention_mask)
    return self.out_proj(out.transpose(1, 2).flatten(-2)), None


def mark_mpt(monkeypatch):
    from transformers.models.mpt import modeling_mpt as modeling

    monkeypatch.setattr(modeling.MptAttention, "forward", mpt_forward)
    return modeling.MptForCausalLM(transformers.MptConfig(n_layers=2, n_heads=4, d_model=32, max_seq_len=64, **SPECIAL))


MARKED = {"neox_japanese": mark_neox_japanese, "openai_gpt": mark_openai_gpt, "mpt": mark_mpt}
BIASED = {"mpt"}  # whose layers go the old way with open gates


@pytest.mark.parametrize("name", MARKED)
def test_a_model_of_transformers(name, monkeypatch, operator_calls):
    torch.manual_seed(0)
    model = MARKED[name](monkeypatch).eval()
    inputs = dict(input_ids=IDS, attention_mask=ATTENDED)
    with torch.no_grad():
        expected = model(**inputs).logits
        generated = model.generate(IDS, max_new_tokens=5, do_sample=False)
        swap_attention(model, example=inputs)
        operator_calls.clear()
        torch.testing.assert_close(model(**inputs).logits, expected)
        assert len(operator_calls) == (0 if name in BIASED else 2)
        assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), generated)
        swap_attention(restore(model), target_density=0.5, window=100, example=inputs)
        torch.testing.assert_close(model(**inputs).logits[SEEN], expected[SEEN])
        assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), generated)
    model.train()
    model(**inputs).logits.square().mean().backward()
    assert all(p.grad is not None for p in gate_parameters(model))


def test_gated_generation_of_a_marked_model_is_cached_rightly(monkeypatch):
    torch.manual_seed(0)
    model = mark_neox_japanese(monkeypatch).eval()
    swap_attention(model, target_density=0.5, window=2, sinks=1)
    randomise_gates(model)
    with torch.no_grad():
        cached = model.generate(IDS, max_new_tokens=5, do_sample=False)
        for _ in range(5):
            whole = model(cached[:, :-1], use_cache=False).logits.argmax(-1)
        assert torch.equal(whole[:, 9:], cached[:, 10:])


def test_mark_is_found_in_the_package():
    assert torch_sluice.attention_function is attention_function
