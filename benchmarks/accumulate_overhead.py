"""Times training steps under accumulate() where it has nothing to gain: float32, a step after each micro-batch.

The model is that of ``torch-sluice train --preset demo``, once with dense and once with gated attention, and a step has
one micro-batch, gradients clipped by their norm, and AdamW. Steps with a session and without take turns on twins of the
same model. ``overhead`` is the median over rounds of with / without within a round, minus 1; the middle half of the
rounds stands beside it, as ``middle_half``.
"""

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

import torch_sluice
from benchmarks import harness

CASES = ("dense", "gated")
SESSIONS = {"every=1": dict(every=1, policy="fp32"), "the loop steps": dict(policy="fp32"), "auto": dict()}


def make_step(case: str, session: dict | None, context: contextlib.ExitStack) -> Callable[[], object]:
    """A step of the main job's model with or without a session, which ends with ``context``."""
    from torch_sluice.swap import swap_attention
    from torch_sluice.train.settings import PRESETS
    from torch_sluice.train.side import Side

    settings = replace(PRESETS["demo"], threads=torch.get_num_threads())
    torch.manual_seed(0)
    side = Side(settings)
    if case == "gated":
        swap_attention(
            side.model, target_density=settings.target_density, window=settings.local_window, sinks=settings.sinks
        )
        side.optimizer = torch.optim.AdamW(side.model.parameters(), settings.learning_rate)
    if session is not None:
        context.enter_context(torch_sluice.accumulate(side.model, side.optimizer, **session))
    batch = torch.randint(0, 256, (settings.micro_size, settings.context + 1))
    return lambda: side.run_micro_batches([batch])


def measure(case: str, name: str, repeats: int, machine: dict) -> dict:
    """The row of a case: rounds of one step each way, in turn."""
    seconds = {"with": [], "without": []}
    with contextlib.ExitStack() as context:
        steps = {"with": make_step(case, SESSIONS[name], context), "without": make_step(case, None, context)}
        for step in steps.values():
            step()
        for turn in range(repeats):
            for which in ("with", "without") if turn % 2 else ("without", "with"):
                start = time.perf_counter()
                steps[which]()
                seconds[which].append(time.perf_counter() - start)
    ratios = [x / y - 1 for x, y in zip(seconds["with"], seconds["without"], strict=True)]
    quartiles = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {
        "operation": "training step under accumulate() with nothing to gain",
        "case": case,
        "session": name,
        "dtype": "float32",
        "seconds": statistics.median(seconds["with"]),
        "peers": {"without": statistics.median(seconds["without"])},
        "ratio": 1 / (1 + statistics.median(ratios)),
        "overhead": statistics.median(ratios),
        "middle_half": [quartiles[0], quartiles[2]],
        "rounds": repeats,
        **machine,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = harness.make_parser(__doc__.splitlines()[0], repeats=41)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--session", nargs="+", choices=SESSIONS, default=list(SESSIONS))
    options = parser.parse_args(arguments)
    machine = harness.describe_machine(options.threads)
    harness.print_machine(machine)
    work = [(case, name) for case in options.case for name in options.session]
    rows = [
        measure(case, name, 2 if options.quick else options.repeats, machine)
        for case, name in harness.track(work, lambda one: f"{one[0]}, {one[1]}")
    ]
    harness.print_rows(
        "a step of one micro-batch under accumulate(), against one without",
        rows,
        {
            "case": lambda row: row["case"],
            "session": lambda row: row["session"],
            "without": lambda row: harness.format_seconds(row["peers"]["without"]),
            "overhead": lambda row: f"{row['overhead']:+.2%}",
            "middle half of the rounds": lambda row: " to ".join(f"{x:+.2%}" for x in row["middle_half"]),
        },
    )
    harness.write_json(options.json, rows)


if __name__ == "__main__":
    main()
