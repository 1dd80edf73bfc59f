"""What PyTorch builds on process groups, on this backend: each against the same training step in one process."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))


def batch(rank, step=0):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 16, generator=generator), torch.randn(8, 4, generator=generator)


def train(model, batches, steps=3, model_to_call=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        inputs, targets = batches(step)
        loss = nn.functional.mse_loss((model_to_call or model)(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def reference(size):
    def everyone(step):
        parts = [batch(rank, step) for rank in range(size)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    return train(make_model(), everyone)


def agree(model, size):
    for (name, found), expected in zip(model.named_parameters(), reference(size).parameters(), strict=True):
        full = found.full_tensor() if hasattr(found, "full_tensor") else found
        torch.testing.assert_close(full, expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def data_parallel(hook):
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    rank, size = dist.get_rank(), dist.get_world_size()
    model = make_model()
    # Several buckets; of powerSGD one, since what it does in callbacks of different buckets comes in any order.
    megabytes = 25 if hook == "powerSGD" else 0.002
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=megabytes, gradient_as_bucket_view=hook is None)
    if hook == "allreduce":
        wrapped.register_comm_hook(None, default_hooks.allreduce_hook)
    if hook == "powerSGD":  # which waits for a collective in the callback of another
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    train(model, partial(batch, rank), model_to_call=wrapped)
    if hook != "powerSGD":
        return agree(model, size)
    weights = [torch.empty_like(model[0].weight) for _ in range(size)]
    dist.all_gather(weights, model[0].weight.detach())
    assert all(weight.equal(weights[0]) for weight in weights)


@pytest.mark.parametrize("hook", [None, "allreduce", "powerSGD"])
def test_distributed_data_parallel(ranks, hook):
    ranks(2).run(data_parallel, hook)


def fully_sharded():
    from torch.distributed.fsdp import fully_shard

    rank, size = dist.get_rank(), dist.get_world_size()
    model = make_model()
    mesh = init_device_mesh("cpu", (size,))
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    agree(train(model, partial(batch, rank)), size)


@pytest.mark.parametrize("size", [2, 3])
def test_fully_sharded_data_parallel(ranks, size):
    ranks(size).run(fully_sharded)


def two_dimensions():
    """Tensor parallel inside, data parallel outside."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = make_model()
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=mesh["dp"])
    agree(train(model, partial(batch, mesh["dp"].get_local_rank())), 2)


def test_device_mesh_of_tensor_and_data_parallel(ranks):
    ranks(4).run(two_dimensions)


def redistribute():
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(7.0 * 5).view(7, 5)  # no multiple of the size
    for placement in (Shard(0), Shard(1), Replicate()):
        sharded = distribute_tensor(whole, mesh, [placement])
        for other in (Shard(0), Shard(1), Replicate()):
            assert sharded.redistribute(placements=[other]).full_tensor().equal(whole)
    summed = torch.distributed.tensor.DTensor.from_local(whole, mesh, [Partial()])
    assert summed.redistribute(placements=[Shard(0)]).full_tensor().equal(size * whole)
    assert (summed.redistribute(placements=[Replicate()]).to_local()).equal(size * whole)


@pytest.mark.parametrize("size", [2, 3])
def test_tensors_are_redistributed(ranks, size):
    ranks(size).run(redistribute)


def functional():
    import torch.distributed._functional_collectives as functional

    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    mine = torch.arange(4.0) + rank
    assert functional.all_reduce(mine, "sum", group).tolist() == [size * i + sum(range(size)) for i in range(4)]
    assert functional.all_gather_tensor(mine, 0, group).view(size, 4)[:, 0].tolist() == list(range(size))
    parts = functional.reduce_scatter_tensor(torch.ones(size * 3), "avg", 0, group)
    assert parts.tolist() == [1.0] * 3
    swapped = functional.all_to_all_single(torch.full((size,), float(rank)), None, None, group)
    assert swapped.tolist() == list(range(size))
    several = functional.all_reduce_coalesced([mine, mine + 1], "max", group)
    assert [t[0].item() for t in several] == [size - 1, size]
    assert functional.broadcast(mine, 1, group)[0].item() == 1

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(tensor):
        return functional.all_reduce(tensor * 2, "sum", group) + 1

    assert compiled(torch.ones(3)).tolist() == [2.0 * size + 1] * 3


def test_functional_collectives(ranks):
    ranks(2).run(functional)


def pipeline():
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    rank, size = dist.get_rank(), dist.get_world_size()
    whole = make_model()
    stage_model = copy.deepcopy(whole[:2] if rank == 0 else whole[2:])
    inputs, targets = batch(0)
    for schedule in (ScheduleGPipe, Schedule1F1B):
        stage = PipelineStage(stage_model, rank, size, torch.device("cpu"))
        runner = schedule(stage, n_microbatches=4, loss_fn=nn.functional.mse_loss)
        stage_model.zero_grad()
        runner.step(inputs) if rank == 0 else runner.step(target=targets, losses=[])
        whole.zero_grad()
        nn.functional.mse_loss(whole(inputs), targets).backward()
        expected = (whole[:2] if rank == 0 else whole[2:]).parameters()
        for found, wanted in zip(stage_model.parameters(), expected, strict=True):
            torch.testing.assert_close(found.grad, wanted.grad)


def test_pipelines(ranks):
    ranks(2).run(pipeline)


def checkpoint(folder):
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.tensor import Shard, distribute_tensor

    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(35.0).view(7, 5)
    checkpoint.save({"weight": distribute_tensor(whole, mesh, [Shard(0)])}, checkpoint_id=folder)
    state = {"weight": distribute_tensor(torch.zeros(7, 5), mesh, [Shard(1)])}
    checkpoint.load(state, checkpoint_id=folder)
    assert state["weight"].full_tensor().equal(whole)


def test_distributed_checkpoint(ranks, tmp_path):
    ranks(2).run(checkpoint, str(tmp_path))
