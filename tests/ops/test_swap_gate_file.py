"""Gates have a file of their own: what is saved comes back, and what does not fit is named."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from safetensors import safe_open
from safetensors.torch import save_file
from support.gated_llama import draw, make
from transformers import LlamaForCausalLM

from torch_sluice import gate_parameters, load_gates, restore, save_gates, swap_attention
from torch_sluice.swap import gate_file


@pytest.fixture
def saved(tmp_path):
    model, path = make(), tmp_path / "gates.safetensors"
    save_gates(model, path)
    return model, path


def plain():
    return restore(make())


@torch.no_grad()
def test_a_model_that_was_saved_and_loaded_with_its_gates(saved, tmp_path):
    model, path = saved
    expected = model(draw()).logits
    weights = restore(make())
    weights.save_pretrained(tmp_path / "model")
    again = load_gates(LlamaForCausalLM.from_pretrained(tmp_path / "model").eval(), path)
    assert torch.equal(again(draw()).logits, expected)
    assert not torch.allclose(plain()(draw()).logits, expected)
    assert [p.requires_grad for p in gate_parameters(again)] == [True] * 8
    save_gates(again, tmp_path / "again")
    assert gate_file.read(tmp_path / "again")[1] == gate_file.read(path)[1]


@torch.no_grad()
def test_gates_are_put_into_those_that_a_model_has(saved):
    model, path = saved
    other = make(spread=0.1)
    assert load_gates(other, path) is other
    assert torch.equal(other(draw()).logits, model(draw()).logits)


@pytest.mark.parametrize("kind", ["multihead", "sdpa"])
@torch.no_grad()
def test_layers_of_other_kinds(kind, tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.qkv = 2, nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def build():
        torch.manual_seed(0)
        if kind == "sdpa":
            return nn.Sequential(Own()).eval()
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()

    model, x = build(), torch.randn(2, 12, 16)
    swap_attention(model, target_density=0.5, window=1, sinks=1)
    for parameter in gate_parameters(model):
        parameter.normal_(std=3)
    save_gates(model, tmp_path / "gates")
    assert torch.equal(load_gates(build(), tmp_path / "gates")(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(window=3), r"swapped with window=3, expected 2"),
        (dict(sinks=0), r"swapped with sinks=0, expected 4"),
        (dict(tau=0.25), r"swapped with tau=0\.25, expected 0\.5"),
        (dict(modules=["model.layers.0.self_attn"]), r"the model has no gate for 'model\.layers\.1\.self_attn'"),
        (dict(target_density=None), r"the model has no gate for"),
    ],
    ids=str,
)
def test_a_model_that_was_swapped_otherwise_is_refused(saved, options, message):
    model = make(**options)
    before = [parameter.clone() for parameter in gate_parameters(model)]
    with pytest.raises(ValueError, match=message):
        load_gates(model, saved[1])
    assert all(torch.equal(a, b) for a, b in zip(gate_parameters(model), before, strict=True))


def rewrite(path, change, metadata=None):
    with safe_open(path, framework="pt") as file:
        known, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, {**known, **(metadata or {})})


LAYER = "model.layers.0.self_attn"
BIAS = f"{LAYER}.query_bias"
DAMAGE = {
    "another format": (lambda path: save_file({"x": torch.zeros(1)}, path), "has the format None"),
    "another version": (lambda path: rewrite(path, lambda t: None, {"version": "9"}), "version '9', expected"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is no whole safetensors file"),
    "empty": (lambda path: path.write_bytes(b""), "is no whole safetensors file"),
    "no number": (lambda path: rewrite(path, lambda t: None, {"config": '{"tau": "x"}'}), "its config is"),
    "no JSON": (lambda path: rewrite(path, lambda t: None, {"config": "{"}), "its config is"),
    "less": (lambda path: rewrite(path, lambda t: t.pop(BIAS)), rf"the gate of '{LAYER}' has"),
    "sizes": (lambda path: rewrite(path, lambda t: t.update({BIAS: torch.zeros(3)})), r"is \[3\].*expected \[4\]"),
    "dtype": (lambda path: rewrite(path, lambda t: t.update({BIAS: t[BIAS].char()})), "in floating point"),
    "another layer": (lambda path: rewrite(path, lambda t: t.update({"other.b": t[BIAS] + 1})), "modules has 'other'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(saved, name):
    damage, message = DAMAGE[name]
    damage(saved[1])
    model = plain()
    keys = model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        load_gates(model, saved[1])
    assert model.state_dict().keys() == keys
    assert not hasattr(model, "_sluice_swap")


def test_what_has_no_gates_has_no_file(tmp_path):
    with pytest.raises(ValueError, match="model is not swapped"):
        save_gates(plain(), tmp_path / "gates")
    with pytest.raises(ValueError, match="model is swapped with open gates"):
        save_gates(make(target_density=None), tmp_path / "gates")
    with pytest.raises(
        FileNotFoundError, match=r"path is '.*none', expected a file that torch_sluice\.save_gates wrote"
    ):
        load_gates(plain(), tmp_path / "none")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="No such file or directory"):
        save_gates(make(), tmp_path / "no folder" / "gates")
