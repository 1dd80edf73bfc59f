"""The tables of ``benchmarks.compress_models``: one in Markdown for the README, one with every peer, and the goals."""

from benchmarks.harness import console, print_rows

HEADINGS = (
    "model", "metric", "before", "after", "kept", "ms", "p95", "eager", "compile", "FBGEMM", "ONNX Runtime int8", "MB",
)  # fmt: skip
_PEERS = ("eager", "compile", "fbgemm", "onnxruntime")


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def markdown(rows: list[dict]) -> str:
    """One line for each model; latencies are medians at batch 1."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    for row in rows:
        cells = [
            row["model"],
            row["metric"],
            f"{row['metric_before']:.3f}",
            f"{row['metric_after']:.3f}",
            _share(row["kept"]),
            _milliseconds(row["latency_ms"]),
            _milliseconds(row["p95_ms"]),
            *(_milliseconds(row["peers"].get(name)) for name in _PEERS),
            f"{row['bytes'] / 1e6:.3g} of {row['bytes_before'] / 1e6:.3g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe_goals(row: dict, goals: dict[str, float]) -> list[str]:
    """A sentence for each goal: met or missed, and by what."""

    def say(met: bool | None, text: str) -> str:
        return f"{'no figure' if met is None else 'met' if met else 'MISSED'}: {text}"

    eager, onnxruntime = row["peers"]["eager"], row["peers"].get("onnxruntime")
    saved = 1 - row["latency_ms"] / eager
    cpu = 1 - row["cpu_seconds"] / row["details"]["eager"]["cpu_seconds"]
    sentences = [
        say(row["goals"]["latency"], f"latency {-saved:+.0%} against float32 eager, goal {goals['latency'] - 1:+.0%}"),
        say(row["goals"]["kept"], f"{_share(row['kept'])} of the metric kept, goal {goals['kept']:.0%}"),
        say(row["goals"]["bytes"], f"{row['bytes'] / row['bytes_before']:.0%} of the bytes, goal {goals['bytes']:.0%}"),
    ]
    if onnxruntime is None:
        sentences.append(say(None, "ONNX Runtime int8 did not run"))
    else:
        sentences.append(say(row["goals"]["onnxruntime"], f"{onnxruntime / row['latency_ms']:.2f}x ONNX Runtime int8"))
    if row["joules"] is not None:
        joules = 1 - row["joules"] / row["details"]["eager"]["joules"]
        sentences.append(f"energy of a call {-joules:+.0%} (RAPL, packages)")
    sentences.append(f"processor seconds of a call {-cpu:+.0%}")
    return sentences


def print_details(row: dict) -> None:
    entries = row["variants"]
    running = [entry for entry in entries if "problem" not in entry]
    print_rows(
        f"{row['title']}; ms of a call",
        running,
        {
            "": lambda entry: entry["name"],
            "how": lambda entry: entry["how"],
            row["metric"]: lambda entry: f"{entry['metric']:.4f}",
            "cosine": lambda entry: f"{entry['cosine']:.4f}",
            "batch 1": lambda entry: _milliseconds(entry["latency_ms"]),
            "p95": lambda entry: _milliseconds(entry["p95_ms"]),
            "batch 8": lambda entry: _milliseconds(entry["batch8_ms"]),
            "p95 of 8": lambda entry: _milliseconds(entry["batch8_p95_ms"]),
            "CPU ms": lambda entry: _milliseconds(entry["cpu_seconds"] * 1e3),
            "J": lambda entry: "-" if entry["joules"] is None else f"{entry['joules']:.3g}",
            "MB": lambda entry: f"{entry['bytes'] / 1e6:.3g}",
        },
    )
    for entry in entries:
        if "problem" in entry:
            console.print(f"  {entry['name']} did not run: {entry['problem']}", highlight=False, markup=False)


def print_report(rows: list[dict], goals: dict[str, float]) -> None:
    for row in rows:
        print_details(row)
        for sentence in describe_goals(row, goals):
            console.print(f"  {sentence}", highlight=False, markup=False)
    console.print()
    console.print(markdown(rows), highlight=False, markup=False, soft_wrap=True)
    for row in rows:
        for note in row["notes"]:
            console.print(f"  {note}", highlight=False, markup=False)
