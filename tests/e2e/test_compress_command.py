"""torch-sluice compress from the outside: files, table, and mistakes in one line."""

import json
import os
import subprocess
import sys

import pytest
import torch

import torch_sluice

MODULE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 4))

def parts():
    torch.manual_seed(1)
    return model(), torch.randn(1, 20), [(torch.randn(32, 20), None)]

def named():
    made = parts()
    return {"model": made[0], "example_inputs": made[1], "data": made[2], "keep": 0.9, "progress": False}

def with_metric():
    return (*parts(), lambda model, data: 0.5)

def wrong():
    return 3

def incomplete():
    return {"model": model()}

def no_data():
    return model(), torch.randn(1, 20), []
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "torch_sluice.cli", "compress", *arguments],
            capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "COLUMNS": "120"},
        )  # fmt: skip

    return run


def test_a_model_is_compressed_saved_and_reported(command, tmp_path):
    process = command(
        "--model", "mine:parts", "--keep", "0.8", "--out", "small.pt", "--json", "small.json", "--report", "small.html"
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "latency, median" in process.stdout
    assert "Saved: small.pt" in process.stdout
    report = json.loads((tmp_path / "small.json").read_text())
    assert 0.8 <= report["kept_low"] <= report["kept"]
    assert report["samples"] == 32
    assert report["bytes_after"] < report["bytes_before"]
    page = (tmp_path / "small.html").read_text()
    assert "<h1>mine:parts" in page
    assert f"{report['kept'] * 100:.1f}% kept, at least" in page
    assert "(95 %, 32 samples)" in page
    assert "http" not in page
    model = torch.nn.Sequential(torch.nn.Linear(20, 128), torch.nn.ReLU(), torch.nn.Linear(128, 4))
    small = torch_sluice.compress.load(tmp_path / "small.pt", model)
    with torch.no_grad():
        assert small(torch.randn(2, 20)).shape == (2, 4)


def test_what_the_function_names_is_taken(command):
    process = command("--model", "mine:named", "--no-quantize")
    assert process.returncode == 0, process.stderr
    assert "90.0% asked for" in process.stdout
    assert "quantized" not in process.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mine"], "--model is 'mine', expected package.module:function"),
        (["--model", "none:parts"], "No module named 'none': name a module that can be imported from --path"),
        (["--model", "mine:none"], "mine has no function none"),
        (["--model", "mine:wrong"], "mine:wrong returned a int, expected (model, example_inputs, data)"),
        (["--model", "mine:incomplete"], "mine:incomplete returned a dict without example_inputs, data"),
        (["--model", "mine:no_data"], "data yields no batch"),
        (["--model", "mine:parts", "--keep", "97"], "keep is 97.0, expected a share in (0, 1]"),
        (["--model", "mine:parts", "--path", "nowhere"], "--path is 'nowhere', and there is no such folder"),
        (["--model", "mine:parts", "--out", "nowhere/x.pt"], "nowhere/x.pt cannot be written: there is no folder"),
        (["--model", "mine:parts", "--json", "."], ". cannot be written: it is a folder"),
        (["--model", "mine:parts", "--no-prune", "--no-quantize"], "prune and quantize are both False"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    from torch_sluice import cli

    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert cli.main(["compress", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("torch-sluice: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_help_names_every_option(command):
    text = command("--help").stdout
    for option in (
        "--model",
        "--path",
        "--keep",
        "--policy",
        "--budget",
        "--no-prune",
        "--no-quantize",
        "--out",
        "--json",
    ):
        assert f"{option} " in text
