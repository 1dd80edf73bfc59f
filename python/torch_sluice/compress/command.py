"""The command ``torch-sluice compress``: a model from the user's own code, a table, and files."""

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch_sluice.compress.pipeline import compress
from torch_sluice.compress.report import CompressionReport
from torch_sluice.compress.storage import save


class CompressError(Exception):
    """A mistake of the user, to be told in one line."""


def load_factory(name: str, folder: Path) -> Any:
    """The callable that ``package.module:function`` names, imported with ``folder`` in front of the path.

    Raises:
        CompressError: there is none.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise CompressError(f"--model is {name!r}, expected package.module:function")
    if not folder.is_dir():
        raise CompressError(f"--path is {str(folder)!r}, and there is no such folder")
    sys.path.insert(0, str(folder.resolve()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise CompressError(
            f"--model is {name!r}, and {error}: name a module that can be imported from --path, which is {folder}"
        ) from error
    finally:
        sys.path.remove(str(folder.resolve()))
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise CompressError(f"--model is {name!r}, and {module_name} has no function {attribute}")
    return factory


def read_parts(made: Any, name: str) -> dict[str, Any]:
    """What the factory returned, as arguments of ``compress``: (model, example_inputs, data[, metric]), or a dict."""
    names = ("model", "example_inputs", "data", "metric")
    if isinstance(made, (tuple, list)) and 3 <= len(made) <= 4:
        made = dict(zip(names, made, strict=False))
    if not isinstance(made, Mapping):
        raise CompressError(
            f"{name} returned a {type(made).__name__}, expected (model, example_inputs, data) or (model, "
            "example_inputs, data, metric), or a dict with these names and those of further arguments of "
            "torch_sluice.compress"
        )
    missing = [part for part in names[:3] if part not in made]
    if missing:
        raise CompressError(f"{name} returned a dict without {', '.join(missing)}")
    return dict(made)


def check_targets(*paths: str | None) -> None:
    """Refuses what cannot be written before the work is done, not after it."""
    for path in filter(None, paths):
        folder = Path(path).resolve().parent
        if not folder.is_dir():
            raise CompressError(f"{path} cannot be written: there is no folder {folder}")
        if Path(path).is_dir():
            raise CompressError(f"{path} cannot be written: it is a folder")


def run(options, console) -> CompressionReport:
    """Compresses as the parsed options say, writes the files, and prints the table."""
    check_targets(options.out, options.json, options.report)
    parts = read_parts(load_factory(options.model, Path(options.path))(), options.model)
    given = {
        "keep": options.keep, "policy": options.policy,
        "budget": None if options.budget is None else options.budget / 1e3,
        "prune": False if options.no_prune else None, "quantize": False if options.no_quantize else None,
        "weight_bits": options.weight_bits, "quantize_policy": options.quantize_policy, "threads": options.threads,
    }  # fmt: skip
    parts.update({name: value for name, value in given.items() if value is not None})
    try:
        small = compress(**parts)
    except (TypeError, ValueError) as error:
        raise CompressError(error) from error
    report = small.compression_report
    if options.out:
        save(small, options.out)
    if options.json:
        Path(options.json).write_text(json.dumps(report.as_dict(), indent=1) + "\n", "utf-8")
    if options.report:
        Path(options.report).write_text(render_page(report, options.model), "utf-8")
    print_report(report, console)
    return report


def print_report(report: CompressionReport, console) -> None:
    """The table for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{report.kept_text}, {report.keep:.1%} asked for", title_justify="left")
    for title in ("", "before", "after", ""):
        table.add_column(title, justify="left" if title == "" else "right")
    for row in report.rows():
        table.add_row(*row)
    console.print(table)
    counts: dict[str, int] = {}
    for layer in report.layers:
        counts[layer.action] = counts.get(layer.action, 0) + 1
    console.print("; ".join(f"{count} {action}" for action, count in sorted(counts.items())), highlight=False)
    for note in report.notes:
        console.print(f"  - {escape(note)}", highlight=False)


def render_page(report: CompressionReport, title: str) -> str:
    """The report as one HTML page that needs nothing beside it."""
    from importlib import resources

    import jinja2

    template = resources.files("torch_sluice.compress").joinpath("template.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(report=report, title=title)
