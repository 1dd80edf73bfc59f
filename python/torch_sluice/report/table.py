"""The comparison on the terminal."""

from rich.console import Console
from rich.table import Table

from torch_sluice.report.rows import SIDES, goal_rows, headline, table_rows

_STYLES = {"met": "green", "missed": "red", "not judged": "yellow"}


def print_comparison(result: dict, console: Console) -> None:
    table = Table(title=f"{result['preset']}: {result['settings']['steps']} steps", title_justify="left")
    table.add_column("")
    for name in SIDES:
        if name in result:
            table.add_column(result[name]["title"], justify="right")
    for label, cells, best in table_rows(result):
        table.add_row(label, *(f"[bold]{cell}[/]" if i == best else cell for i, cell in enumerate(cells)))
    console.print(table)
    console.print(headline(result) + ".", style="bold", highlight=False)
    for text, measured, goal, verdict in goal_rows(result):
        console.print(
            f"  [{_STYLES[verdict]}]{verdict:10}[/] {measured} {text} (goal {goal})", highlight=False, soft_wrap=True
        )
    if result["gate_closed_at_step"] is None:
        console.print("  The goals are about a closed gate, and this one did not close.", highlight=False)
    if result["losses"]:
        console.print("Where Sluice loses:", style="bold")
        for sentence in result["losses"]:
            console.print(f"  - {sentence}", highlight=False, markup=False)
    for sentence in result["notes"]:
        console.print(sentence, highlight=False, markup=False)
