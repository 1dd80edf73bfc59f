"""What is made of a finished run: figures that can be worked out by hand, and sentences about where Sluice loses."""

import copy
import dataclasses
import math
import statistics
import subprocess

import pytest
import torch
from rich.console import Console
from support.training import SMALL

from torch_sluice.attention import Gate
from torch_sluice.monitor import count_flops
from torch_sluice.report import print_comparison
from torch_sluice.report.rows import ROWS, headline
from torch_sluice.train import measure
from torch_sluice.train.checkpoint import load_checkpoint
from torch_sluice.train.compare import closing_step, judge_goals, paired_speedup, smooth
from torch_sluice.train.errors import TrainError
from torch_sluice.train.losses import find_losses, find_notes
from torch_sluice.train.main import start_run
from torch_sluice.train.side import History, Side


def _side(title, **changes):
    figures = {
        "title": title,
        "heldout_loss": 2.0,
        "heldout_accuracy": 0.5,
        "seconds_per_step": 1.0,
        "seconds_per_step_whole_run": 1.0,
        "seconds_total": 40.0,
        "peak_bytes": 2 << 20,
        "parameter_bytes": 1 << 20,
        "memory_ratio": 2.0,
        "density": 1.0,
        "half_share": 0.0,
        "flops_per_step": 2e9,
        "mfu": 0.5,
        "not_measured": None,
        "steps_to_target": 30,
        "seconds_to_target": 30.0,
        "history": {"seconds": [1.0] * 40},
    }
    assert changes.keys() <= figures.keys()
    return {**figures, **changes}


def _result(sluice=None, window=None, **changes):
    """A run in which Sluice loses in nothing, but for what is changed."""
    result = {
        "preset": "demo",
        "settings": {"steps": 40, "target_density": 0.2},
        "speedup": 1.5,
        "speedup_whole_run": 1.2,
        "timed_from_step": 10,
        "density_while_timed": 0.2,
        "accuracy_kept": 1.0,
        "pairs_skipped": 0.8,
        "gate_closed_at_step": 10,
        "dense": _side("dense"),
        "sluice": _side("Sluice", density=0.2, **(sluice or {})),
        **changes,
    }
    assert result.keys() - changes.keys() >= {"dense", "sluice"}
    if window is not None:
        result["window"] = _side("window", **window)
    result["goals"] = judge_goals(result)
    result["losses"], result["notes"] = find_losses(result), find_notes(result)
    return result


def test_no_sentence_where_nothing_is_lost():
    assert _result()["losses"] == []
    assert _result(window={"heldout_accuracy": 0.49})["losses"] == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"speedup": 1.29}, "Speedup is 1.29x; the goal is 1.3x."),
        ({"accuracy_kept": 0.97}, "Accuracy kept is 97.0%; the goal is 98%."),
        ({"pairs_skipped": 0.4}, "Pairs skipped is 40.0%; the goal is 50%."),
        ({"gate_closed_at_step": None}, "The gate had not closed to its target density of 0.2 by the last step"),
        ({"sluice": {"history": {"seconds": [1.5] * 40}}}, "(the first 10 steps) Sluice took 1.50 times as long"),
        ({"speedup_whole_run": 0.8, "sluice": {"seconds_total": 50.0}}, "slower (50 s against 40 s)"),
        ({"sluice": {"heldout_loss": 2.0125}}, "Held-out loss is 0.0125 nats a byte above dense's."),
        ({"sluice": {"heldout_accuracy": 0.49}}, "Held-out accuracy is 1.00 points below dense's."),
        ({"sluice": {"steps_to_target": 33}}, "It took 33 steps to the target loss, dense 30."),
        ({"sluice": {"seconds_to_target": 44.4}}, "It took 44.4 seconds to the target loss, dense 30."),
        (
            {"sluice": {"steps_to_target": None, "seconds_to_target": None}},
            "Sluice did not reach the target loss; dense did after 30 steps.",
        ),
        ({"sluice": {"peak_bytes": 3 << 20}}, "A step needs 1.50 times the memory of dense's."),
        ({"sluice": {"mfu": 0.4}}, "MFU is 40.0% against dense's 50.0%"),
        ({"sluice": {"parameter_bytes": 1.25 * 2**20}}, "The gates add 25.0% to the parameters."),
        ({"sluice": {"memory_ratio": 2.5}}, "Peak memory / parameters: 2.5, dense 2.0."),
        ({"sluice": {"flops_per_step": 3e9}}, "GFLOP a step, steps 11 to 40: 3, dense 2."),
        ({"sluice": {"seconds_per_step": 1.2}}, "Seconds a step, steps 11 to 40 (median): 1.200, dense 1.000."),
        ({"sluice": {"seconds_per_step_whole_run": 1.2}}, "Seconds a step, whole run (median): 1.200, dense 1.000."),
        ({"density_while_timed": 0.141}, "in steps 11 to 40 it kept 0.141 of the pairs, for a target of 0.2."),
        (
            {"sluice": {"mfu": None, "peak_bytes": None, "not_measured": "MemoryError: none left"}},
            "Memory, FLOPs and MFU of Sluice were not measured, so nothing is said of them: MemoryError: none left",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_each_loss_has_its_sentence_and_no_other(changes, sentence):
    (found,) = _result(**changes)["losses"]
    assert sentence in found


@pytest.mark.parametrize("row", [row for row in ROWS if row[3]], ids=lambda row: row[1])
def test_no_row_of_the_table_in_which_dense_is_better_goes_unsaid(row):
    _, key, _, direction = row
    worse = 1.5 if direction < 0 else 0.5
    result = _result()
    result["sluice"][key] *= worse
    result["speedup_whole_run"] = result["dense"]["seconds_total"] / result["sluice"]["seconds_total"]
    assert len(find_losses(result)) == 1


@pytest.mark.parametrize("kept", [0.181, 0.2, 0.219])
def test_density_within_a_tenth_of_its_target_is_no_loss(kept):
    assert _result(density_while_timed=kept)["losses"] == []


def test_headline_names_the_steps_of_its_speed_and_the_speed_of_the_whole_run():
    sentence = headline(_result(speedup=1.5, speedup_whole_run=1.18))
    assert sentence.startswith(
        "With the gate closed (steps 11 to 40) a training step is 1.50 times as fast as dense's;"
    )
    assert "over the whole run training is 1.18 times as fast as dense's" in sentence
    sentence = headline(_result(speedup=0.8, speedup_whole_run=0.5, timed_from_step=39))
    assert "(step 40) a training step takes 1.25 times as long as dense's" in sentence
    assert "over the whole run training takes 2.00 times as long as dense's" in sentence


def test_goals_of_a_gate_that_never_closed_are_not_judged():
    result = _result(gate_closed_at_step=None, timed_from_step=30, speedup=4.12, density_while_timed=1.0)
    assert [goal["met"] for goal in result["goals"].values()] == [None] * 3
    text = _printed(result)
    assert [line.split()[:2] for line in text.splitlines() if "(goal " in line] == [["not", "judged"]] * 3
    assert "The gate did not close; in steps 31 to 40 a training step is 4.12 times as fast as dense's" in text
    assert "with the gate closed" not in text.lower()


def test_a_run_without_a_window_says_that_one_may_do_as_well(repository):
    (note,) = _result()["notes"]
    assert "can do as well as the gate or better" in note
    assert "docs/train.md" in note
    assert "a plain sliding window" in (repository / "docs/train.md").read_text()
    assert note in " ".join(_printed(_result()).split())
    assert "the gate 0.5000" in _result(window={"heldout_accuracy": 0.4})["notes"][0]  # the window was measured
    assert _result(window={"heldout_accuracy": 0.52})["notes"] == []  # said where Sluice loses


@pytest.mark.parametrize(
    ("accuracy", "says"), [(0.52, "better"), (0.502, "as well"), (0.498, "as well"), (0.497, None)]
)
def test_window_that_does_as_well_sends_the_reader_to_recall(repository, accuracy, says):
    losses = _result(window={"heldout_accuracy": accuracy})["losses"]
    assert len(losses) == (says is not None)
    if says:
        expected = f"A plain sliding window of the target density does {says} here (accuracy {accuracy:.4f}"
        assert expected in losses[0]
        assert losses[0].endswith("see the section Recall of docs/gate.md.")
        assert "\n## Recall\n" in (repository / "docs/gate.md").read_text()


def _printed(result):
    console = Console(width=200)
    with console.capture() as capture:
        print_comparison(result, console)
    return capture.get()


def test_table_marks_each_goal():
    text = _printed(_result())
    assert [line.split()[0] for line in text.splitlines() if "(goal " in line] == ["met"] * 3
    assert "Where Sluice loses" not in text
    text = _printed(_result(speedup=1.0, pairs_skipped=0.1))
    assert [line.split()[0] for line in text.splitlines() if "(goal " in line] == ["missed", "met", "missed"]
    assert "Where Sluice loses:\n  - Speedup is 1.00x; the goal is 1.3x.\n  - Pairs skipped is 10.0%" in text


def test_smoothed_loss_is_not_pulled_towards_zero():
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smooth([1.0, 2.0]) == pytest.approx([1.0, (0.9 * 0.1 * 1.0 + 0.1 * 2.0) / 0.19])


@pytest.mark.parametrize(
    ("densities", "step"),
    [
        ([0.2] * 5, 0),
        ([0.9] * 5, None),
        ([0.22] * 4 + [0.9], None),  # opens again in the end
        ([0.9] * 3 + [0.0] * 30, 8),  # .9 (.9^6 - .9^9) / (1 - .9^9) = .212, a step before .253
        ([], None),
    ],
)
def test_gate_has_closed_once_its_smoothed_density_stays_below_a_tenth_above_the_target(densities, step):
    assert closing_step(History(density=densities), 0.2) == step


def test_speedup_is_the_median_over_pairs_of_steps():
    # A slow stretch of the machine (times 10) hits both sides of a pair; the ratio of medians would be 2 / 10.
    assert paired_speedup([2.0, 20.0, 2.0, 20.0, 2.0], [1.0, 10.0, 1.0, 10.0, 10.0]) == 2.0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_loss_that_is_no_number_ends_the_run(text_folder, tmp_path, monkeypatch, loss, side):
    run = start_run(SMALL, str(text_folder), tmp_path, overwrite=False)
    broken = list(run.sides.values())[side]
    monkeypatch.setattr(broken, "run_micro_batches", lambda batches: loss)
    with pytest.raises(TrainError, match=rf"loss of {list(run.sides)[side]} became {loss} at step 0; try a smaller"):
        run.train(lambda run: None)
    run.close()


def test_weights_that_become_nan_in_the_last_step_end_the_run(text_folder, tmp_path, monkeypatch):
    run = start_run(dataclasses.replace(SMALL, steps=1), str(text_folder), tmp_path, overwrite=False)
    learn = Side.run_micro_batches

    def spoil(batches):
        loss = learn(run.sides["dense"], batches)
        run.sides["dense"].model.lm_head.weight.data.fill_(math.nan)
        return loss

    monkeypatch.setattr(run.sides["dense"], "run_micro_batches", spoil)
    with pytest.raises(TrainError, match="held-out loss of dense became nan at step 1"):
        run.train(lambda run: None)
    run.close()


def test_what_cannot_be_measured_says_why(tmp_path):
    # There is no checkpoint in the folder, so the measuring process fails.
    problem = measure.measure_side(tmp_path, "dense", 0)["problem"]
    assert problem.startswith("torch_sluice.train.errors.TrainError: ")
    assert f"'{tmp_path}', which holds no checkpoint.pt" in problem


def test_measuring_process_that_is_killed_silently(tmp_path, monkeypatch):
    killed = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(measure.subprocess, "run", lambda *arguments, **options: killed)
    assert measure.measure_side(tmp_path, "dense", 0) == {"problem": "the measuring process ended with -9"}


@pytest.mark.parametrize(
    ("first", "steps", "expected"), [(7, 8, [7] * 12), (4, 6, [4] * 6 + [5] * 6), (0, 12, list(range(12)))]
)
def test_measured_steps_are_spread_over_the_timed_ones(first, steps, expected):
    assert measure.steps_to_measure(first, steps) == expected
    many = measure.steps_to_measure(118, 200)
    assert len(set(many)) == measure.MEASURED_STEPS
    assert (many[0], many[-1]) == (118, 199)


def test_shares_of_a_step_are_medians_with_their_range():
    steps = [{"attention": share, "the rest": 1 - share} for share in (0.2, 0.25, 0.9)]
    summary = measure.summarise_shares(steps)
    assert summary["time_by_part"] == pytest.approx({"attention": 0.25, "the rest": 0.75})
    assert summary["time_by_part_range"]["attention"] == [0.2, 0.9]
    uneven = [{"a": 1.0, "b": 0.0, "c": 0.0}, {"a": 0.0, "b": 1.0, "c": 0.0}, {"a": 0.0, "b": 0.5, "c": 0.5}]
    assert sum(measure.summarise_shares(uneven)["time_by_part"].values()) == pytest.approx(1.0)


@pytest.fixture
def run_whose_gate_follows_the_text(text_folder, tmp_path):
    """A finished run whose gates keep what the bytes say: few pairs of the text, others of other bytes."""
    torch.manual_seed(0)
    run = start_run(dataclasses.replace(SMALL, steps=2, local_window=1), str(text_folder), tmp_path, overwrite=False)
    for gate in (module for module in run.sides["sluice"].model.modules() if isinstance(module, Gate)):
        for weight in (gate.query_weight, gate.key_weight):
            torch.nn.init.normal_(weight, std=20.0)
        gate.query_bias.data.zero_()
        gate.key_bias.data.zero_()
    run.step = run.settings.steps
    run.save()
    yield run
    run.close()


def test_operations_are_those_of_the_batches_of_the_run(run_whose_gate_follows_the_text):
    run = run_whose_gate_follows_the_text
    side, settings = run.sides["sluice"], run.settings
    figures = measure.measure_side(run.folder, "sluice", 1)
    assert "problem" not in figures, figures

    def count(batches_of):
        side.load_state_dict(copy.deepcopy(load_checkpoint(run.folder)["sides"]["sluice"]))
        counts = []
        for number in measure.steps_to_measure(1, settings.steps):
            batches = batches_of(number)
            counts.append(count_flops(lambda batches=batches: side.train_step(batches, settings.steps - 1)))
        return statistics.fmean(counts)

    own = count(lambda number: run.corpus.step_batches(settings, number))
    shape = (settings.micro_size, settings.context + 1)
    random = count(lambda number: [torch.randint(0, 256, shape) for _ in range(settings.micro_batches)])
    assert abs(own - random) > 5e-4 * own  # or the test would tell nothing
    assert figures["flops_per_step"] == pytest.approx(own, rel=2e-5)
    assert figures["measured_steps"] == measure.MEASURED_STEPS


def test_text_that_is_no_longer_that_of_the_run_is_not_measured(tmp_path):
    data = tmp_path / "text.txt"
    data.write_text("some text to learn " * 200)
    run = start_run(SMALL, str(data), tmp_path / "out", overwrite=False)
    run.save()
    run.close()
    data.write_text("other text to learn " * 200)
    assert "is not what this run was trained on" in measure.measure_side(run.folder, "dense", 0)["problem"]
