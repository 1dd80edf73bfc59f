"""The monitor's HTML page: whole, self-contained, and honest about what is not known."""

import html
import re

import pytest
import torch
from torch import nn

from torch_sluice.monitor import Monitor, MonitorWarning
from torch_sluice.report.monitor_rows import tiles


@pytest.fixture
def page_of(tmp_path):
    """Runs a loop under a monitor of the options and returns its page."""

    def make(losses, model=None, **options):
        model = nn.Linear(64, 64) if model is None else model
        path = tmp_path / "folder" / "page.html"
        with Monitor(model, report=path, name="<run>", **{"peak_flops": 1e12, "mfu_limit": None, **options}) as monitor:
            monitor.count_flops(lambda: model(torch.randn(1, 64)))
            for loss in losses:
                monitor.record(0.05, tokens=8, loss=loss, density=0.25, bits_8_share=0.5)
        assert [file.name for file in path.parent.iterdir()] == ["page.html"]
        return path.read_text()

    return make


def test_the_page_stands_alone(page_of):
    page = page_of([3.0, 2.0, 1.0], target_loss=2.5)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|@import|url\((?!#)""", page)
    assert page.count("<svg") == 5  # loss, seconds, MFU, density, bits
    assert "prefers-color-scheme: dark" in page
    assert '<meta name="viewport" content="width=device-width' in page
    assert "&lt;run&gt;: 3 steps of 50 ms" in page
    assert "steps to the target loss 2.5" in page
    assert "goal missed" not in page
    assert "Nothing is beyond its limit" in page  # though matplotlib has been loaded since


@pytest.mark.parametrize(
    ("added", "note", "within"),
    [
        (2**16, "limit: at most 10", True),
        (2**20, "not judged: little was added", True),
        (2**25, "limit: at most 10", False),
    ],
)
def test_a_memory_ratio_is_judged_from_sixteen_megabytes_on(added, note, within):
    summary = quiet_summary(parameter_bytes=2**16, peak_bytes=2**16 + added)
    (tile,) = (tile for tile in tiles(summary, (0.7, 10)) if tile[1] == "peak memory / parameters")
    assert tile[2:] == (note, within)


def quiet_summary(**figures):
    """The summary of a monitor that has seen nothing, with these figures in it."""
    with Monitor(nn.Linear(2, 2), mfu_limit=None, memory_ratio_limit=None) as monitor:
        summary = {**monitor.summary(), **figures}
    return {**summary, "memory_ratio": summary["peak_bytes"] / summary["parameter_bytes"]}


def test_an_mfu_above_one_is_called_what_it_is(page_of):
    page = html.unescape(page_of([1.0], peak_flops=1.0))
    assert "MFU is above 1: the peak was measured while the machine did other work; give peak_flops." in page


def test_plots_leave_their_colours_to_the_page(page_of):
    page = page_of([3.0, 2.0, 1.0])
    drawn = set(re.findall(r"#[0-9a-f]{6}", page[page.index("</style>") :]))
    assert drawn == set()
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert used <= set(re.findall(r"(--[\w-]+):", page))


def test_what_is_beyond_a_limit_is_said_on_the_page(page_of):
    with pytest.warns(MonitorWarning):
        page = html.unescape(page_of([3.0, float("nan"), 2.0], mfu_limit=0.7, target_loss=0.5))
    assert "MFU is 0%, below 70%" in page
    assert "The loss was not finite at 1 of 3 steps." in page
    assert "The smoothed loss did not reach the target of 0.5." in page
    assert page.count("not reached") == 3  # the tile, steps and seconds


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_of_hardly_any_steps(page_of, steps):
    page = page_of([1.0] * steps, model=nn.Linear(64, 64))
    assert f"{steps} step" in page
    assert "<svg" not in page


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    monitor = Monitor(nn.Linear(2, 2), report=tmp_path / "file" / "page.html", mfu_limit=None)
    monitor.record(0.1)
    with pytest.warns(MonitorWarning, match="writing the report .* failed, the run goes on: "):
        monitor.close()


def test_missing_packages_are_named_before_the_run(monkeypatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jinja2" else find(name))
    with pytest.raises(ImportError, match=r"report is 'x.html', which needs jinja2: pip install 'torch-sluice\[mon"):
        Monitor(nn.Linear(2, 2), report="x.html")
