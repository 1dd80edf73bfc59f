"""A trillion parameters on a thousand GPUs and more, on paper: parallel efficiency and speed by the planner's model.

Efficiency is the share of a step in which the slowest stage runs operators that run once: what is lost to
recomputation, traffic, the bubble, the slowest rank and the optimizer is the rest. "Traditional" is the layout and the
software of Narayanan et al. (SC'21) at that size: tp 8, pp 64, two chunks, full recomputation. The layouts of 2021 and
2022 are taken whether or not they fit; the planned ones do. Nothing runs and nothing is timed. ``--json`` writes a list
of rows: cluster, gpus, case, layout, step_s, efficiency, mfu, ratio (traditional / this step).
"""

import argparse
import sys
from pathlib import Path

from benchmarks import harness, plan_rows
from benchmarks.plan import describe_layout
from torch_sluice.plan import Layout, ModelShape, load_cluster, plan, predict

MODEL = ModelShape(128, 25600, 160, 160, 160, 102400, 51200, 2048, gated=False, tied=True, dropout=True)
_SLUICE = {"gradient_bytes": 2.0, "reduce_bytes": 1.0}  # scaled float16 sums, int8 all-reduce
_KEPT = 0.25  # of the visible pairs: what a gate is trained to


def cases(name: str, gpus: int) -> list[dict]:
    """The rows of one cluster and number of GPUs, with one sequence a GPU in a step, as SC'21 had."""
    cluster, rows = load_cluster(name), []
    first, second = (
        plan_rows.SOFTWARE[f"source {source}"] for source in ("A (Megatron-LM, SC'21)", "B (Megatron-LM, 2022)")
    )
    cut = {"dp": gpus // 512, "tp": 8, "pp": 64, "vpp": 2, "schedule": "interleaved"}
    traditional = Layout(gpus, gpus, recompute="full", **(first | cut))
    selective = Layout(gpus, gpus, recompute="selective", **(second | cut | {"sequence_parallel": True}))
    planned = plan(MODEL, cluster, gpus=gpus, global_batch=gpus)
    ours = plan(MODEL, cluster, gpus=gpus, global_batch=gpus, layout=_SLUICE, kept_share=_KEPT)
    candidates = {
        "traditional": (traditional, predict(MODEL, cluster, traditional)),
        "Korthikanti et al.'s software": (selective, predict(MODEL, cluster, selective)),
        "planned": (planned.layout, planned.estimate),
        "planned, with Sluice's parts": (ours.layout, ours.estimate),
    }
    slowest = candidates["traditional"][1].step_s
    for case, (layout, estimate) in candidates.items():
        rows.append(
            {
                "cluster": name,
                "gpus": gpus,
                "case": case,
                "layout": describe_layout(layout),
                "step_s": estimate.step_s,
                "efficiency": estimate.compute_s / estimate.step_s,
                "mfu": estimate.mfu,
                "ratio": slowest / estimate.step_s,
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    options = parser.parse_args(arguments)
    rows = [row for name in ("a100-80g", "h100-80g") for gpus in (1024, 4096, 16384) for row in cases(name, gpus)]
    print(
        f"{'cluster':10} {'GPUs':>6} {'case':30} {'layout':36} {'step':>9} {'efficiency':>10} {'MFU':>6} {'speed':>6}"
    )
    for row in rows:
        print(
            f"{row['cluster']:10} {row['gpus']:6} {row['case']:30} {row['layout']:36} {row['step_s']:8.2f}s "
            f"{100 * row['efficiency']:9.1f}% {100 * row['mfu']:5.1f}% {row['ratio']:5.2f}x"
        )
    harness.write_json(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
