"""Events a second of the pipeline simulator, on one core: ``python -m benchmarks.simulate``.

A call simulates a step with uneven stages, a straggler, links and reductions that share them. Its time is all that a
user waits for: arrays, workspace and results included, without a list of the events. Rows have no peer, and
``events_per_s`` in place of a ratio: events are pieces of work, messages and reductions.
"""

from benchmarks import harness
from torch_sluice.plan.simulation import SCHEDULES, Link, simulate

SIZES = ((8, 64), (16, 1024), (64, 4096))  # ranks, micro-batches


def arguments_for(schedule: str, ranks: int, micro_batches: int) -> dict:
    """A step whose times are all different, so that nothing is simpler than in a real one."""
    stages = ranks * (2 if schedule in ("interleaved", "zbv") else 1)
    uneven = [1 + 0.1 * (number * 7 % 5) for number in range(stages)]
    return {
        "schedule": schedule,
        "ranks": ranks,
        "micro_batches": micro_batches,
        "forward_s": [0.010 * factor for factor in uneven],
        "backward_input_s": [0.011 * factor for factor in uneven],
        "backward_weight_s": [0.009 * factor for factor in uneven],
        "slowdowns": [1.3 if rank == ranks // 2 else 1 for rank in range(ranks)],
        "forward_bytes": 2e7,
        "backward_bytes": 2e7,
        "reduce_bytes": 1e9,
        "next_links": Link(5e-6, 25e9),
        "shared_port": True,
        "activation_bytes": 1e8,
    }


def measure(schedule, ranks, micro_batches, options, machine) -> dict:
    arguments = arguments_for(schedule, ranks, micro_batches)
    timings = harness.time_interleaved({"sluice": lambda: simulate(**arguments)}, options.repeats)
    result, seconds = simulate(**arguments), timings.seconds("sluice")
    return {
        "operation": "simulate", "schedule": schedule, "ranks": ranks, "micro_batches": micro_batches,
        "events": result.event_count, "seconds": seconds, "events_per_s": result.event_count / seconds, **machine,
    }  # fmt: skip


def main(arguments=None) -> list[dict]:
    options = harness.make_parser(__doc__.splitlines()[0]).parse_args(arguments)
    machine = harness.describe_machine(1)
    harness.print_machine(machine)
    cases = [(schedule, *size) for size in SIZES for schedule in SCHEDULES]
    if options.quick:
        cases, options.repeats = cases[: len(SCHEDULES)], min(options.repeats, 3)
    rows = [measure(*case, options, machine) for case in harness.track(cases, lambda case: case[0])]
    columns = {
        "schedule": lambda row: row["schedule"],
        "ranks": lambda row: str(row["ranks"]),
        "micro-batches": lambda row: str(row["micro_batches"]),
        "events": lambda row: f"{row['events']:,}",
        "a step": lambda row: harness.format_seconds(row["seconds"]),
        "events a second": lambda row: f"{row['events_per_s'] / 1e6:.3g} million",
    }
    harness.print_rows("Simulated steps of a pipeline, one thread", rows, columns)
    harness.write_json(options.json, rows)
    return rows


if __name__ == "__main__":
    main()
