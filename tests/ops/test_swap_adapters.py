"""LoRA by peft over a gated model: gates are frozen and it is said, or they learn with the adapter and are kept."""

import warnings

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft", reason="pip install peft")

import peft
from support.gated_llama import draw, make

from torch_sluice import gate_parameters, load_gates, restore, save_gates
from torch_sluice.attention import DensityController, Gate, parameter_groups
from torch_sluice.swap import gate_file


def adapt(modules_to_save=None):
    model = make(window=1, sinks=1)
    for gate in (module for module in model.modules() if isinstance(module, Gate)):
        gate.reset_parameters()
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=modules_to_save)
    )


def train(model, steps=30):
    """The density behind it."""
    model.train()
    controller = DensityController(model, steps=steps, gain=1.0, ramp=0.25)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, gate_lr=5e-2))
    for step in range(steps):
        ids = draw(2, 20, seed=step)
        controller.loss(model(input_ids=ids, labels=ids).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    controller.close()
    model.eval()
    return controller.density


def test_gates_that_peft_has_frozen_are_said():
    model = adapt()
    with pytest.warns(UserWarning, match="no gate learns: none of their parameters requires a gradient any more.*peft"):
        assert train(model, steps=3) == 1
    for parameter in gate_parameters(model):
        parameter.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert train(model) < 0.8


@torch.no_grad()
def test_gates_that_an_adapter_keeps_come_back_with_it(tmp_path):
    model = adapt(modules_to_save=["sluice_gate"])
    with torch.enable_grad():
        assert train(model) < 0.8
    ids = draw()
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(make(window=1, sinks=1), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(ids).logits, expected)

    save_gates(model, tmp_path / "gates")
    layers, _ = gate_file.read(tmp_path / "gates")
    assert list(layers) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for parameter in gate_parameters(again):
        parameter.zero_()
    assert not torch.allclose(again(ids).logits, expected)
    torch.testing.assert_close(load_gates(again, tmp_path / "gates")(ids).logits, expected)

    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
    plain = restore(again)
    assert not any(isinstance(module, Gate) for module in plain.modules())
    assert not torch.allclose(plain(ids).logits, expected)
