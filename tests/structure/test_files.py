"""The size and shape of files: one topic each, with a comment on top that says what it is for."""

import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CODE = {".c", ".h", ".cpp", ".cu", ".cuh", ".def", ".py"}
ROOMS = ("ops", "c_core", "torch_bindings", "python", "tests", "benchmarks", "tools")


def code_files():
    return [path for room in ROOMS for path in (REPOSITORY / room).rglob("*") if path.suffix in CODE]


def test_files_are_short():
    lengths = {str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines()) for path in code_files()}
    assert lengths
    assert {name: length for name, length in lengths.items() if length > 600} == {}
    long = [name for name, length in lengths.items() if length > 300]
    assert len(long) <= len(lengths) // 10, f"one file in ten may exceed 300 lines: {long}"


def test_lines_fit_into_120_columns():
    wide = [
        f"{path.relative_to(REPOSITORY)}:{number}"
        for path in code_files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 120
    ]
    assert wide == []


def test_every_file_says_on_top_what_it_is_for():
    openings = ("/*", "//", '"""', 'r"""', "#!")
    silent = [
        str(path.relative_to(REPOSITORY))
        for path in code_files()
        if path.read_text().strip() and not path.read_text().startswith(openings)
    ]
    assert silent == []


def test_torch_is_pinned_alike_wherever_an_install_may_fetch_it():
    pin = "torch==2.13.0"
    assert pin in (REPOSITORY / "tools/constraints.txt").read_text().splitlines()
    assert f'"{pin}"' in (REPOSITORY / "tools/build_backend.py").read_text()


def test_the_continuous_integration_runs_make_test_and_nothing_else():
    script = (REPOSITORY / ".ci/run").read_text().splitlines()
    assert script[0] == "#!/usr/bin/env bash"
    assert script[1:] == ['cd "$(dirname "$0")/.." && exec make test']


def test_make_help_lists_the_targets():
    text = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "lint", "test-abi", "test-c10d", "help"):
        assert f"make {target} " in text
