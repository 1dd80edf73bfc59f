"""Reports of a training comparison: a table for the terminal, a page for the browser."""

from torch_sluice.report.html import render_html
from torch_sluice.report.table import print_comparison

__all__ = ["print_comparison", "render_html"]
