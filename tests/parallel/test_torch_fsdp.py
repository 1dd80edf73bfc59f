"""FSDP2 and FSDP1 over the backend, by the models and checks of torch's own tests of them, against one process and DDP.

Beyond tests/parallel/test_training.py: 2D and hybrid meshes, kinds of resharding, accumulation, what each step sends.
"""

import copy

import pytest
import torch
from support import rank_pool
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal import common_fsdp as helpers
from torch.testing._internal.common_utils import TestCase
from torch.testing._internal.distributed._tensor.common_dtensor import ModelArgs, Transformer

rank_pool.preload("torch.testing._internal.common_fsdp", "torch.testing._internal.distributed._tensor.common_dtensor")

ROWS = 4  # of each data-parallel rank


def split_rows(inputs, mesh, dimensions):
    """The rows of this rank, where these dimensions of the mesh are data parallel."""
    index = 0
    for dimension in dimensions:
        index = index * mesh.size(dimension) + mesh.get_local_rank(dimension)
    return inputs[index * ROWS : (index + 1) * ROWS]


def expect_gradients(whole, sharded, tolerance):
    shards = dict(sharded.named_parameters())
    for name, parameter in whole.named_parameters():
        found = shards[name].grad.full_tensor()
        torch.testing.assert_close(found, parameter.grad, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def shard_columns(parameter):
    return Shard(1) if parameter.ndim > 1 and parameter.shape[1] % 4 == 0 else Shard(0)


# By name: the mesh, and what fully_shard is given.
WAYS = {
    "reshard": ((4,), {}),
    "keep": ((4,), dict(reshard_after_forward=False)),
    "reshard to pairs": ((4,), dict(reshard_after_forward=2)),
    "hybrid": ((2, 2), {}),
    "columns": ((4,), dict(shard_placement_fn=shard_columns)),
    "reduce in bfloat16": ((4,), dict(mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16))),
}


def train_fully_sharded(way):
    """A Transformer with tied weights and activation checkpoints; what it holds is compared after each backward."""
    shape, options = WAYS[way]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    torch.manual_seed(3)
    whole = Transformer(ModelArgs(dropout_p=0.0))
    sharded = Transformer(ModelArgs(dropout_p=0.0, checkpoint_activations=True))
    sharded.load_state_dict(whole.state_dict())
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(sharded, mesh=mesh, **options)
    assert isinstance(sharded, FSDPModule)
    sharded.layers[0].set_modules_to_forward_prefetch([sharded.layers[1]])
    sharded.layers[1].set_modules_to_backward_prefetch([sharded.layers[0]])
    rough = dict(rtol=0.02, atol=2e-3) if "mp_policy" in options else dict(rtol=1e-4, atol=1e-6)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (whole, sharded)]
    for _ in range(3):
        tokens = torch.randint(8, (4 * ROWS, 16))
        for model, rows in ((whole, tokens), (sharded, split_rows(tokens, mesh, range(len(shape))))):
            loss = nn.functional.cross_entropy(model(rows).flatten(0, 1), rows.roll(1, 1).flatten())
            loss.backward()
        expect_gradients(whole, sharded, rough)
        norms = [nn.utils.clip_grad_norm_(model.parameters(), 0.5) for model in (whole, sharded)]
        torch.testing.assert_close(norms[1].full_tensor(), norms[0], **rough)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for found, expected in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found.full_tensor(), expected.detach(), **rough)


@pytest.mark.parametrize("way", WAYS)
def test_fully_sharded_transformer(ranks, way):
    ranks(4).run(train_fully_sharded, way)


def train_two_dimensions(with_checkpoints):
    """MLPs of uneven widths, tensor parallel inside and fully sharded outside."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(1)
    whole = helpers.MLPStack(5)
    sharded = copy.deepcopy(whole).parallelize(mesh["tp"], mesh["dp"], with_checkpoints)
    optimizers = [torch.optim.Adam(model.parameters(), 0.01, foreach=False) for model in (whole, sharded)]
    for _ in range(3):
        inputs = torch.randn(2 * ROWS, 4, whole[0].in_proj.in_features)
        whole(inputs).square().mean().backward()
        outputs = sharded(split_rows(inputs, mesh["dp"], [0]))
        outputs = outputs.full_tensor() if isinstance(outputs, DTensor) else outputs
        outputs.square().mean().backward()
        expect_gradients(whole, sharded, dict(rtol=1e-4, atol=1e-6))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("with_checkpoints", [False, True])
def test_tensor_parallel_inside(ranks, with_checkpoints):
    ranks(4).run(train_two_dimensions, with_checkpoints)


def count_collectives():
    """How often a step of two groups of parameters gathers and reduces, and what it leaves."""
    counts = dict(gathers=0, reductions=0)

    def counted(name, collective):
        def call(*arguments, **options):
            counts[name] += 1
            return collective(*arguments, **options)

        return call

    torch.manual_seed(2)
    whole = nn.Sequential(helpers.MLP(6), helpers.MLP(6, dim_multiplier=3))
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    # The names that FSDP2 calls, which the releases of torch don't agree on.
    names = ("all_gather_single", "reduce_scatter_single")
    if not hasattr(dist, names[0]):
        names = ("all_gather_into_tensor", "reduce_scatter_tensor")
    gather, reduce = (getattr(dist, name) for name in names)
    with (
        helpers.patch_all_gather(counted("gathers", gather)),
        helpers.patch_reduce_scatter(counted("reductions", reduce)),
    ):
        for number in range(3):
            inputs = torch.randn(mesh.size() * ROWS, 6)
            whole(inputs).square().mean().backward()
            sharded.set_requires_gradient_sync(number == 2)
            sharded(split_rows(inputs, mesh, [0])).square().mean().backward()
            assert counts["reductions"] == (2 if number == 2 else 0)
    # Torch's own check: parameters and gradients are the shards of the whole ones.
    helpers.check_sharded_parity(TestCase(), whole, sharded)
    return counts


@pytest.mark.parametrize("size", [2, 3])
def test_accumulation_reduces_once(ranks, size):
    # Each of the three micro-batches gathers both groups for the forward pass and again for the backward pass.
    assert ranks(size).run(count_collectives)[0] == dict(gathers=12, reductions=2)


def have_several_outputs(use_second):
    torch.manual_seed(4)
    whole = nn.Sequential(helpers.DoubleLinear(6, use_second), nn.Identity())
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(sharded[0], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    inputs = torch.randn(mesh.size() * ROWS, 6)
    for model, rows in ((whole, inputs), (sharded, split_rows(inputs, mesh, [0]))):
        outputs = model(rows)
        sum(output.square().mean() for output in (outputs if use_second else (outputs,))).backward()
    helpers.check_sharded_parity(TestCase(), whole, sharded)


@pytest.mark.parametrize("use_second", [True, False])
def test_several_outputs_and_unused_parameters(ranks, use_second):
    ranks(2).run(have_several_outputs, use_second)


def agree_with_ddp(model, strategy, options):
    """Torch's comparison of FSDP1 with DDP, without the processes that its tests start."""

    class Parity(getattr(helpers, "FSDPTestMixin", helpers.FSDPTest), TestCase):
        process_group = property(lambda self: dist.group.WORLD)

    Parity()._test_fsdp_parity(
        getattr(helpers, model),
        helpers.FSDPInitMode.RECURSIVE,
        helpers.DEVICEInitMode.DEVICE_BEFORE,
        num_iters=3,
        sharding_strategy=getattr(ShardingStrategy, strategy),
        device_id=torch.device("cpu"),
        **options,
    )


@pytest.mark.parametrize(
    ("model", "strategy", "options"),
    [
        ("NestedWrappedModule", "FULL_SHARD", {}),
        ("AlwaysWrapNestedWrappedModule", "SHARD_GRAD_OP", dict(use_orig_params=True)),
        ("NonUniformReqGradNWM", "FULL_SHARD", dict(use_orig_params=True)),
        ("TransformerWithSharedParams", "FULL_SHARD", dict(init_kwargs=dict(add_bn=False))),
        ("TransformerWithSharedParams", "NO_SHARD", dict(init_kwargs=dict(add_bn=False))),
    ],
)
def test_fsdp1_agrees_with_ddp(ranks, model, strategy, options):
    ranks(2).run(agree_with_ddp, model, strategy, options)
