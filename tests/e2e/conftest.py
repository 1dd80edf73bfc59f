"""What the tests of the main job share: a small text and the command in a process of its own."""

import subprocess
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """What is this small gains nothing from threads, and loses much where other work runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """Ten small files of text that can be learned a little."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(10):
        lines = (f"def function_{number}_{i}(x):\n    return x + {i}\n" for i in range(30))
        (folder / f"module_{number}.py").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def run_command():
    """Runs ``torch-sluice ARGUMENTS`` to its end; returns the finished process with its output as text."""

    def run(*arguments, **options):
        command = [sys.executable, "-m", "torch_sluice.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)

    return run
