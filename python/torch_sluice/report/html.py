"""The comparison as one HTML file that needs nothing beside it."""

from importlib import resources

from torch_sluice.report.rows import SIDES, goal_rows, headline, table_rows, timed_steps

# Of the parts of a step; no side has them.
_COLOURS = ("var(--part-1)", "var(--part-2)", "var(--part-3)", "var(--rest)")


def render_html(result: dict) -> str:
    """The page for the figures of ``torch_sluice.train.compare``.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
    """
    from torch_sluice.report.plots import draw_plots

    parts = _time_by_part(result)
    return render_template(
        "template.html",
        result=result,
        headline=headline(result),
        goals=goal_rows(result),
        rows=table_rows(result),
        timed_steps=timed_steps(result),
        sides=[(name, result[name]["title"]) for name in SIDES if name in result],
        plots=draw_plots(result),
        parts=parts,
        measured_steps=max((result[name]["measured_steps"] or 0 for name in SIDES if name in result), default=0),
        longest=max((seconds for _, seconds, _ in parts), default=1.0),
    )


def render_template(name: str, **values) -> str:
    """A page of this folder with the values in its places; ``style`` is the style sheet.

    Raises:
        ImportError: jinja2 is missing.
    """
    import jinja2

    folder = resources.files("torch_sluice.report")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(folder.joinpath(name).read_text("utf-8"))
    return template.render(style=folder.joinpath("style.css").read_text("utf-8"), **values)


def _time_by_part(result: dict) -> list[tuple[str, float, list[tuple[str, str, float, list[float]]]]]:
    """(side, seconds a step, [(part, colour, share, [least, greatest share])]) of the sides of which it is known."""
    sides = [result[name] for name in SIDES if name in result and result[name]["time_by_part"]]
    return [
        (
            side["title"],
            side["seconds_per_step"],
            [
                (part, colour, share, side["time_by_part_range"][part])
                for (part, share), colour in zip(side["time_by_part"].items(), _COLOURS, strict=True)
            ],
        )
        for side in sides
    ]
