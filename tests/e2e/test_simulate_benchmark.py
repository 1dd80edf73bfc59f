"""The simulator's benchmark runs, at sizes that say nothing about speed, and writes the rows that it promises."""

import json

import pytest

from benchmarks import simulate
from torch_sluice.plan.simulation import SCHEDULES


def test_simulate(tmp_path, capsys):
    path = tmp_path / "rows.json"
    simulate.main(["--quick", "--repeats=1", f"--json={path}"])
    rows = json.loads(path.read_text())
    assert [row["schedule"] for row in rows] == list(SCHEDULES)
    for row in rows:
        assert (row["ranks"], row["micro_batches"], row["threads"]) == (8, 64, 1)
        assert row["events_per_s"] == pytest.approx(row["events"] / row["seconds"])
    # On 8 ranks: 2 kinds of work for each stage, a message each way between neighbours, and the reductions.
    assert rows[1]["events"] == (2 * 8 + 2 * 7) * 64 + 8
    assert "events a second" in capsys.readouterr().out
