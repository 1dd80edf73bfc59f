"""Where reductions run that go on beside a backward pass: a thread, and a process group that nobody else uses.

Collectives of a group must be called in the same order on every rank. A thread beside the backward pass, which calls
some itself (for parameters that were not used, for batch statistics), could not keep to that in the same group.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

from torch import distributed

from torch_sluice.parallel import statistics


@dataclass(frozen=True)
class Lane:
    group: distributed.ProcessGroup
    thread: ThreadPoolExecutor


_lanes: dict[distributed.ProcessGroup, Lane] = {}


def lane_of(group: distributed.ProcessGroup | None, timeout: timedelta | None) -> Lane:
    """The lane beside this group; None: the default group. The first call for a group makes it, on all its ranks, with
    this timeout."""
    group = group or distributed.group.WORLD
    lane = _lanes.get(group)
    if lane is None or not _is_alive(lane.group):
        for ended in [other for other in _lanes if not _is_alive(other)]:
            _lanes.pop(ended).thread.shutdown(wait=False)
        ranks = distributed.get_process_group_ranks(group)
        backend = distributed.get_backend_config(group)
        beside = distributed.new_group(ranks, backend=backend, timeout=timeout, use_local_synchronization=True)
        thread = ThreadPoolExecutor(1, "sluice_reduce", initializer=statistics.mark_background_thread)
        lane = _lanes[group] = Lane(beside, thread)
    return lane


def _is_alive(group: distributed.ProcessGroup) -> bool:
    return group in distributed.distributed_c10d._world.pg_map
