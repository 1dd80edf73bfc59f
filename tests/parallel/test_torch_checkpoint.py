"""State dicts and distributed checkpoints over the backend, by the checks of torch's own tests of them, against the
state of one process. Another mesh reads what one wrote. tests/parallel/test_mesh_checkpoint.py does so with a job.
"""

import copy
from pathlib import Path

import pytest
import torch
from support import rank_pool
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.common_dist_composable import CompositeParamModel
from torch.testing._internal.common_utils import TestCase
from torch.testing._internal.distributed import checkpoint_utils, common_state_dict

rank_pool.preload("torch.testing._internal.distributed.common_state_dict", "torch.testing._internal.common_utils")

CPU = torch.device("cpu")


class Checks(common_state_dict.VerifyStateDictMixin, TestCase):
    """What torch's tests of state dicts inherit."""


def spread(model, kind):
    """The model over all ranks of the world, in one of four ways."""
    size = dist.get_world_size()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp and tp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
        for unit in (model.u1, model.u2):
            parallelize_module(unit, mesh["tp"], {"l1": ColwiseParallel(), "seq.1": RowwiseParallel()})
            fully_shard(unit, mesh=mesh["dp"])
        return fully_shard(model, mesh=mesh["dp"])
    if kind == "hybrid":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicas", "shards"))
    else:
        mesh = init_device_mesh("cpu", (size,))
    for unit in (model.u1, model.u2):
        fully_shard(unit, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def make_pair(kind):
    """A model and its optimizer in one process and spread over the ranks, both after two steps. In float64: what AdamW
    makes of gradients that are almost zero depends on their rounding."""
    torch.manual_seed(6)
    whole = CompositeParamModel(CPU).double()
    sharded = spread(copy.deepcopy(whole), kind)
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-3, foreach=False) for model in (whole, sharded)]
    for _ in range(2):
        inputs = torch.randn(8, 100, dtype=torch.float64)
        for model, optimizer in zip((whole, sharded), optimizers, strict=True):
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return whole, optimizers[0], sharded, optimizers[1]


def verify_state(kind, full):
    checks = Checks()
    whole, optimizer, sharded, sharded_optimizer = make_pair(kind)
    options = states.StateDictOptions(full_state_dict=full)
    model_state, optimizer_state = states.get_state_dict(sharded, sharded_optimizer, options=options)
    checks._verify_msd(whole.state_dict(), model_state)
    checks._verify_osd(whole, optimizer, optimizer.state_dict(), optimizer_state)
    # And back, into a fresh one.
    torch.manual_seed(8)
    fresh = spread(CompositeParamModel(CPU).double(), kind)
    fresh_optimizer = torch.optim.AdamW(fresh.parameters(), 0.5, foreach=False)
    states.set_state_dict(
        fresh, fresh_optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options
    )
    model_state, optimizer_state = states.get_state_dict(fresh, fresh_optimizer)
    checks._verify_msd(whole.state_dict(), model_state)
    checks._verify_osd(whole, optimizer, optimizer.state_dict(), optimizer_state)
    for group in fresh_optimizer.param_groups:
        assert group["lr"] == 1e-3


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hybrid", "fsdp and tp"])
@pytest.mark.parametrize("full", [False, True])
def test_state_dicts_are_those_of_one_process(ranks, kind, full):
    ranks(4).run(verify_state, kind, full)


def load_from_first_rank():
    """Only rank 0 has the state; the others get theirs of it."""
    checks = Checks()
    torch.manual_seed(9)
    whole = CompositeParamModel(CPU).double()
    state = whole.state_dict() if dist.get_rank() == 0 else {}
    sharded = spread(copy.deepcopy(whole), "fsdp")
    with torch.no_grad():
        for parameter in sharded.parameters():
            parameter.zero_()
    options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    states.set_model_state_dict(sharded, state, options=options)
    checks._verify_msd(whole.state_dict(), states.get_model_state_dict(sharded))


def test_state_of_the_first_rank_is_broadcast(ranks):
    ranks(4).run(load_from_first_rank)


class Counter:
    """An object with a state of its own, as a data loader has."""

    def __init__(self, count):
        self.count = count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def save_on_one_mesh(folder, kind, how):
    whole, optimizer, sharded, sharded_optimizer = make_pair(kind)
    model_state, optimizer_state = states.get_state_dict(sharded, sharded_optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "loader": Counter(17), "words": ["a", 1]}
    if how == "asynchronous":
        checkpoint.async_save(state, checkpoint_id=folder).result()
    elif how == "transformed":
        writer = checkpoint.FileSystemWriter(folder, _extensions=[checkpoint_utils.Rot13Example()])
        checkpoint.save(state, storage_writer=writer)
    else:
        checkpoint.save(state, checkpoint_id=folder)
    dist.barrier()
    if dist.get_rank() == 0:
        torch.save([whole.state_dict(), optimizer.state_dict()], Path(folder) / "expected.pt")


def load_on_another(folder, kind):
    checks = Checks()
    model_expected, optimizer_expected = torch.load(Path(folder) / "expected.pt", weights_only=True)
    torch.manual_seed(10)
    whole = CompositeParamModel(CPU).double()
    sharded = spread(CompositeParamModel(CPU).double(), kind)
    optimizer = torch.optim.AdamW(sharded.parameters(), 0.5, foreach=False)
    model_state, optimizer_state = states.get_state_dict(sharded, optimizer)
    loader = Counter(0)
    state = {"model": model_state, "optimizer": optimizer_state, "loader": loader, "words": []}
    registry = checkpoint_utils.get_test_extension_registry()
    reader = checkpoint.FileSystemReader(folder, _extension_registry=registry)
    checkpoint.load(state, storage_reader=reader)
    states.set_state_dict(sharded, optimizer, model_state_dict=model_state, optim_state_dict=state["optimizer"])
    model_state, optimizer_state = states.get_state_dict(sharded, optimizer)
    checks._verify_msd(model_expected, model_state)
    checks._verify_osd(whole, torch.optim.AdamW(whole.parameters()), optimizer_expected, optimizer_state)
    assert loader.count == 17
    assert state["words"] == ["a", 1]


@pytest.mark.parametrize(
    ("how", "written", "size", "read"),
    [
        ("plain", "fsdp", 2, "ddp"),
        ("plain", "fsdp and tp", 4, "fsdp"),
        ("plain", "ddp", 4, "fsdp and tp"),
        ("asynchronous", "hybrid", 4, "fsdp"),
        ("transformed", "fsdp", 4, "hybrid"),
    ],
)
def test_another_mesh_reads_a_checkpoint(ranks, tmp_path, how, written, size, read):
    ranks(4).run(save_on_one_mesh, str(tmp_path), written, how)
    ranks(size).run(load_on_another, str(tmp_path), read)


def keep_renamed_keys(kind):
    """Models whose hooks rename the keys of their state."""
    torch.manual_seed(1)
    model = getattr(common_state_dict, kind)(8, 4, 4)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sharded = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    state = states.get_model_state_dict(sharded)
    Checks()._verify_msd(expected, state)
    return sorted(state)


@pytest.mark.parametrize("kind", ["FusionEmbedding", "FusionEmbeddingWithModifier"])
def test_keys_that_a_hook_renames(ranks, kind):
    first = "weight" if kind.endswith("Modifier") else "embedding.weight"
    assert ranks(2).run(keep_renamed_keys, kind)[0] == sorted([first, "fusion_embedding.weight"])
