"""What all plots of the reports share: their look, and SVG whose colours the page decides, light or dark."""

import io
import re

from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE = {
    "svg.fonttype": "none",  # text stays text: sharp, selectable, small
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#475569",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e2e8f0",
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "legend.frameon": False,
    "legend.labelcolor": "#475569",
}
# Colour in the plot -> variable of style.css, which has a value for light pages and one for dark ones.
_VARIABLES = {
    "#475569": "--plot-ink",
    "#94a3b8": "--plot-edge",
    "#e2e8f0": "--line",
    "#64748b": "--dense",
    "#0f766e": "--sluice",
    "#c2791b": "--window",
    "#ffffff": "--paper",
}


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure that one plot fills; in inches, small enough that its text can be read on a phone. Not of pyplot, whose
    backend and figures are those of whoever is watched."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def to_svg(figure: Figure) -> str:
    """The SVG element alone, as wide as its place."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]
    # The page decides the size; the view box keeps the proportions.
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
