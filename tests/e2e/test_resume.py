"""An interrupted run: it stops between steps, leaves a whole checkpoint, and continues as if nothing had happened."""

import copy
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.training import TINY

from torch_sluice.cli import main
from torch_sluice.train.errors import TrainError
from torch_sluice.train.loop import Interrupted
from torch_sluice.train.main import resume_run, start_run
from torch_sluice.train.settings import PRESETS

SETTINGS = dataclasses.replace(
    PRESETS["demo"],
    steps=9,
    context=48,
    width=16,
    heads=2,
    layers=1,
    local_window=4,
    target_density=0.5,
    micro_size=2,
    evaluate_every=4,
    quick_windows=2,
    with_window=True,
)


def _train_with_signal(run, step, number):
    """Trains until the signal that is sent after the given step stops it."""

    def send(run):
        if run.step == step:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted):
        run.train(send)
    run.close()


def _assert_equal(left, right, path=""):
    assert type(left) is type(right), path
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            if key != "seconds":
                _assert_equal(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            _assert_equal(a, b, f"{path}[{index}]")
    else:
        assert left == right, path


@pytest.mark.parametrize("stops", [[(4, signal.SIGINT)], [(1, signal.SIGTERM), (6, signal.SIGINT)]])
def test_resumed_run_equals_an_uninterrupted_one(text_folder, tmp_path, stops):
    whole = start_run(SETTINGS, str(text_folder), tmp_path / "whole", overwrite=False)
    whole.train(lambda run: None)
    whole.close()

    folder = tmp_path / "interrupted"
    run = start_run(SETTINGS, str(text_folder), folder, overwrite=False)
    for step, number in stops:
        _train_with_signal(run, step, number)
        assert run.step == step
        assert [path.name for path in folder.iterdir()] == ["checkpoint.pt"]
        torch.manual_seed(int(time.time()))  # a resumed process starts with other random numbers
        run = resume_run(folder, threads=None)
        assert run.step == step
    run.train(lambda run: None)
    run.close()
    _assert_equal(run.state_dict(), whole.state_dict())


def test_ctrl_c_finishes_the_step_and_says_how_to_resume(text_folder, tmp_path, capsys):
    folder = tmp_path / "a run"
    command = [sys.executable, "-m", "torch_sluice.cli", "train", "--data", str(text_folder), "--out", str(folder)]
    process = subprocess.Popen(
        [*command, "--steps=100000", *TINY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for line in process.stdout:
            if line.startswith("step 1/"):  # training, so the handler is in place
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert f"torch-sluice train --resume '{folder}'" in out
    assert "Traceback" not in err
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "steps.jsonl"]

    assert main(["train", "--data", str(text_folder), "--out", str(folder), *TINY]) == 2
    message = capsys.readouterr().err
    assert "unfinished run" in message
    assert "--resume" in message


def _start_in_background(*arguments, **options):
    """The command in a process of its own, once it trains."""
    command = [sys.executable, "-m", "torch_sluice.cli", "train", *map(str, arguments), "--steps=100000", *TINY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    for line in process.stdout:
        if line.startswith("step 1/"):
            return process
    raise AssertionError(process.stderr.read())


def test_run_that_was_killed_does_not_block_its_folder(text_folder, tmp_path, run_command):
    arguments = ("--data", text_folder, "--out", tmp_path)
    first = _start_in_background(*arguments)
    try:
        second = run_command("train", *arguments, *TINY)
        assert second.returncode == 2
        assert second.stderr.startswith(f"torch-sluice: error: --out is '{tmp_path}', where another run is at work")
        assert second.stderr.count("\n") == 1
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    start_run(SETTINGS, str(text_folder), tmp_path, overwrite=False).close()


@pytest.fixture
def texts(text_folder, tmp_path, monkeypatch):
    """The current folder, with texts in it."""
    shutil.copytree(text_folder, tmp_path / "texts")
    monkeypatch.chdir(tmp_path / "texts")
    return tmp_path / "texts"


def test_printed_command_resumes_a_run_on_the_folder_that_holds_its_files(texts, run_command):
    process = _start_in_background("--data", ".", cwd=texts)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    (line,) = (line for line in out.splitlines() if line.startswith("To continue: "))
    again = subprocess.Popen(
        [sys.executable, "-m", "torch_sluice.cli", *shlex.split(line)[3:]],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=texts,
    )  # fmt: skip
    try:
        assert any(line.startswith("Continuing after step ") for line in again.stdout), again.stderr.read()
    finally:
        again.kill()
        again.communicate()


@pytest.mark.parametrize("out", ["sluice-run", ".", "..", "inner/run"])
def test_files_of_runs_are_no_text(texts, out):
    (texts / "inner").mkdir()
    (texts / "inner" / "steps.jsonl").write_text('{"question": "how many steps?"}\n')  # of the user
    other = start_run(dataclasses.replace(SETTINGS, steps=1), ".", Path("another-run"), overwrite=False)
    run = start_run(dataclasses.replace(SETTINGS, steps=2), ".", Path(out), overwrite=False)
    assert run.corpus.train_files + run.corpus.heldout_files == 11
    assert run.corpus.skipped_files == 0
    for each in (other, run):
        each.watch()
    other.train(lambda run: None)
    other.close()
    _train_with_signal(run, 1, signal.SIGINT)
    for folder in (run.folder, other.folder):
        assert (folder / "steps.jsonl").is_file()
        for name in ("results.json", "report.html", "tensorboard/dense/events", "checkpoints/step-1/run.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"text of {name} of {folder}")
    resumed = resume_run(Path(out), threads=None)
    assert resumed.step == 1
    resumed.close()


def test_text_beside_the_files_of_a_run_counts(texts):
    run = start_run(SETTINGS, ".", Path("."), overwrite=False)
    _train_with_signal(run, 1, signal.SIGINT)
    (texts / "notes.txt").write_text("a text that was not there")
    with pytest.raises(TrainError, match="is not what this run was trained on"):
        resume_run(Path("."), threads=None)


def test_warming_up_changes_nothing(text_folder, tmp_path):
    run = start_run(SETTINGS, str(text_folder), tmp_path, overwrite=False)
    before = copy.deepcopy(run.state_dict())
    random_numbers = torch.get_rng_state()
    run._warm_up()
    _assert_equal(run.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert all(parameter.grad is None for side in run.sides.values() for parameter in side.model.parameters())
    run.close()


def test_signal_handlers_are_put_back(text_folder, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = start_run(dataclasses.replace(SETTINGS, steps=1), str(text_folder), tmp_path, overwrite=False)
    run.train(lambda run: None)
    run.close()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
