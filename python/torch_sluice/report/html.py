"""The comparison as one HTML file that needs nothing beside it."""

from importlib import resources

from torch_sluice.report.rows import SIDES, goal_rows, headline, table_rows


def render_html(result: dict) -> str:
    """The page for the figures of ``torch_sluice.train.compare``.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
    """
    import jinja2

    from torch_sluice.report.plots import COLOURS, draw_plots

    template = resources.files("torch_sluice.report").joinpath("template.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        result=result,
        headline=headline(result),
        goals=goal_rows(result),
        rows=table_rows(result),
        sides=[(name, result[name]["title"]) for name in SIDES if name in result],
        colours=COLOURS,
        plots=draw_plots(result),
    )
