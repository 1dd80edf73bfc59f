"""Pipelines over the backend, of the models of torch's own tests, against one process: the schedules, the split by
tracing and the inference that tests/parallel/test_mesh.py and test_training.py leave out."""

import copy

import pytest
import torch
from support import rank_pool
from torch import distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, SplitPoint, pipeline
from torch.distributed.pipelining import schedules as torch_schedules
from torch.testing._internal.distributed._tensor.common_dtensor import MLPStacked, ModelArgs, Transformer

rank_pool.preload("torch.distributed.pipelining", "torch.testing._internal.distributed._tensor.common_dtensor")

CPU = torch.device("cpu")
ROWS, MICRO_BATCHES = 16, 8


def loss_of(outputs, targets):
    return nn.functional.mse_loss(outputs, targets)


def make_batch(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(ROWS, 10, generator=generator), torch.randn(ROWS, 10, generator=generator)


def make_stages(whole, indices, count):
    """These stages of a copy of the model, which has one layer for each."""
    return [PipelineStage(nn.Sequential(copy.deepcopy(whole.layers[index])), index, count, CPU) for index in indices]


def run_schedule(name):
    """Three steps of SGD; each rank compares its stages' weights with one process's."""
    rank, size = dist.get_rank(), dist.get_world_size()
    schedule_class = torch_schedules.get_schedule_class(name)
    several = issubclass(schedule_class, torch_schedules.PipelineScheduleMulti)
    count = 2 * size if several else size
    if name in ("ZBVZeroBubble", "DualPipeV"):  # the first rank has the first stage and the last
        indices = [rank, count - 1 - rank]
    else:
        indices = list(range(rank, count, size))
    whole = MLPStacked("cpu", count)
    for number, layer in enumerate(whole.layers):  # which all start from the same seed
        nn.init.normal_(layer.net1.weight, std=0.5, generator=torch.Generator().manual_seed(number))
    stages = make_stages(whole, indices, count)
    schedule = schedule_class(stages if several else stages[0], MICRO_BATCHES, loss_fn=loss_of)
    parameters = [parameter for stage in stages for parameter in stage.submod.parameters()]
    optimizers = [torch.optim.SGD(p, 0.2) for p in (whole.parameters(), parameters)]
    for number in range(3):
        inputs, targets = make_batch(number)
        expected = loss_of(whole(inputs), targets)
        expected.backward()
        losses = []
        last = count - 1 in indices
        options = dict(target=targets, losses=losses) if last else {}
        outputs = schedule.step(*([inputs] if 0 in indices else []), **options)
        if last:
            torch.testing.assert_close(torch.stack(losses).mean(), expected)
            torch.testing.assert_close(outputs, whole(inputs))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    wanted = [parameter for index in indices for parameter in whole.layers[index].parameters()]
    for found, expected in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble"])
def test_schedule(ranks, name, size):
    ranks(size).run(run_schedule, name)


@pytest.mark.parametrize("name", ["ZBVZeroBubble", "DualPipeV"])
def test_schedule_in_the_shape_of_a_v(ranks, name):
    ranks(4).run(run_schedule, name)


def split_by_tracing():
    """Torch traces the model and cuts its graph before each layer but the first."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(2)
    whole = Transformer(ModelArgs(n_layers=4, dropout_p=0.0, weight_tying=False))
    tokens = torch.randint(8, (8, 16))
    split = {f"layers.{layer}": SplitPoint.BEGINNING for layer in range(1, size)}
    cut = pipeline(copy.deepcopy(whole), (tokens[:2],), split_spec=split)
    assert cut.num_stages == size
    stage = cut.build_stage(rank, CPU)
    schedule = torch_schedules.ScheduleGPipe(stage, 4, loss_fn=loss_of)
    targets = torch.randn(8, 16, 8)
    expected = loss_of(whole(tokens), targets)
    expected.backward()
    losses = []
    if rank == size - 1:
        schedule.step(*([tokens] if rank == 0 else []), target=targets, losses=losses)
        torch.testing.assert_close(torch.stack(losses).mean(), expected)
    else:
        schedule.step(*([tokens] if rank == 0 else []))
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    mine = {name: parameter.grad for name, parameter in stage.submod.named_parameters()}
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, gradients[name], msg=lambda text, name=name: f"{name}: {text}")
    return sorted(mine)


def test_model_that_torch_splits(ranks):
    names = ranks(4).run(split_by_tracing)
    whole = Transformer(ModelArgs(n_layers=4, weight_tying=False))
    assert sorted(name for part in names for name in part) == sorted(name for name, _ in whole.named_parameters())


def infer():
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = MLPStacked("cpu", size)
    stage = make_stages(whole, [rank], size)[0]
    schedule = torch_schedules.ScheduleGPipe(stage, 4, loss_fn=loss_of)
    for number in range(2):
        inputs, targets = make_batch(number)
        losses = []
        options = dict(target=targets, losses=losses) if rank == size - 1 else {}
        outputs = schedule.eval(*([inputs] if rank == 0 else []), **options)
        if rank == size - 1:
            torch.testing.assert_close(outputs, whole(inputs))
            torch.testing.assert_close(torch.stack(losses).mean(), loss_of(whole(inputs), targets))
        assert all(parameter.grad is None for parameter in stage.submod.parameters())


def test_evaluation(ranks):
    ranks(3).run(infer)


def exchange_through_a_subgroup():
    """Two pipelines of two ranks side by side, each in a group of its own."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pipe = dist.get_rank() // 2
    whole = MLPStacked("cpu", 2)
    index = dist.get_rank() % 2
    stage = PipelineStage(copy.deepcopy(whole.layers[index]), index, 2, CPU, group=groups[pipe])
    schedule = torch_schedules.Schedule1F1B(stage, 4, loss_fn=loss_of)
    inputs, targets = make_batch(pipe)
    schedule.step(inputs) if index == 0 else schedule.step(target=targets)
    loss_of(whole(inputs), targets).backward()
    for found, expected in zip(stage.submod.parameters(), whole.layers[index].parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    dist.barrier()
    for group in groups:
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


def test_pipelines_side_by_side(ranks):
    ranks(4).run(exchange_through_a_subgroup)
