"""Predicted against published step times, and what the planner's numbers are worth on a model they never saw.

Without --data: the published runs in benchmarks/data/, those that no number was fitted to, and published peak memory.
Nothing runs and nothing is timed. ``--json`` writes a list of rows: source, model, gpus, predicted_s, published_s,
predicted_bytes, and precision, layout, left_out_s (predicted without the model's own runs) and what was assumed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from benchmarks import harness, plan_fit, plan_rows
from torch_sluice.plan import load_cluster, predict

_PARTS = ("compute", "recompute", "tp", "cp", "pp", "bubble", "spread", "dp", "optimizer")
_PEERS = {
    "Korthikanti": "goal: mean 3 %, worst 7 %; Calculon on its table 5: mean 3.65 %, worst 8.87 %",
    "all BF16": "goal: mean 4 %, worst 10 %; SimuMax, which measures operators, on B200: mean 5.62 %, worst 13.5 %",
    "left one model out": "goal: mean 5 %",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns 0, or 2 for a file that is no table of runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, metavar="FILE", help="runs to predict, with either set of columns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--fit", action="store_true", help="fit the numbers anew and print them as in the TOML files")
    options = parser.parse_args(arguments)
    try:
        return _print_fit() if options.fit else _compare(options)
    except (plan_rows.RowError, OSError) as error:
        print(f"benchmarks.plan: error: {error}", file=sys.stderr)
        return 2


def load_rows(paths: list[Path]) -> list[plan_rows.Row]:
    """The rows of these files, with what they leave open chosen by the planner."""
    rows = []
    for path in paths:
        for number, row in enumerate(plan_rows.read_rows(path), 1):
            cluster = load_cluster(row.device)
            try:
                row = plan_rows.close_choices(row, cluster)
                predict(row.shape, cluster, row.layout)
            except ValueError as error:
                raise plan_rows.RowError(f"{path}, row {number}: {error}") from None
            rows.append(row)
    return rows


def fit_all(rows: list[plan_rows.Row]) -> dict:
    """Device to cluster with fitted numbers, of the 16-bit rows."""
    devices = sorted({row.device for row in rows})
    chosen = {name: [row for row in rows if row.device == name and row.layout.precision == "bf16"] for name in devices}
    return {name: plan_fit.fit(load_cluster(name), name, chosen[name]) for name in devices}


def _print_fit() -> int:
    for device, cluster in fit_all(load_rows(plan_rows.GIVEN)).items():
        print(f"# {device}.toml\n[fitted]")
        for name in plan_fit.PRIORS:
            value = getattr(cluster, name)
            print(f'{name} = "{value * 1e6:.4g} us"' if name == "kernel_overhead" else f"{name} = {value:.4g}")
        print()
    return 0


def _compare(options) -> int:
    given = load_rows(plan_rows.GIVEN)
    rows = load_rows([options.data]) if options.data else given
    clusters = {row.device: load_cluster(row.device) for row in [*rows, *given]}
    fitted_on = [row for row in given if row.layout.precision == "bf16"]
    wide = [row for row in rows if row.layout.precision == "bf16"]
    narrow = [row for row in rows if row.layout.precision != "bf16"]
    _print_numbers(clusters, fitted_on)
    _print_software()
    answers = []
    if wide:
        left_out = _leave_out(clusters, wide, fitted_on)
        answers += _print_rows("16-bit runs", clusters, wide, left_out)
        _print_errors("Korthikanti", clusters, [row for row in wide if row.source == "B"])
        _print_errors("all BF16", clusters, wide)
        for device in sorted({row.device for row in wide}):
            _print_errors(device, clusters, [row for row in wide if row.device == device])
        _print_error("left one model out", left_out, wide)
    if narrow:
        answers += _print_rows("FP8 runs: nothing was fitted to them, and there is no goal", clusters, narrow, None)
        _print_errors("FP8", clusters, narrow)
    if not options.data:
        held_out = load_rows(plan_rows.HELD_OUT)
        _print_rows("Runs that no number was fitted to", clusters, held_out, None)
        _print_errors("held out", clusters, held_out)
        for device in sorted({row.device for row in held_out}):
            _print_errors(f"held out, {device}", clusters, [row for row in held_out if row.device == device])
        _print_memory()
    if options.json:
        harness.write_json(options.json, answers)
    return 0


def _leave_out(clusters, rows, fitted_on):
    known = set(plan_fit.PRIORS["gemm_efficiency"])
    fitted = plan_fit.leave_one_model_out(clusters, [row for row in rows if row.device in known], fitted_on)
    values = iter(fitted)
    return np.array([next(values) if row.device in known else np.nan for row in rows])


def _print_numbers(clusters, fitted_on):
    print("Numbers that were fitted over rows, none for a row (python -m benchmarks.plan --fit):")
    for device, cluster in sorted(clusters.items()):
        numbers = ", ".join(f"{name} {getattr(cluster, name):.3g}" for name in plan_fit.PRIORS)
        count = sum(row.device == device for row in fitted_on)
        print(f"  {device}, {count} rows: {numbers}")


def _print_software() -> None:
    print("Assumed of the software of a row's source, where it isn't the Layout's default:")
    for name, options in plan_rows.SOFTWARE.items():
        print(f"  {name}: {', '.join(f'{option} {value}' for option, value in options.items())}")


def describe_layout(layout) -> str:
    sizes = {"tp": layout.tp, "pp": layout.pp, "cp": layout.cp, "vpp": layout.vpp, "dp": layout.dp}
    cut = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)
    return f"{cut or 'one'} mb{layout.micro_batch} {layout.recompute}".replace(" none", "")


def _print_rows(title, clusters, rows, left_out):
    print(f"\n{title}")
    print(f"{'model':32} {'GPUs':>5} {'layout':32} {'published':>9} {'predicted':>9} {'error':>7} {'left out':>8} "
          f"{'GiB':>6}  share of the step in %; assumed")  # fmt: skip
    answers = []
    for i, row in enumerate(rows):
        estimate = predict(row.shape, clusters[row.device], row.layout)
        error = 100 * (estimate.step_s / row.published_s - 1)
        other = np.nan if left_out is None else left_out[i]
        unseen = "" if np.isnan(other) else f"{100 * (other / row.published_s - 1):+.1f}%"
        parts = {name: 100 * getattr(estimate, f"{name}_s") / estimate.step_s for name in _PARTS}
        shares = " ".join(f"{name} {share:.1f}" for name, share in parts.items() if share >= 0.05)
        assumed = "; " + ", ".join(f"{name} {value}" for name, value in row.assumed.items()) if row.assumed else ""
        print(f"{row.model[:32]:32} {row.layout.gpus:5} {describe_layout(row.layout):32} {row.published_s:8.3f}s "
              f"{estimate.step_s:8.3f}s {error:+6.1f}% {unseen:>8} {estimate.total_bytes / 2**30:6.1f}  "
              f"{shares}{assumed}")  # fmt: skip
        answers.append({
            "source": row.source, "model": row.model, "gpus": row.layout.gpus, "predicted_s": estimate.step_s,
            "published_s": row.published_s, "predicted_bytes": estimate.total_bytes,
            "precision": row.layout.precision, "layout": describe_layout(row.layout),
            "left_out_s": None if np.isnan(other) else float(other), "assumed": row.assumed,
        })  # fmt: skip
    return answers


def _print_errors(name, clusters, rows):
    if rows:
        _print_error(name, plan_fit.predictions(clusters, rows), rows)


def _print_error(name, predicted, rows):
    errors = 100 * np.abs(predicted / np.array([row.published_s for row in rows]) - 1)
    errors = errors[~np.isnan(errors)]
    if len(errors):
        peer = f" ({_PEERS[name]})" if name in _PEERS else ""
        print(f"{name}: {len(errors)} rows, mean {errors.mean():.2f} %, worst {errors.max():.2f} %{peer}")


def _print_memory():
    print("\nPeak memory of the fullest rank, without the margin for fragmentation (allocated, not reserved)")
    errors = []
    for model, row, published in plan_rows.read_memory():
        estimate = predict(row.shape, load_cluster(row.device), row.layout)
        predicted = estimate.total_bytes - estimate.margin_bytes
        errors.append(100 * abs(predicted / published - 1))
        print(f"{model:32} sequence {row.shape.sequence:6} {describe_layout(row.layout):20} published "
              f"{published / 2**30:6.1f} GiB predicted {predicted / 2**30:6.1f} GiB "
              f"{100 * (predicted / published - 1):+5.1f}%")  # fmt: skip
    print(f"memory: {len(errors)} rows, mean {np.mean(errors):.2f} %, worst {np.max(errors):.2f} %")


if __name__ == "__main__":
    sys.exit(main())
