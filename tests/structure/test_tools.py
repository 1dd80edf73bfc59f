"""tools/debian_packages.sh with stand-ins for the commands that it looks for, and for those that it would run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/debian_packages.sh"
GOOD_COMMANDS = {
    "cmake": "echo cmake version 3.25.1",
    "c++": "",
    "python": "",
    "pkg-config": "",
}


@pytest.fixture
def run(tmp_path):
    """Runs the script where only the given commands exist; returns the process and what apt-get was called with."""
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir()

    def add(name, text):
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
        (folder / name).chmod(0o755)

    def run(purpose, commands, user=0):
        (folder / "awk").symlink_to(shutil.which("awk"))
        add("id", f"echo {user}")
        add("apt-get", f'echo "$DEBIAN_FRONTEND $*" >>"{log}"')
        for name, text in commands.items():
            add(name, text)
        process = subprocess.run(
            [shutil.which("bash"), SCRIPT, purpose, "python"],
            env={"PATH": str(folder)},
            capture_output=True,
            text=True,
        )
        return process, log.read_text().splitlines() if log.exists() else []

    return run


@pytest.mark.parametrize("user", [0, 1000])
def test_nothing_is_said_or_done_where_nothing_is_missing(run, user):
    process, calls = run("demo", GOOD_COMMANDS, user)
    assert (process.returncode, process.stdout, process.stderr, calls) == (0, "", "", [])


MISSING = [
    ("demo", {}, "cmake g++ python3"),
    ("demo", {**GOOD_COMMANDS, "cmake": "echo cmake version 3.24.9"}, "cmake"),
    ("test", {name: text for name, text in GOOD_COMMANDS.items() if name != "pkg-config"}, "pkg-config"),
]


@pytest.mark.parametrize(("purpose", "commands", "packages"), MISSING)
def test_root_installs_what_is_missing(run, purpose, commands, packages):
    process, calls = run(purpose, commands)
    assert process.returncode == 0, process.stderr
    packages = _with_gtest(packages, purpose)
    assert process.stdout == f"Installing Debian packages: {packages}\n"
    assert calls == [" update -qq", f"noninteractive install -qq -y --no-install-recommends {packages}"]


@pytest.mark.parametrize(("purpose", "commands", "packages"), MISSING)
def test_others_are_told_what_to_install(run, purpose, commands, packages):
    process, calls = run(purpose, commands, user=1000)
    assert (process.returncode, process.stdout, calls) == (1, "", [])
    packages = _with_gtest(packages, purpose)
    assert process.stderr.splitlines() == [
        f"Missing Debian packages: {packages}",
        f"Run: sudo apt-get update && sudo apt-get install {packages}",
    ]


def test_a_failed_installation_ends_in_failure(run):
    process, _ = run("demo", {"apt-get": "[[ $1 == update ]] || exit 100"})
    assert process.returncode == 100


def _with_gtest(packages, purpose):
    """GoogleTest is looked for where Debian puts it, whatever the path."""
    there = purpose != "test" or os.path.exists("/usr/include/gtest/gtest.h")
    return packages if there else "libgtest-dev " + packages
