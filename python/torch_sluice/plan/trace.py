"""Writes a simulated step as a Chrome trace, which https://ui.perfetto.dev and chrome://tracing show.

The format is Google's "Trace Event Format": a process for each rank; its work is a track of complete events, and
messages and reductions, which may overlap, are asynchronous ones. Times are microseconds.
"""

import json
from pathlib import Path

from torch_sluice.plan import simulation as simulated
from torch_sluice.plan.simulation import KINDS, Simulation


def write_chrome_trace(simulation: Simulation, path: str | Path) -> None:
    """Writes the events of a simulation to a file of JSON.

    Args:
        simulation: of ``simulate(..., events=True)``.
        path: of the file, which is replaced if it exists.

    Raises:
        ValueError: if the simulation has no events.
        OSError: if the file can't be written.
    """
    if not len(simulation.events):
        raise ValueError("simulation has 0 events, expected those of simulate(..., events=True)")
    lines = [json.dumps(event) for event in _events(simulation)]
    text = '{"displayTimeUnit": "ms", "traceEvents": [\n' + ",\n".join(lines) + "\n]}\n"
    Path(path).write_text(text)


def _events(simulation):
    for rank in range(len(simulation.ranks)):
        for kind, name, value in (("process_name", "name", f"rank {rank}"), ("process_sort_index", "sort_index", rank)):
            yield {"name": kind, "ph": "M", "pid": rank, "tid": 0, "args": {name: value}}
        yield {"name": "thread_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": "work"}}
    for number, (kind, rank, stage, micro_batch, begin, end) in enumerate(simulation.events.tolist()):
        name = KINDS[kind] if kind == simulated.REDUCE else f"{KINDS[kind]} {micro_batch}"
        event = {"name": name, "cat": KINDS[kind], "pid": rank, "tid": 0, "ts": begin * 1e6}
        arguments = {"stage": stage} if kind == simulated.REDUCE else {"stage": stage, "micro-batch": micro_batch}
        if kind <= simulated.BACKWARD_WEIGHT:
            yield event | {"ph": "X", "dur": (end - begin) * 1e6, "args": arguments}
        else:
            yield event | {"ph": "b", "id": number, "args": arguments}
            yield event | {"ph": "e", "id": number, "ts": end * 1e6}
