"""What the documentation says exists, and the README's example runs."""

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TRAIN = (REPOSITORY / "docs/train.md").read_text()
ROOMS = ("ops", "c_core", "torch_bindings", "python", "tests", "benchmarks", "docs", "tools", "cmake")


def missing_links(page, text):
    """Links to files that do not exist, or to headings that a page does not have."""
    missing = []
    for target, heading in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if "://" in target:
            continue
        file = page.parent / target if target else page
        if not file.exists() or (heading and heading not in anchors(file.read_text())):
            missing.append(target + ("#" + heading if heading else ""))
    return missing


def anchors(text):
    """What its headings are called in a link."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_paths(text):
    """Backticked paths of this repository that lead nowhere; placeholders such as c_core/<family>/ are left out."""
    paths = re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w./*-]*)`", text)
    return [path for path in paths if not list(REPOSITORY.glob(path.rstrip("/")))]


def missing_benchmarks(text):
    modules = re.findall(r"python -m (benchmarks\.\w+)", text)
    return [module for module in modules if not (REPOSITORY / (module.replace(".", "/") + ".py")).is_file()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_paths_and_programs_exist(page):
    text = page.read_text()
    assert missing_links(page, text) + missing_paths(text) + missing_benchmarks(text) == []


def test_the_check_sees_what_is_missing():
    text = (
        "[a](no.md) [b](https://example.org/#x) [c](README.md#licence) [d](README.md#measured) "
        "`c_core/none.c` `c_core/<family>/x.c` `python -m benchmarks.none`"
    )
    assert missing_links(PAGES[0], text) == ["no.md", "README.md#licence"]
    assert missing_paths(text) == ["c_core/none.c"]
    assert missing_benchmarks(text) == ["benchmarks.none"]


def test_the_example_of_the_readme_runs():
    pytest.importorskip("transformers")
    (example,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S)
    process = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    density = float(re.fullmatch(r"density (\d\.\d+)\n", process.stdout)[1])
    assert 0 < density <= 1


def _table(text, heading):
    """Rows below the table row that starts with this, as lists of cells."""
    lines = text[text.index(heading) :].splitlines()[2:]
    rows = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def test_the_options_of_train_are_those_of_the_parser(capsys):
    from torch_sluice import cli

    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    parsed = set(re.findall(r"^  (?:-h, )?(--[\w-]+)", capsys.readouterr().out, re.M)) - {"--help"}
    documented = {option for row in _table(TRAIN, "| option |") for option in re.findall(r"--[\w-]+", "".join(row))}
    assert documented - {"--help"} <= parsed
    changes = {option for option, *_ in cli._OVERRIDES}
    assert changes < parsed
    assert parsed - changes <= documented


def test_the_presets_of_train_are_as_documented():
    from torch_sluice.train.settings import PRESETS

    columns = ["demo", "long"]
    rows = _table(TRAIN, "| | demo | long |")
    assert PRESETS.keys() == set(columns)
    names = {
        "layers, width, heads, feed-forward": ("layers", "width", "heads", "feedforward"),
        "context": ("context",),
        "steps": ("steps",),
        "target density, local window, sinks": ("target_density", "local_window", "sinks"),
    }
    assert {row[0] for row in rows} == {*names, "bytes a step"}
    for label, *cells in rows:
        for column, cell in zip(columns, cells, strict=True):
            values = asdict(PRESETS[column])
            if label == "bytes a step":
                assert (int(cell[0]), int(cell.split()[-1])) == (
                    values["micro_batches"],
                    PRESETS[column].tokens_per_step,
                )
            else:
                assert cell == ", ".join(str(values[name]) for name in names[label])
