"""Accumulation under DistributedDataParallel: two processes give what one gives on all the data."""

from pathlib import Path

import pytest
import torch
from support.ranks import run_ranks
from torch import distributed

import torch_sluice

N, RANKS = 3, 2

WORKER = """
import contextlib, sys, torch, torch_sluice
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

distributed.init_process_group("gloo")
rank, N = distributed.get_rank(), 3
out = sys.argv[1]


def train(model, optimizer, wrapped, data, policy="fp32", each=True, no_sync=False, tokens=False, clip=None):
    with torch_sluice.accumulate(model, optimizer, N if each else None, policy=policy) as session:
        for i, batch in enumerate(data):
            last = (i + 1) % N == 0
            if tokens:
                session.count(len(batch))
            with wrapped.no_sync() if no_sync and not last else contextlib.nullcontext():
                loss = wrapped(batch).square().mean()
                (loss if each else loss / N).backward()
            if each or last:
                if clip:
                    nn.utils.clip_grad_norm_(wrapped.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()], session


def make(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 20))
    wrapped = DistributedDataParallel(model, **options)
    return wrapped, torch.optim.AdamW(model.parameters(), 1e-2), wrapped


def batches(rows):
    generator = torch.Generator().manual_seed(7 + rank)
    return [torch.randn(rows[i % len(rows)], 20, generator=generator) for i in range(4 * N)]


results = {}
for views in (False, True):
    for name, options in {
        "each": dict(),
        "each clipped": dict(clip=1e-2),
        "last": dict(each=False),
        "last no_sync": dict(each=False, no_sync=True, clip=1e-2),
        "half": dict(policy="fp16"),
        "half last": dict(policy="fp16", each=False),
        "tokens": dict(tokens=True),
    }.items():
        rows = [1 + rank, 5, 2] if name == "tokens" else [4]
        wrapped, optimizer, _ = made = make(gradient_as_bucket_view=views)
        calls = []
        wrapped.register_comm_hook(calls, lambda state, bucket: (
            state.append(1), distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(
                lambda future: future.value()[0] / 2))[1])
        values, session = train(*made, batches(rows), **options)
        results[name, views] = dict(values=values, reductions=len(calls), steps=session.steps)
        assert wrapped.require_backward_grad_sync
torch.save(results, f"{out}/{rank}.pt")
distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(WORKER, RANKS, str(folder))
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(RANKS)]


def expected(rows_of, clip=None):
    """One process, all ranks' data, the ordinary loop."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 20))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    generators = [torch.Generator().manual_seed(7 + rank) for rank in range(RANKS)]
    for window in range(4):
        losses, tokens = [], []
        for i in range(N):
            for rank, generator in enumerate(generators):
                rows = rows_of(rank)[(window * N + i) % len(rows_of(rank))]
                batch = torch.randn(rows, 20, generator=generator)
                losses.append(model(batch).square().mean() * (rows if len(rows_of(rank)) > 1 else 1))
                tokens.append(rows if len(rows_of(rank)) > 1 else 1)
        (sum(losses) / sum(tokens)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("name", ["each", "each clipped", "last", "last no_sync", "half", "half last", "tokens"])
def test_two_ranks_give_what_one_gives(results, name, views):
    first, second = (one[name, views] for one in results)
    assert all(torch.equal(x, y) for x, y in zip(first["values"], second["values"], strict=True))
    rows_of = (lambda rank: [1 + rank, 5, 2]) if name == "tokens" else (lambda rank: [4])
    clip = 1e-2 if name in ("each clipped", "last no_sync") else None
    tolerance = 3e-4 if name.startswith("half") else 1e-6
    torch.testing.assert_close(first["values"], expected(rows_of, clip), rtol=1e-4, atol=tolerance)
    assert first["steps"] == 4
    # One bucket: one reduction a window. A loop that steps once a window decides itself when to reduce: in every
    # micro-batch, unless it says no_sync().
    assert first["reductions"] == {"last": 4 * N, "half last": 4 * N}.get(name, 4)


@pytest.fixture
def one_rank():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_low_memory_is_refused_since_it_would_hide_gradients(one_rank):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="low_memory=True hides gradients from DistributedDataParallel"):
        torch_sluice.accumulate(model, optimizer, every=2, low_memory=True)


def test_what_sharded_parameters_can_not_have_is_refused(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    model = distribute_module(torch.nn.Sequential(torch.nn.Linear(4, 4)), init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"low_memory=True and parameter 0\.weight is a DTensor, expected plain"):
        torch_sluice.accumulate(model, optimizer, every=2, low_memory=True)
    with torch_sluice.accumulate(model, optimizer, every=2) as session:
        with pytest.raises(RuntimeError, match="count.. was called and parameters are DTensors"):
            session.count(3)
