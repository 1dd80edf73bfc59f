"""A bfloat16 model with float32 gates under FSDP2 and FSDP1: gradients are the mean over the ranks of one process's."""

import functools
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import torch_sluice
from torch_sluice.attention import DensityController, Gate, parameter_groups, shard_gates

PAGE = Path(__file__).parents[2] / "docs/gate.md"
TOKENS, DIM = 48, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = torch_sluice.GatedAttention(
            DIM, heads=2, causal=True, window=4, target_density=0.5, dtype=torch.bfloat16
        )
        self.norm = nn.LayerNorm(DIM, dtype=torch.bfloat16)

    def forward(self, x):
        return self.norm(x + self.attention(x))


def make_model(kind):
    torch.manual_seed(0)
    if kind == "GatedAttention":
        model = nn.Sequential(Block(), Block())
    else:
        layers = (nn.TransformerEncoderLayer(DIM, 2, 32, dropout=0.0, batch_first=True) for _ in range(2))
        model = torch_sluice.swap_attention(nn.Sequential(*layers).to(torch.bfloat16), target_density=0.5, window=4)
    for gate in gates_of(model):
        nn.init.normal_(gate.query_weight)
        nn.init.normal_(gate.key_weight)
    return model


def gates_of(model):
    return [module for module in model.modules() if isinstance(module, Gate)]


def inputs_of(rank):
    return torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(rank)).to(torch.bfloat16)


def mean_gradients(kind, size):
    """Of all ranks' batches, by a model that is whole."""
    sums = {}
    for rank in range(size):
        model = make_model(kind)
        model(inputs_of(rank)).float().square().mean().backward()
        for name, parameter in model.named_parameters():
            sums[name] = sums.get(name, 0) + parameter.grad.double() / size
    return sums


def compare(gradients, expected):
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        is_gate = "gate" in name
        assert gradient.dtype == (torch.float32 if is_gate else torch.bfloat16), name
        assert gradient.any() or not expected[name].any(), name
        rough = dict(rtol=1e-4, atol=1e-7) if is_gate else dict(rtol=0.02, atol=1e-4)
        torch.testing.assert_close(gradient.double(), expected[name], **rough, msg=lambda text, name=name: name + text)


def shard(model, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp2(kind):
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):  # what torch says without shard_gates
        shard(make_model(kind), mesh)(inputs_of(rank))
    model = shard_gates(make_model(kind), mesh=mesh)
    assert shard_gates(model, mesh=mesh) is model
    shard(model, mesh)
    for parameter in torch_sluice.gate_parameters(model):
        assert parameter.to_local().shape[0] * size == parameter.shape[0]
    model(inputs_of(rank)).float().square().mean().backward()
    compare({name: p.grad.full_tensor() for name, p in model.named_parameters()}, mean_gradients(kind, size))


@pytest.mark.parametrize("kind", ["GatedAttention", "nn.TransformerEncoderLayer"])
def test_fully_shard(ranks, kind):
    ranks(2).run(fsdp2, kind)


def fsdp1(kind, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    rank, size = dist.get_rank(), dist.get_world_size()
    wrap = functools.partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    whole = make_model(kind)
    layer = type(whole[0])
    with pytest.raises(ValueError, match="Must flatten tensors with uniform dtype"):
        wrap(whole, auto_wrap_policy=ModuleWrapPolicy({layer}))
    model = wrap(make_model(kind), auto_wrap_policy=ModuleWrapPolicy({layer, Gate}))
    model(inputs_of(rank)).float().square().mean().backward()
    assert {p.dtype for p in torch_sluice.gate_parameters(model)} == {torch.float32}
    if use_orig_params:
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            gradients = {name.replace("_fsdp_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
            compare(gradients, mean_gradients(kind, size))


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("kind", ["GatedAttention", "nn.TransformerEncoderLayer"])
def test_fsdp1(ranks, kind, use_orig_params):
    ranks(2).run(fsdp1, kind, use_orig_params)


def mixed_precision():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = shard_gates(make_model("GatedAttention").float(), mesh=mesh)
    shard(model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    seen = []
    for gate in gates_of(model):
        gate.register_forward_hook(lambda module, inputs, outputs: seen.append(module.query_weight.dtype))
    model(inputs_of(dist.get_rank()).float()).float().mean().backward()
    assert seen == [torch.float32] * 2


def test_a_mixed_precision_policy_leaves_gates_in_float32(ranks):
    ranks(2).run(mixed_precision)


def train_a_few_steps():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = shard(shard_gates(make_model("GatedAttention"), mesh=mesh), mesh)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
    controller = DensityController(model, steps=3)
    before = [gate.query_weight.full_tensor().clone() for gate in gates_of(model)]
    with torch_sluice.accumulate(model, optimizer) as session:
        for number in range(6):
            controller.loss(model(inputs_of(dist.get_rank())).float().square().mean()).backward()
            if number % 2:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                controller.step()
    controller.close()
    assert session.steps == 3
    for gate, old in zip(gates_of(model), before, strict=True):
        new = gate.query_weight.full_tensor()
        assert new.isfinite().all()
        assert not new.equal(old)


def test_controller_clipping_and_accumulate_take_such_a_model(ranks):
    ranks(2).run(train_a_few_steps)


def refuse():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = shard(make_model("GatedAttention").float(), mesh)
    with pytest.raises(ValueError, match="model is sharded already, expected its gate 0.attention.gate"):
        shard_gates(model, mesh=mesh)
    with pytest.raises(ValueError, match="mp_policy is None, expected none"):
        shard_gates(model, mesh=mesh, mp_policy=None)
    plain = nn.Linear(2, 2)
    assert shard_gates(plain, mesh=mesh) is plain
    gate = shard_gates(Gate(4, 2, learn=False), mesh=mesh)
    assert gate(torch.ones(1, 3, 4))[0].shape == (1, 2, 3)


def test_what_cannot_be_sharded_is_named(ranks):
    ranks(2).run(refuse)


def run_the_example():
    pytest.importorskip("transformers")
    (example,) = re.findall(r"test_gate_sharded.py runs it -->\n```python\n(.*?)```", PAGE.read_text(), re.S)
    names = {}
    exec(example, names)
    assert {p.dtype for p in torch_sluice.gate_parameters(names["model"])} == {torch.float32}
    return names["loss"].item()


def test_the_example_of_the_page_runs(ranks):
    for loss in ranks(2).run(run_the_example):
        assert 0 < loss < 20
