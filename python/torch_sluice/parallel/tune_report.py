"""What ``torch-sluice tune-comm`` shows: progress, what was chosen and what it gains, and where it is kept."""

from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from torch_sluice.parallel import tune
from torch_sluice.parallel.tuning import NEVER, Tuning, default_tuning, machine_name, save_tunings

_WORDS = {
    "piece": "a large message goes in pieces of",
    "buffer_streaming": "pieces are written past the caches from",
    "flat": "every rank reduces everything up to",
    "direct": "memory of other processes is read from",
    "direct_send": "what is sent is read from the sender's memory from",
    "streaming": "results are written past the caches from",
}


def run(ranks: list[int], rounds: int, path: Path | None, console: Console) -> dict[int, Tuning]:
    """Measures for each of these numbers of ranks; writes the file at ``path`` unless it is None."""
    tunings, rows = {}, []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(ranks) * len(tune.QUESTIONS))
        for each in ranks:
            progress.update(task, description=f"{each} ranks")

            def report(measured: tune.Measured) -> None:
                rows.append(measured)
                progress.advance(task)

            tunings[each] = tune.measure(each, rounds, report)
    console.print(_table(rows))
    if path is None:
        console.print("Nothing was written.")
    else:
        save_tunings(path, tunings)
        console.print(f"Groups that are made from now on use it: {path}", soft_wrap=True)
    return tunings


def _table(rows: list[tune.Measured]) -> Table:
    table = Table(title=machine_name())
    for heading in ("ranks", "", "chosen", "default", "time, chosen / default"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for row in rows:
        default = getattr(default_tuning(row.ranks), row.question)
        table.add_row(
            str(row.ranks), _WORDS[row.question], _size(row.chosen), _size(default), _ratios(row, row.chosen, default)
        )
    return table


def _size(size: int) -> str:
    if size == NEVER:
        return "never"
    if size >= tune.MB:
        return f"{size / tune.MB:g} MB"
    return f"{size / tune.KB:g} KB" if size else "never"


def _ratios(row: tune.Measured, chosen: int, default: int) -> str:
    if row.question == "piece":
        chosen_seconds, default_seconds = row.seconds[str(chosen)], row.seconds[str(default)]
        return " ".join(f"{chosen_seconds[size] / default_seconds[size]:.2f}" for size in chosen_seconds)
    question = next(each for each in tune.QUESTIONS if each.name == row.question)

    def seconds(threshold: int, size: int) -> float:
        used = size <= threshold if question.serves_small else size >= threshold
        return row.seconds["with" if used else "without"][size]

    return " ".join(f"{seconds(chosen, size) / seconds(default, size):.2f}" for size in question.sizes)
