"""An interrupted run: it stops between steps, leaves a whole checkpoint, and continues as if nothing had happened."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from support.training import TINY

from torch_sluice.cli import main
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


def test_signal_handlers_are_put_back(text_folder, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = start_run(dataclasses.replace(SETTINGS, steps=1), str(text_folder), tmp_path, overwrite=False)
    run.train(lambda run: None)
    run.close()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
