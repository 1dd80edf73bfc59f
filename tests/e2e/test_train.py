"""The main job from the command line to its reports, on a tiny model."""

import dataclasses
import datetime
import html
import json
import math
import re
import statistics
import time

import pytest
import torch
from support.training import SMALL, TINY
from torch.nn import functional

import torch_sluice
from torch_sluice.cli import main
from torch_sluice.monitor import count_flops
from torch_sluice.monitor.records import smooth
from torch_sluice.report.plots import step_time_limit
from torch_sluice.train.loop import make_sides
from torch_sluice.train.losses import GOALS
from torch_sluice.train.model import build_model, predict
from torch_sluice.train.settings import PRESETS

STEPS = 6


@pytest.fixture(scope="module")
def finished(run_command, text_folder, tmp_path_factory):
    """(process, folder, JSON) of a run with all three sides; the folder's name has a space."""
    folder = tmp_path_factory.mktemp("out") / "a run"
    json_path = folder.parent / "figures.json"
    process = run_command(
        *("train", "--data", text_folder, "--out", folder, "--json", json_path, "--with-window", f"--steps={STEPS}"),
        *("--metrics-port=0", *TINY),
    )
    assert process.returncode == 0, process.stderr
    return process, folder, json.loads(json_path.read_text())


def _check_way_to_target(side, target_loss):
    """The first step at which the smoothed loss is at most the target, and the seconds up to its end."""
    history, steps = side["history"], side["steps_to_target"]
    assert history["smoothed_loss"] == smooth(history["loss"])
    if steps is None:
        assert min(history["smoothed_loss"]) > target_loss
        assert side["seconds_to_target"] is None
    else:
        assert history["smoothed_loss"][steps - 1] <= target_loss
        assert all(loss > target_loss for loss in history["smoothed_loss"][: steps - 1])
        assert side["seconds_to_target"] == pytest.approx(sum(history["seconds"][:steps]))


@pytest.fixture
def fresh_sides():
    """The three sides as they are before the first step."""
    sides = make_sides(dataclasses.replace(SMALL, with_window=True))
    yield sides
    for side in sides.values():
        side.close()


def test_all_sides_start_from_the_same_weights(fresh_sides):
    dense = fresh_sides["dense"].model.state_dict()
    assert len(dense) > 10
    for name in ("sluice", "window"):
        other = fresh_sides[name].model.state_dict()
        assert all(".sluice_gate." in key for key in other.keys() - dense.keys())
        for key, value in dense.items():
            assert torch.equal(other[key], value), (name, key)
            assert other[key].data_ptr() != value.data_ptr(), (name, key)


def _share_of_attention(settings):
    """Of the floating-point operations of a step of the dense model with one layer, as the monitor counts them. With
    more layers the share is greater: the output layer comes once."""
    model = build_model(dataclasses.replace(settings, layers=1))
    batch = torch.zeros(settings.micro_size, settings.context + 1, dtype=torch.int64)

    def step():
        logits = predict(model, batch[:, :-1])
        functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()

    pairs = settings.micro_size * settings.heads * settings.context * (settings.context + 1) // 2
    attention = pairs * (2 + 2 + 6 + 4) * (settings.width // settings.heads)  # as torch_sluice/monitor/flops.py has it
    return attention / count_flops(step)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_are_about_attention(preset):
    settings = PRESETS[preset]
    settings.check()
    assert settings.context >= 2048
    assert 0.5 <= _share_of_attention(settings) < 1


def test_json_holds_every_promised_figure(finished, fresh_sides):
    _, folder, figures = finished
    for side in ("dense", "sluice", "window"):
        for key in ("heldout_loss", "heldout_accuracy", "seconds_per_step", "peak_bytes", "mfu", "flops_per_step"):
            assert figures[side][key] > 0, (side, key)
        assert math.isclose(sum(figures[side]["time_by_part"].values()), 1.0, rel_tol=1e-6)
        assert len(figures[side]["history"]["loss"]) == STEPS
        assert figures[side]["parameter_bytes"] == 4 * sum(
            parameter.numel() for parameter in fresh_sides[side].model.parameters()
        )
        assert figures[side]["memory_ratio"] == figures[side]["peak_bytes"] / figures[side]["parameter_bytes"]
        assert figures[side]["not_measured"] is None
        _check_way_to_target(figures[side], figures["target_loss"])
    assert figures["dense"]["steps_to_target"] is not None  # the target is 2 % above its last loss
    assert figures["dense"]["half_share"] == figures["window"]["half_share"] == 0
    assert 0 < figures["sluice"]["half_share"] <= 1
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
    assert page.count("<svg") == 4
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|@import|url\((?!#)""", page)
    for sentence in (*figures["losses"], *figures["notes"]):
        assert sentence in html.unescape(page)


def test_report_says_when_and_with_what_it_was_measured(finished):
    _, folder, figures = finished
    page = (folder / "report.html").read_text()
    assert abs(datetime.datetime.fromisoformat(figures["date"]).timestamp() - time.time()) < 3600
    assert f"torch-sluice {torch_sluice.__version__}, torch {torch.__version__};" in page
    assert f'<time datetime="{figures["date"]}">{figures["date"][:10]}' in html.unescape(page)


def test_report_of_a_gate_that_never_closed_does_not_speak_of_a_closed_one(finished):
    _, folder, figures = finished
    assert figures["gate_closed_at_step"] is None
    assert all(goal["met"] is None for goal in figures["goals"].values())
    page = re.sub(r"<[^>]+>", " ", (folder / "report.html").read_text().split("<body>")[1])
    assert not re.search(r"once the gate has closed|with the gate closed|: met|below 0\.55", page, re.I)
    assert page.count("not judged") == len(GOALS)
    assert "in steps 5 to 6 a training step" in page
    assert "over the whole run training" in page


def test_parts_of_a_step_have_no_colour_of_a_side(finished):
    _, folder, _ = finished
    page = (folder / "report.html").read_text()
    bars = re.findall(r"<span style=\"flex: [^;]+; background: ([^;\"]+)", page)
    assert len(bars) == 3 * 4
    variables = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]+)", page.split("prefers-color-scheme")[0]))
    colours = {variables[re.fullmatch(r"var\((.*)\)", bar)[1]] for bar in bars}
    assert len(colours) == 4
    assert not colours & {variables[f"--{side}"] for side in ("dense", "sluice", "window")}


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [
        ([0.6] * 100, 0.6),
        ([0.6] * 50 + [7.0] * 3 + [0.6] * 47, 0.6),  # the machine, for three steps
        ([7.0] + [0.6] * 5, 0.6),
        ([0.9] * 40 + [0.6] * 60, 0.9),  # the gate learns for longer than a stretch
        ([7.0] * 20 + [0.6] * 80, 2.4),
    ],
)
def test_axis_of_step_times_is_not_that_of_the_slowest_step(seconds, limit):
    assert step_time_limit(seconds) == pytest.approx(limit)


def test_table_names_what_was_missed(finished):
    process, _, figures = finished
    lines = [line.strip() for line in process.stdout.splitlines() if "(goal " in line]
    words = {True: "met ", False: "missed ", None: "not judged "}
    for line, name in zip(lines, GOALS, strict=True):
        assert line.startswith(words[figures["goals"][name]["met"]])
    assert ("Where Sluice loses" in process.stdout) == bool(figures["losses"])


def test_nothing_else_is_left_behind(finished):
    _, folder, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        *("checkpoint.pt", "report.html", "results.json", "steps.jsonl")
    ]


def test_steps_are_written_as_json_lines(finished):
    process, folder, figures = finished
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    for side in ("dense", "sluice", "window"):
        own = [line for line in lines if line["monitor"] == side]
        assert [line["step"] for line in own] == list(range(1, STEPS + 1))
        assert [line["loss"] for line in own] == figures[side]["history"]["loss"]
        assert all(line["mfu"] > 0 for line in own[1:])
    assert {line.get("half_share") for line in lines if line["monitor"] == "sluice"} != {None}
    assert re.search(r"^Metrics: http://127\.0\.0\.1:\d+/metrics$", process.stdout, re.M)


def test_finished_run_can_be_reported_again_though_nothing_can_be_measured(finished, monkeypatch, capsys):
    _, folder, figures = finished
    monkeypatch.setattr("torch_sluice.train.compare.measure_side", lambda *arguments: {"problem": "<no memory>"})
    assert main(["train", "--resume", str(folder)]) == 0
    assert "not measured" in capsys.readouterr().out
    again = json.loads((folder / "results.json").read_text())
    assert again["sluice"]["not_measured"] == "<no memory>"
    assert sum("<no memory>" in sentence for sentence in again["losses"]) == 2
    assert "&lt;no memory&gt;" in (folder / "report.html").read_text()
    assert again["sluice"]["peak_bytes"] is None
    assert again["sluice"]["history"] == figures["sluice"]["history"]
    assert again["sluice"]["heldout_loss"] == pytest.approx(figures["sluice"]["heldout_loss"], rel=1e-6)


@pytest.mark.parametrize("command", [(), ("train",), ("info",)])
def test_command_line_has_help_everywhere(command, capsys):
    with pytest.raises(SystemExit) as exit_of:
        main([*command, "--help"])
    assert exit_of.value.code == 0
    assert capsys.readouterr().out.startswith("usage: torch-sluice")
