"""The main job from the command line to its reports, on a tiny model."""

import json
import math
import re
import statistics

import pytest
from support.training import TINY

from torch_sluice.cli import main

STEPS = 6


@pytest.fixture(scope="module")
def finished(run_command, text_folder, tmp_path_factory):
    """(process, folder, JSON) of a run with all three sides; the folder's name has a space."""
    folder = tmp_path_factory.mktemp("out") / "a run"
    json_path = folder.parent / "figures.json"
    process = run_command(
        "train", "--data", text_folder, "--out", folder, "--json", json_path, "--with-window", f"--steps={STEPS}", *TINY
    )
    assert process.returncode == 0, process.stderr
    return process, folder, json.loads(json_path.read_text())


def test_json_holds_every_promised_figure(finished):
    _, folder, figures = finished
    for side in ("dense", "sluice", "window"):
        for key in ("heldout_loss", "heldout_accuracy", "seconds_per_step", "peak_bytes", "mfu", "flops_per_step"):
            assert figures[side][key] > 0, (side, key)
        assert math.isclose(sum(figures[side]["time_by_part"].values()), 1.0, rel_tol=1e-6)
        assert len(figures[side]["history"]["loss"]) == STEPS
    assert 0 < figures["density"] <= 1
    pairs = zip(figures["dense"]["history"]["seconds"], figures["sluice"]["history"]["seconds"], strict=True)
    ratios = [dense / sluice for dense, sluice in pairs][figures["timed_from_step"] :]
    assert figures["speedup"] == statistics.median(ratios)
    assert figures["accuracy_kept"] == figures["sluice"]["heldout_accuracy"] / figures["dense"]["heldout_accuracy"]
    assert figures["pairs_skipped"] == 1 - figures["density"]
    assert json.loads((folder / "results.json").read_text()) == figures


def test_sides_start_alike_and_learn(finished):
    _, _, figures = finished
    first = {side: figures[side]["history"]["loss"][0] for side in ("dense", "sluice", "window")}
    assert first["sluice"] == pytest.approx(first["dense"], rel=2e-2)
    assert first["window"] == pytest.approx(first["dense"], rel=1e-1)
    for side in first:
        assert figures[side]["history"]["loss"][-1] < first[side]


def test_window_has_the_density_it_was_asked_for(finished):
    _, _, figures = finished
    # The next wider window would exceed the target, so at most a 48th of the pairs is missing.
    target = figures["settings"]["target_density"]
    assert target - 1 / 24 < figures["window"]["density"] <= target


def test_report_stands_alone(finished):
    _, folder, figures = finished
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 5
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|@import|url\((?!#)""", page)
    for sentence in figures["losses"]:
        assert sentence.split("'")[0] in page.replace("&#39;", "'")


def test_table_names_what_was_missed(finished):
    process, _, figures = finished
    assert "Where Sluice loses" in process.stdout
    assert process.stdout.count("missed") >= sum(not goal["met"] for goal in figures["goals"].values())


def test_nothing_else_is_left_behind(finished):
    _, folder, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "report.html", "results.json"]


def test_finished_run_can_be_reported_again_though_nothing_can_be_measured(finished, monkeypatch, capsys):
    _, folder, figures = finished
    monkeypatch.setattr("torch_sluice.train.compare.measure_side", lambda folder, side: {})
    assert main(["train", "--resume", str(folder)]) == 0
    assert "not measured" in capsys.readouterr().out
    again = json.loads((folder / "results.json").read_text())
    assert again["sluice"]["peak_bytes"] is None
    assert again["sluice"]["history"] == figures["sluice"]["history"]
    assert again["sluice"]["heldout_loss"] == pytest.approx(figures["sluice"]["heldout_loss"], rel=1e-6)


@pytest.mark.parametrize("command", [(), ("train",), ("info",)])
def test_command_line_has_help_everywhere(command, capsys):
    with pytest.raises(SystemExit) as exit_of:
        main([*command, "--help"])
    assert exit_of.value.code == 0
    assert capsys.readouterr().out.startswith("usage: torch-sluice")
