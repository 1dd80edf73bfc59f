"""Loops, policies, optimizers and what spreads a model over ranks: with a session each gives what it gives without.

Not all combinations, but each pair of a loop, a wrapper, an optimizer and a policy.
"""

import contextlib

import pytest
import torch.distributed as dist
from support.accumulate_loops import LOOPS, OPTIMIZERS, Side, check, pairs
from support.accumulate_training import batches, net
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

POLICIES = ["fp32", "fp16", "auto"]
DDP = {
    "ddp": {},
    "ddp, no_sync": {},
    "ddp, static graph": {"static_graph": True},
    "ddp, views": {"gradient_as_bucket_view": True},
    "ddp, views, no_sync": {"gradient_as_bucket_view": True},
    "ddp, find unused": {"find_unused_parameters": True},
}
WRAPPERS = [*DDP, "fsdp", "fsdp, no sync", "tensor parallel"]


def make_side(wrapper, optimizer, policy):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh, quiet, call, seed = init_device_mesh("cpu", (2,)), contextlib.nullcontext, net(), dist.get_rank()
    model = call
    made = OPTIMIZERS[optimizer]  # before DDP looks: Muon freezes vectors
    if optimizer == "muon":
        made(model.parameters())
    if wrapper in DDP:
        call = DistributedDataParallel(model, **DDP[wrapper])
        quiet = call.no_sync if "no_sync" in wrapper else quiet
    elif wrapper == "tensor parallel":
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        seed = 0
    else:
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        if "no sync" in wrapper:

            @contextlib.contextmanager
            def quiet():
                model.set_requires_gradient_sync(False)
                yield
                model.set_requires_gradient_sync(True)

    return Side(model, call, made(model.parameters()), policy, batches(8, seed=seed), quiet=quiet)


def run(loop, wrapper, optimizer, policy):
    check(loop, policy, [make_side(wrapper, optimizer, one) for one in (policy, None)])


def possible(loop, wrapper, optimizer, policy):
    """LBFGS looks at parameters as one vector, and needs a closure; small errors change its line search's steps."""
    return optimizer != "lbfgs" or (loop == "closure" and policy == "fp32" and wrapper in DDP)


@pytest.mark.parametrize(
    ("loop", "wrapper", "optimizer", "policy"), pairs(LOOPS, WRAPPERS, OPTIMIZERS, POLICIES, allowed=possible)
)
def test_training_with_a_session_is_training_without(ranks, loop, wrapper, optimizer, policy):
    ranks(2).run(run, loop, wrapper, optimizer, policy)
