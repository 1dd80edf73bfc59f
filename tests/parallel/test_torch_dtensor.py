"""DTensors over the backend, by the helpers of torch's own tests of them, against the tensors of one process.

All runs on the CPU, where torch cannot give DTensors to its fused attention: attention is done on the local heads."""

import itertools
from functools import partial

import pytest
import torch
from support import rank_pool
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import functional
from torch.testing._internal.distributed._tensor import common_dtensor as helpers

rank_pool.preload("torch.testing._internal.distributed._tensor.common_dtensor")

HAS_EXPERTS = hasattr(helpers, "ExpertLayer")
without_experts = pytest.mark.skipif(not HAS_EXPERTS, reason="the helpers of this torch have no experts")


def contribute(whole, mesh, placements):
    """A DTensor of this value; in dimensions of the mesh that are Partial, ranks hold unequal parts of the sum."""
    shards = [Replicate() if placement.is_partial() else placement for placement in placements]
    local = distribute_tensor(whole, mesh, shards, src_data_rank=None).to_local().clone()
    for dimension, placement in enumerate(placements):
        if placement.is_partial():
            local *= (0.25, 0.75)[mesh.get_local_rank(dimension)]
    return DTensor.from_local(local, mesh, placements, shape=whole.shape, stride=whole.stride())


def redistribute_every_pair():
    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.arange(7.0 * 5).view(7, 5)  # no multiples of the mesh's sizes
    kinds = (Replicate(), Shard(0), Shard(1))
    for source in itertools.product((*kinds, Partial()), repeat=2):
        start = contribute(whole, mesh, source)
        for target in itertools.product(kinds, repeat=2):
            found = start.redistribute(placements=target)
            expected = distribute_tensor(whole, mesh, target, src_data_rank=None).to_local()
            assert found.to_local().equal(expected), f"{source} to {target}"


def test_redistribution_between_all_pairs_of_placements(ranks):
    ranks(4).run(redistribute_every_pair)


def reduce_partial(operator):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parts = torch.randn(mesh.size(), 6, 5, generator=torch.Generator().manual_seed(3))
    values = {"sum": parts.sum(0), "avg": parts.mean(0), "max": parts.amax(0), "min": parts.amin(0)}
    found = DTensor.from_local(parts[dist.get_rank()], mesh, [Partial(operator)])
    for target in (Replicate(), Shard(0), Shard(1)):
        whole = found.redistribute(placements=[target]).full_tensor()
        torch.testing.assert_close(whole, values[operator], msg=f"{operator} to {target}")


@pytest.mark.parametrize("operator", ["sum", "avg", "max", "min"])
def test_partial_of_each_operator(ranks, operator):
    ranks(3).run(reduce_partial, operator)


def redistribute_orders():
    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.arange(8.0 * 4).view(8, 4)
    orders = list(helpers.generate_shard_orders(mesh, whole.ndim))
    for source, target in itertools.product(orders, repeat=2):
        start = helpers.patched_distribute_tensor(whole.clone(), mesh, None, source)
        found = helpers.redistribute(start, mesh, None, target)
        assert helpers.make_full_tensor(found).equal(whole), f"{source} to {target}"
    return len(orders)


def test_redistribution_between_orders_of_sharding(ranks):
    assert ranks(4).run(redistribute_orders)[0] > 4


# By name: the operator, and what it is called with. DTensorConverter makes each tensor a DTensor in every way.
OPERATORS = {
    "add": (torch.add, (8, 4), (8, 4)),
    "add_broadcast": (torch.add, (8, 4), (4,)),
    "mul": (torch.mul, (8, 4), (8, 1)),
    "mm": (torch.mm, (8, 4), (4, 12)),
    "addmm": (torch.addmm, (12,), (8, 4), (4, 12)),
    "bmm": (torch.bmm, (4, 8, 4), (4, 4, 8)),
    "linear": (functional.linear, (8, 4), (12, 4), (12,)),
    "softmax": (partial(torch.softmax, dim=-1), (8, 4)),
    "log_softmax": (partial(torch.log_softmax, dim=0), (8, 4)),
    "layer_norm": (lambda x, w, b: functional.layer_norm(x, (4,), w, b), (8, 4), (4,), (4,)),
    "gelu": (functional.gelu, (8, 4)),
    "sum": (torch.sum, (8, 4)),
    "sum_over_columns": (partial(torch.sum, dim=1), (8, 4)),
    "mean": (partial(torch.mean, dim=0), (8, 4)),
    "amax": (partial(torch.amax, dim=0, keepdim=True), (8, 4)),
    "var": (partial(torch.var, dim=1), (8, 4)),
    "vector_norm": (torch.linalg.vector_norm, (8, 4)),
    "cumsum": (partial(torch.cumsum, dim=0), (8, 4)),
    "transpose": (partial(torch.transpose, dim0=0, dim1=1), (8, 4)),
    "view": (lambda x: x.view(4, 2, 4), (8, 4)),
    "cat": (lambda x, y: torch.cat([x, y]), (8, 4), (4, 4)),
    "slice": (lambda x: x[1:5], (8, 4)),
    "where": (lambda x, y: torch.where(x > 0, x, y), (8, 4), (8, 4)),
}


def convert_all():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, (operator, *shapes) in OPERATORS.items():
        generator = torch.Generator().manual_seed(1)
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        expected = operator(*tensors)
        ways = helpers.DTensorConverter(mesh, tensors, {})
        for arguments, _ in ways:
            assert ways.successful(), f"{name}: a tensor could not be made a DTensor"
            placements = [argument.placements for argument in arguments]
            try:
                torch.testing.assert_close(operator(*arguments).full_tensor(), expected)
            except Exception as error:
                raise AssertionError(f"{name} of tensors that are {placements}") from error


def test_operators_with_every_sharding_of_their_arguments(ranks):
    ranks(4).run(convert_all)


# Operator, shapes, how these are sharded, and how the result then is. Gradients of amax and amin are left out: torch
# counts ties of each shard alone, so they are wrong on every backend.
RULES = [
    (torch.mm, [(8, 4), (4, 8)], [Shard(0), Replicate()], [Shard(0)]),
    (torch.mm, [(8, 4), (4, 8)], [Replicate(), Shard(1)], [Shard(1)]),
    (torch.mm, [(8, 4), (4, 8)], [Shard(1), Shard(0)], [Partial()]),
    (torch.bmm, [(4, 8, 4), (4, 4, 8)], [Shard(0), Shard(0)], [Shard(0)]),
    (torch.bmm, [(4, 8, 4), (4, 4, 8)], [Shard(2), Shard(1)], [Partial()]),
    (torch.sum, [(8, 4)], [Shard(0)], [Partial()]),
    (torch.amax, [(8, 4)], [Shard(0)], [Partial("max")]),
    (torch.amin, [(8, 4)], [Shard(1)], [Partial("min")]),
    (torch.mean, [(8, 4)], [Shard(1)], [Partial("avg")]),
]


def follow_rules():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for operator, shapes, inputs, outputs in RULES:
        generator = torch.Generator().manual_seed(2)
        tensors = tuple(torch.randn(shape, generator=generator) for shape in shapes)
        rule = f"{operator.__name__} of {inputs}"
        assert helpers.validate_sharding_rule_sample(operator, tensors, {}, inputs, outputs, mesh), rule
        if operator not in (torch.amax, torch.amin) and hasattr(helpers, "validate_sharding_rule_sample_backward"):
            assert helpers.validate_sharding_rule_sample_backward(operator, tensors, {}, inputs, mesh) is True, rule
    # What these helpers say of a rule that doesn't hold:
    tensors = (torch.ones(8, 4),)
    assert not helpers.validate_sharding_rule_sample(torch.sum, tensors, {}, [Shard(0)], [Partial("max")], mesh)


def test_sharding_rules_and_their_gradients(ranks):
    ranks(4).run(follow_rules)


def train_parallel(kind):
    """Torch's Transformer in two copies, one of them in parallel, over three steps."""
    torch.manual_seed(7)
    experts = kind == "experts"
    arguments = helpers.ModelArgs(dropout_p=0.0, **(dict(num_experts=4) if experts else {}))
    whole, sharded = (helpers.Transformer(arguments).double() for _ in range(2))
    sharded.load_state_dict(whole.state_dict())
    mesh = init_device_mesh("cpu", (2, 2) if experts else (1, 4), mesh_dim_names=("ep", "tp"))
    options = dict(ep_mesh=mesh["ep"]) if experts else {}
    sequence = kind == "sequence"
    helpers.Transformer.parallelize(sharded, mesh["tp"], sequence, local_output_for_attn=True, **options)
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-2) for model in (whole, sharded)]
    for _ in range(3):
        tokens = torch.randint(arguments.vocab_size, (8, 8))
        mine = slice(None)
        if experts:  # each rank of this axis has its own tokens
            mine = slice(4 * mesh.get_local_rank("ep"), 4 * mesh.get_local_rank("ep") + 4)
        logits = [whole(tokens), sharded(tokens[mine])]
        torch.testing.assert_close(logits[1], logits[0][mine])
        for optimizer, output, targets in zip(optimizers, logits, (tokens, tokens[mine]), strict=True):
            optimizer.zero_grad()
            functional.cross_entropy(output.flatten(0, 1), targets.roll(1, 1).flatten(), reduction="sum").backward()
        shards = dict(sharded.named_parameters())
        for name, parameter in whole.named_parameters():
            if experts and "expert_layer" not in name:  # the others are copies on that axis
                grad = shards[name].grad
                dist.all_reduce(grad.to_local() if isinstance(grad, DTensor) else grad, group=mesh.get_group("ep"))
            torch.testing.assert_close(gather(shards[name].grad), parameter.grad, msg=lambda m, n=name: f"{n}: {m}")
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(gather(shards[name].detach()), parameter.detach())


def gather(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("kind", ["tensor", "sequence", pytest.param("experts", marks=without_experts)])
def test_parallel_transformer(ranks, kind):
    ranks(4).run(train_parallel, kind)


def expert_parallel():
    """Each rank has its own tokens and its own experts."""
    torch.manual_seed(5)
    rank, size = dist.get_rank(), dist.get_world_size()
    whole, sharded = (helpers.ExpertLayer(4, 8, 16).double() for _ in range(2))
    sharded.load_state_dict(whole.state_dict())
    mesh = init_device_mesh("cpu", (size,))
    nn.Module.register_module(sharded, "experts", helpers.ExpertParallel()._apply(sharded.experts, mesh))
    tokens = torch.randn(size, 3, 8, dtype=torch.float64)
    everything = whole(tokens)
    mine = sharded(tokens[rank : rank + 1])
    torch.testing.assert_close(mine, everything[rank : rank + 1])
    everything.square().sum().backward()
    mine.square().sum().backward()
    for found, expected in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found.grad.full_tensor(), expected.grad)


@without_experts
@pytest.mark.parametrize("size", [2, 4])
def test_expert_parallel_layer(ranks, size):
    ranks(size).run(expert_parallel)
