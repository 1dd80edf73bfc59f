"""What ``torch-sluice train --mesh`` refuses, before it starts a rank: one line that says what is wrong."""

import json

import pytest
from support.training import TINY

from torch_sluice.cli import main

LAYOUT = dict(dp=2, tp=1, pp=1, schedule="1f1b", data_parallel="ddp", backend="sluice", dense=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "dp=0"], "--mesh is 'dp=0', expected sizes of at least 1 for dp, tp and pp"),
        (["--mesh", "dp=2,dp=2"], "--mesh is 'dp=2,dp=2', expected"),
        (["--mesh", "cp=2"], "--mesh is 'cp=2', expected"),
        (["--mesh", ""], "--mesh is '', expected"),
        (["--mesh", "tp=3"], "--mesh has tp=3, expected a divisor of --heads = 2"),
        (
            ["--mesh", "pp=2"],
            "--mesh has pp=2, which with --schedule 1f1b makes 2 stages, expected at most --layers = 1",
        ),
        (["--mesh", "dp=2", "--micro-batches=3"], "--micro-batches is 3, expected a multiple of dp=2"),
        (
            ["--mesh", "dp=2,pp=2", "--layers=2", "--micro-batches=2"],
            "--micro-batches is 2, expected at least 4: for each of 2 pipelines as many as it has stages",
        ),
        (
            ["--mesh", "dp=2,pp=2", "--layers=4", "--schedule=zero-bubble", "--data-parallel=fsdp"],
            "--data-parallel is fsdp and --schedule is zero-bubble, expected ddp",
        ),
        (["--mesh", "dp=2", "--with-window"], "--with-window does not go with --mesh"),
        (["--mesh", "dp=2", "--tensorboard"], "--tensorboard does not go with --mesh"),
        (["--mesh", "dp=2", "--metrics-port=0"], "--metrics-port does not go with --mesh"),
        (["--mesh", "dp=2", "--save-every=0"], "--save-every is 0, expected at least 1 step"),
        (["--schedule", "gpipe"], "--schedule is given without --mesh"),
        (["--dense"], "--dense is given without --mesh"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_bad_options(text_folder, tmp_path, capsys, arguments, message):
    assert main(["train", "--data", str(text_folder), "--out", str(tmp_path), *TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_another_number_of_ranks_than_were_started(text_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["train", "--data", str(text_folder), "--out", str(tmp_path), *TINY, "--mesh", "dp=2"]) == 2
    assert "--mesh has 2 ranks, expected as many as were started: 3" in capsys.readouterr().err


def write_run(folder, step):
    from torch_sluice.train.settings import PRESETS

    path = folder / "checkpoints/step-00000001"
    path.mkdir(parents=True)
    state = dict(format="torch-sluice train --mesh, version 1", settings=PRESETS["demo"].to_dict(), layout=LAYOUT)
    state |= dict(step=step, data=None, fingerprint="", controller=None, sums={})
    (path / "run.json").write_text(json.dumps(state))


@pytest.mark.parametrize("mesh", [["--mesh", "dp=2"], []])
def test_an_unfinished_run_is_not_replaced(text_folder, tmp_path, capsys, mesh):
    write_run(tmp_path, step=5)
    assert main(["train", "--data", str(text_folder), "--out", str(tmp_path), *TINY, *mesh]) == 2
    assert "which holds an unfinished run (step 5 of 200)" in capsys.readouterr().err


def test_resume_of_nothing_and_of_another_text(text_folder, tmp_path, capsys):
    assert main(["train", "--resume", str(tmp_path), "--mesh", "dp=2"]) == 2
    assert "which holds no checkpoint" in capsys.readouterr().err
    write_run(tmp_path, step=5)
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "is not what this run was trained on" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path), "--dense"]) == 2
    assert "--resume continues a run with its own settings: leave out --dense" in capsys.readouterr().err
