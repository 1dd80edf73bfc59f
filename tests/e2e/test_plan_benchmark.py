"""The comparison with published runs: its rows, its errors, and that what it prints can be reproduced."""

import json
import re

import numpy as np
import pytest

from benchmarks import plan, plan_claim, plan_fit, plan_rows
from torch_sluice.plan import load_cluster


@pytest.fixture(scope="module")
def given_rows():
    return plan.load_rows(plan_rows.GIVEN)


def errors(rows, predicted):
    return 100 * np.abs(predicted / np.array([row.published_s for row in rows]) - 1)


def test_published_runs_are_predicted_within_the_goals(given_rows):
    wide = [row for row in given_rows if row.layout.precision == "bf16"]
    clusters = {row.device: load_cluster(row.device) for row in wide}
    everything = errors(wide, plan_fit.predictions(clusters, wide))
    assert len(everything) == 47
    assert everything.mean() < 4
    assert everything.max() < 10
    korthikanti = everything[[row.source == "B" for row in wide]]
    assert korthikanti.mean() < 3
    assert korthikanti.max() < 7
    assert errors(wide, plan_fit.leave_one_model_out(clusters, wide, wide)).mean() < 5


def test_runs_that_nothing_was_fitted_to_are_predicted_as_well():
    rows = plan.load_rows(plan_rows.HELD_OUT)
    clusters = {row.device: load_cluster(row.device) for row in rows}
    found = errors(rows, plan_fit.predictions(clusters, rows))
    assert len(found) == 19
    assert found.mean() < 4
    assert found.max() < 7


def test_the_fitted_numbers_in_the_files_are_those_of_the_fit(given_rows):
    for device, cluster in plan.fit_all(given_rows).items():
        kept = load_cluster(device)
        for name in plan_fit.PRIORS:
            assert getattr(kept, name) == pytest.approx(getattr(cluster, name), rel=2e-3), (device, name)
    assert len(plan_fit.PRIORS) <= 6


def test_peak_memory_of_published_runs():
    rows = plan_rows.read_memory()
    assert len(rows) == 15
    for _, row, published in rows:
        estimate = plan.predict(row.shape, load_cluster(row.device), row.layout)
        assert estimate.total_bytes - estimate.margin_bytes == pytest.approx(published, rel=0.02)


def test_the_program_writes_a_row_for_each_run(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert plan.main(["--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert len(rows) == 69
    for row in rows:
        assert row.keys() >= {"source", "model", "gpus", "predicted_s", "published_s", "predicted_bytes"}
        assert row["predicted_s"] > 0
        assert row["predicted_bytes"] > 0
    text = capsys.readouterr().out
    assert "FP8 runs: nothing was fitted to them" in text
    assert "left one model out: 47 rows" in text
    assert "recompute none" in text  # an assumption, since the rows don't say


@pytest.mark.parametrize("source", [*plan_rows.GIVEN, *plan_rows.HELD_OUT], ids=lambda path: path.stem)
def test_any_file_of_either_set_of_columns_is_taken(source, tmp_path, capsys):
    path = tmp_path / "rows.json"
    lines = source.read_text().splitlines()
    copy = tmp_path / "runs.csv"
    copy.write_text("\n".join(line for line in lines if not line.startswith("#")))
    assert plan.main(["--data", str(copy), "--json", str(path)]) == 0
    assert len(json.loads(path.read_text())) == len(plan_rows.read_rows(source))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(",hidden,", ",width,"), "lacks the columns hidden"),
        (lambda text: text.replace(",8,1,1,8,4,4,1,full,,1.42", ",x,1,1,8,4,4,1,full,,1.42"), "row 6: tp is 'x'"),
        (lambda text: text.replace("1.42", "-1"), "row 6: step_s is '-1', expected seconds above 0"),
        (lambda text: text.replace("1.42", ""), "row 6: step_s is '', expected seconds above 0"),
        (lambda text: text.replace("B,22,64,", "B,22,60,"), "row 6: hidden is 6144, expected a multiple of heads"),
        (lambda text: text.replace("1,8,4,4,1,full", "1,9,4,4,1,full"), r"row 6: gpus is 9, expected dp \* tp"),
        (lambda text: text.replace("1,8,4,4,1,full", "1,8,4,4,1,some"), "row 6: recompute is 'some', expected one of"),
        (lambda text: text.splitlines()[4], "has no rows, expected at least one run"),
        (lambda text: "", "lacks the columns"),
    ],
)
def test_a_file_that_is_no_table_of_runs_is_named(change, message, tmp_path, capsys):
    path = tmp_path / "runs.csv"
    path.write_text(change(plan_rows.GIVEN[0].read_text()))
    assert plan.main(["--data", str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert re.search(message, error), error


def test_a_missing_file_is_named(capsys):
    assert plan.main(["--data", "/no/such/file.csv"]) == 2
    assert "/no/such/file.csv" in capsys.readouterr().err


def test_the_claim_on_paper_is_about_layouts_that_fit_and_parts_that_help():
    rows = {row["case"]: row for row in plan_claim.cases("a100-80g", 1024)}
    order = ["traditional", "Korthikanti et al.'s software", "planned", "planned, with Sluice's parts"]
    assert list(rows) == order
    steps = [rows[case]["step_s"] for case in order]
    assert steps == sorted(steps, reverse=True)
    assert rows["traditional"]["ratio"] == 1
    assert all(0 < row["efficiency"] < 1 for row in rows.values())
