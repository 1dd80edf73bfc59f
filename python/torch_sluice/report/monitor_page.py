"""A monitor's figures as one HTML file that needs nothing beside it."""

import os
import platform
import tempfile
import time
from pathlib import Path

import torch

from torch_sluice.monitor.limits import find_hints
from torch_sluice.report.html import render_template
from torch_sluice.report.monitor_rows import figure_rows, headline, tiles


def write_monitor_page(monitor, path: Path) -> None:
    """Writes the page, through a file beside it, so that a full disk leaves the page that was there.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
        OSError: the file can't be written.
    """
    page = render_monitor_page(monitor)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        try:
            file.write(page)
            file.flush()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def render_monitor_page(monitor) -> str:
    """The page for the figures that a ``torch_sluice.Monitor`` has."""
    from torch_sluice.report.monitor_plots import draw_curves

    summary = monitor.summary()
    return render_template(
        "monitor.html",
        headline=headline(summary),
        when=time.strftime("%Y-%m-%d %H:%M"),
        tiles=tiles(summary, monitor.limits),
        problems=[sentence[0].upper() + sentence[1:] + "." for sentence in monitor.check() + find_hints(summary)],
        rows=figure_rows(summary),
        plots=draw_curves(monitor.curves, monitor.target_loss, monitor.limits[0]),
        machine=_describe_machine(),
    )


def _describe_machine() -> dict:
    from torch_sluice.info import describe_plugin

    cpu = describe_plugin()["cpu"]
    return {
        "processor": cpu["model"],
        "isa": cpu["isa"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
