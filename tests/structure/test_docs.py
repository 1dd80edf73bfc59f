"""What the documentation says exists, and the README's example runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
ROOMS = ("ops", "c_core", "torch_bindings", "python", "tests", "benchmarks", "docs", "tools", "cmake")


def missing_links(page, text):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    return [target for target in targets if "://" not in target and not (page.parent / target).exists()]


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
    text = "[a](no.md) [b](https://example.org) `c_core/none.c` `c_core/<family>/x.c` `python -m benchmarks.none`"
    assert missing_links(PAGES[0], text) == ["no.md"]
    assert missing_paths(text) == ["c_core/none.c"]
    assert missing_benchmarks(text) == ["benchmarks.none"]


def test_the_example_of_the_readme_runs():
    pytest.importorskip("transformers")
    (example,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S)
    process = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    density = float(re.fullmatch(r"density (\d\.\d+)\n", process.stdout)[1])
    assert 0 < density <= 1
