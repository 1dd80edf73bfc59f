"""Random collectives on random groups, each against the same on Gloo.

    python tests/parallel/soak.py                                # 100,000 on eight ranks; `make soak`
    python tests/parallel/soak.py --seed 12 --only-round 345     # what went wrong before, again

Every rank draws the same plan from the seed. A round makes a few groups that overlap, with a group of Gloo's beside
each, and runs its operations in a random mix: kinds, dtypes, operators, sizes, strides, asynchronous or not, under
inference mode or not.
"""

import argparse
import contextlib
import dataclasses
import itertools
import random
import secrets
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

OPERATIONS_OF_A_ROUND = 250
_GROUPS_OF_A_ROUND = 5
_all_gather_tensor = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the new name and the old one
_FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
_INTEGERS = [torch.int8, torch.uint8, torch.int32, torch.int64]
_DTYPES = [*_FLOATS, *_INTEGERS, torch.bool, torch.complex64]
_OPERATORS = {
    "SUM": _DTYPES,
    "AVG": [*_FLOATS, torch.int32, torch.int64],
    "PREMUL_SUM": _FLOATS,
    "PRODUCT": [*_FLOATS, *_INTEGERS, torch.bool],
    "MIN": [*_FLOATS, *_INTEGERS, torch.bool],
    "MAX": [*_FLOATS, *_INTEGERS, torch.bool],
    "BAND": _INTEGERS,
    "BOR": _INTEGERS,
    "BXOR": _INTEGERS,
}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of the plan, the same on every rank. ``counts``: elements by rank of the group, or all the same."""

    kind: str
    group: int
    dtype: torch.dtype
    operator: str
    counts: tuple
    root: int
    peer: int
    strided: bool
    asynchronous: bool
    inference: bool
    salt: int


def _draw_count(draw):
    return draw.choice([0, 1, draw.randrange(64), draw.randrange(64), draw.randrange(3000), draw.randrange(3000),
                        draw.randrange(40_000), draw.choice([0, 1]) * draw.randrange(400_000)])  # fmt: skip


def draw_operation(draw, members):
    """A random operation on one of the groups, whose global ranks are ``members``."""
    group = draw.randrange(len(members))
    size = len(members[group])
    operator = draw.choice(list(_OPERATORS))
    count = _draw_count(draw)
    counts = (count,) * size if draw.random() < 0.6 else tuple(draw.randrange(count + 1) for _ in range(size))
    root = draw.randrange(size)
    return Operation(
        kind=draw.choice(list(KINDS)), group=group, dtype=draw.choice(_OPERATORS[operator]), operator=operator,
        counts=counts, root=root, peer=(root + draw.randrange(1, size)) % size, strided=draw.random() < 0.3,
        asynchronous=draw.random() < 0.5, inference=draw.random() < 0.2, salt=draw.randrange(1 << 30),
    )  # fmt: skip


class Team:
    """A group on the backend and one on Gloo, as seen by the rank ``me`` of it."""

    def __init__(self, ranks):
        self.ranks, self.size = ranks, len(ranks)
        self.group = dist.new_group(ranks, backend="sluice")
        self.shadow = dist.new_group(ranks, backend="gloo")
        self.me = ranks.index(dist.get_rank()) if dist.get_rank() in ranks else None

    def close(self):
        if self.me is not None:
            dist.destroy_process_group(self.group)
            dist.destroy_process_group(self.shadow)


def _data(operation, rank, other, count):
    """What a rank has for another one: small whole numbers, of which sums are exact in every dtype, in any order."""
    generator = torch.Generator().manual_seed(operation.salt + 64 * rank + other)
    if operation.operator == "PRODUCT":
        return (2 - 4 * torch.randint(2, (count,), generator=generator)).to(operation.dtype)
    return torch.randint(-8, 9, (count,), generator=generator).to(operation.dtype)


def _mode(operation):
    return torch.inference_mode() if operation.inference else contextlib.nullcontext()


def _laid_out(operation, tensor):
    """A copy, every second element of a larger tensor if the operation is on strided ones."""
    with _mode(operation):
        strided = operation.strided and tensor.numel()
        return torch.stack([tensor, tensor], 1).flatten()[::2] if strided else tensor.clone()


def _nothing(operation, count):
    return _laid_out(operation, torch.ones(count).to(operation.dtype))


def _call(operation, collective, *arguments):
    with _mode(operation):
        return collective(*arguments)


def _operator(operation):
    return (
        dist._make_nccl_premul_sum(0.5) if operation.operator == "PREMUL_SUM" else getattr(ReduceOp, operation.operator)
    )


# What Gloo makes of it. It sees bytes where data are only moved; it has no AVG, no PREMUL_SUM and no bool.


def _shadow_reduced(operation, team, tensor):
    if not tensor.numel():
        return tensor
    tensor, dtype, operator = tensor.clone(), tensor.dtype, operation.operator
    if operator == "PREMUL_SUM":
        tensor *= 0.5
    if dtype == torch.bool:
        tensor = tensor.to(torch.uint8)
        operator = {"SUM": "MAX", "PRODUCT": "MIN"}.get(operator, operator)
    dist.all_reduce(tensor, getattr(ReduceOp, {"AVG": "SUM", "PREMUL_SUM": "SUM"}.get(operator, operator)), team.shadow)
    if operator == "AVG" and dtype.is_floating_point:
        tensor = (tensor.to(torch.promote_types(dtype, torch.float32)) / team.size).to(dtype)
    elif operator == "AVG":
        tensor = torch.div(tensor, team.size, rounding_mode="trunc")
    return tensor.to(dtype)


def _shadow_broadcast(team, tensor, root):
    if tensor.numel():
        dist.broadcast(tensor.view(torch.uint8), team.ranks[root], team.shadow)
    return tensor


def _shadow_all_gather(operation, team, mine):
    return [
        _shadow_broadcast(team, mine.clone() if rank == team.me else torch.zeros(count, dtype=mine.dtype), rank)
        for rank, count in enumerate(operation.counts)
    ]


# Each kind: begins the operation, and returns the Work or None, what it writes, and what should be there.


def _all_reduce(operation, team):
    data = _data(operation, team.me, 0, operation.counts[0])
    tensor = _laid_out(operation, data)
    work = _call(operation, dist.all_reduce, tensor, _operator(operation), team.group, operation.asynchronous)
    return work, [tensor], [_shadow_reduced(operation, team, data)]


def _reduce(operation, team):
    data = _data(operation, team.me, 0, operation.counts[0])
    tensor = _laid_out(operation, data)
    root = team.ranks[operation.root]
    work = _call(operation, dist.reduce, tensor, root, _operator(operation), team.group, operation.asynchronous)
    reduced = _shadow_reduced(operation, team, data)
    return work, [tensor], [reduced if team.me == operation.root else data]


def _reduce_scatter(operation, team):
    parts = [_data(operation, team.me, rank, count) for rank, count in enumerate(operation.counts)]
    output = _nothing(operation, operation.counts[team.me])
    inputs = [_laid_out(operation, part) for part in parts]
    work = _call(
        operation, dist.reduce_scatter, output, inputs, _operator(operation), team.group, operation.asynchronous
    )
    reduced = _shadow_reduced(operation, team, torch.cat(parts)).split(operation.counts)
    return work, [output], [reduced[team.me]]


def _broadcast(operation, team):
    data = _data(operation, team.me, 0, operation.counts[0])
    tensor = _laid_out(operation, data)
    work = _call(operation, dist.broadcast, tensor, team.ranks[operation.root], team.group, operation.asynchronous)
    return work, [tensor], [_shadow_broadcast(team, data, operation.root)]


def _all_gather(operation, team):
    data = _data(operation, team.me, 0, operation.counts[team.me])
    outputs = [_nothing(operation, count) for count in operation.counts]
    work = _call(operation, dist.all_gather, outputs, _laid_out(operation, data), team.group, operation.asynchronous)
    return work, outputs, _shadow_all_gather(operation, team, data)


def _all_gather_into_tensor(operation, team):
    data = _data(operation, team.me, 0, operation.counts[0])
    output = _nothing(operation, operation.counts[0] * team.size)
    gathered = _laid_out(operation, data)
    work = _call(operation, _all_gather_tensor, output, gathered, team.group, operation.asynchronous)
    operation = dataclasses.replace(operation, counts=operation.counts[:1] * team.size)
    return work, [output], [torch.cat(_shadow_all_gather(operation, team, data))]


def _gather(operation, team):
    data = _data(operation, team.me, 0, operation.counts[0])
    root, takes = team.ranks[operation.root], team.me == operation.root
    outputs = [_nothing(operation, len(data)) for _ in team.ranks] if takes else None
    work = _call(operation, dist.gather, _laid_out(operation, data), outputs, root, team.group, operation.asynchronous)
    expected = [torch.zeros_like(data) for _ in team.ranks] if takes else None
    if len(data):
        views = [tensor.view(torch.uint8) for tensor in expected] if takes else None
        dist.gather(data.view(torch.uint8), views, root, team.shadow)
    return work, outputs or [], expected or []


def _scatter(operation, team):
    count = operation.counts[0]
    root, gives = team.ranks[operation.root], team.me == operation.root
    parts = [_data(operation, team.me, rank, count) for rank in range(team.size)] if gives else None
    output, expected = _nothing(operation, count), torch.zeros(count, dtype=operation.dtype)
    inputs = [_laid_out(operation, part) for part in parts] if gives else None
    work = _call(operation, dist.scatter, output, inputs, root, team.group, operation.asynchronous)
    if count:
        views = [part.view(torch.uint8) for part in parts] if gives else None
        dist.scatter(expected.view(torch.uint8), views, root, team.shadow)
    return work, [output], [expected]


def _all_to_all_single(operation, team):
    size, counts = team.size, operation.counts
    given = [counts[(team.me + 2 * rank) % size] for rank in range(size)]
    taken = [counts[(rank + 2 * team.me) % size] for rank in range(size)]
    data = torch.cat([_data(operation, team.me, rank, count) for rank, count in enumerate(given)])
    output, expected = _nothing(operation, sum(taken)), torch.zeros(sum(taken), dtype=operation.dtype)
    inputs = _laid_out(operation, data)
    work = _call(operation, dist.all_to_all_single, output, inputs, taken, given, team.group, operation.asynchronous)
    if max(counts):
        width = data.element_size()
        views = [tensor.view(torch.uint8) for tensor in (expected, data)]
        dist.all_to_all_single(*views, [n * width for n in taken], [n * width for n in given], team.shadow)
    return work, [output], [expected]


def _send(operation, team):
    data = _data(operation, operation.root, operation.peer, operation.counts[0])
    tag, sender, receiver = operation.salt % 3, team.ranks[operation.root], team.ranks[operation.peer]
    if team.me == operation.root:
        work = _call(operation, dist.isend, _laid_out(operation, data), receiver, team.group, tag)
        if len(data):
            dist.send(data.view(torch.uint8), receiver, team.shadow)
        return work, [], []
    if team.me != operation.peer:
        return None, [], []
    output, expected = _nothing(operation, len(data)), torch.zeros_like(data)
    work = _call(operation, dist.irecv, output, sender, team.group, tag)
    if len(data):
        dist.recv(expected.view(torch.uint8), sender, team.shadow)
    return work, [output], [expected]


def _barrier(operation, team):
    work = _call(operation, dist.barrier, team.group, operation.asynchronous)
    dist.barrier(team.shadow)
    return work, [], []


KINDS = {
    "all_reduce": _all_reduce,
    "reduce": _reduce,
    "reduce_scatter": _reduce_scatter,
    "broadcast": _broadcast,
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather_into_tensor,
    "gather": _gather,
    "scatter": _scatter,
    "all_to_all_single": _all_to_all_single,
    "send": _send,
    "barrier": _barrier,
}


def finish(pending):
    """Waits for what was begun, and raises where it isn't what Gloo made of it."""
    where, work, found, expected = pending
    if work is not None:
        work.wait()
    for tensor, wanted in zip(found, expected, strict=True):
        bits = [t.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (tensor, wanted)]
        if not torch.equal(*bits):
            raise AssertionError(f"{where}: {tensor} isn't Gloo's {wanted}")


def run_round(seed, number, operations):
    """On every rank: one round of the plan of this seed. Raises where a result isn't Gloo's."""
    draw, world = random.Random(f"{seed}/{number}"), dist.get_world_size()
    members = [sorted(draw.sample(range(world), draw.randint(2, world))) for _ in range(_GROUPS_OF_A_ROUND)]
    teams, pending = [Team(ranks) for ranks in members], []
    for index in range(operations):
        operation = draw_operation(draw, members)
        most, place = draw.randrange(4), draw.random()  # drawn by all ranks alike, whatever each has pending
        team = teams[operation.group]
        if team.me is None:
            continue
        where = f"seed {seed}, round {number}, operation {index} on ranks {team.ranks}: {operation}"
        try:
            pending.append((where, *KINDS[operation.kind](operation, team)))
        except Exception as error:
            raise RuntimeError(where) from error
        while len(pending) > most:
            finish(pending.pop(int(place * len(pending))))
    for item in pending:
        finish(item)
    for team in teams:
        team.close()


def main():
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
    from support.rank_pool import Ranks

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--ranks", type=int, default=8, help="of the job; its groups have 2 ranks and more")
    parser.add_argument("--seed", type=int, help="of the plan; drawn, and printed, if it isn't given")
    parser.add_argument("--only-round", type=int, metavar="N", help=f"of {OPERATIONS_OF_A_ROUND} operations each")
    options = parser.parse_args()
    if options.ranks < 2 or options.operations < 1:
        parser.error(f"--ranks is {options.ranks} and --operations {options.operations}, expected 2 and 1 at least")
    seed = secrets.randbelow(1 << 30) if options.seed is None else options.seed
    print(f"seed {seed}, {options.operations} operations on {options.ranks} ranks", flush=True)
    rounds = itertools.count() if options.only_round is None else [options.only_round]
    pool, done, start = Ranks(options.ranks), 0, time.monotonic()
    try:
        with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn()) as progress:
            bar = progress.add_task("operations", total=options.operations)
            for number in rounds:
                count = min(OPERATIONS_OF_A_ROUND, options.operations - done)
                pool.run(run_round, seed, number, count, seconds=600)
                done += count
                progress.update(bar, completed=done)
                if not progress.console.is_terminal and done % 10_000 == 0:
                    print(f"{done} operations, {time.monotonic() - start:.0f} s", flush=True)
                if done == options.operations:
                    break
    finally:
        pool.close()
    print(f"{done} operations agree with Gloo, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
