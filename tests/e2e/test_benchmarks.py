"""The benchmark programs run, at sizes that say nothing about speed, and write the rows that they promise."""

import json

import pytest
import torch

import torch_sluice.info
from benchmarks import (
    accumulate,
    accumulate_overhead,
    attention_profile,
    channel_norms,
    gated_attention,
    import_time,
    kv_cache,
    monitor_overhead,
    quantize_dispatch,
    quantize_recurrent,
    recall,
)

WHERE = {"threads", "isa", "processor", "torch"}


@pytest.fixture
def rows_of(tmp_path, capsys):
    """Runs a program in this process and returns the rows of its JSON."""

    def run(program, *arguments):
        path = tmp_path / "results" / "rows.json"  # the folder is made by the program
        program.main([*map(str, arguments), "--threads=1", f"--json={path}"])
        rows = json.loads(path.read_text())
        for row in rows:
            assert row.keys() >= {"dtype", "seconds", "peers", "ratio"} | WHERE
            assert row["threads"] == 1
            assert row["isa"] == torch_sluice.info.describe_plugin()["cpu"]["isa"]
        return rows

    return run


def test_gated_attention(rows_of, capsys):
    sizes = "--n=48", "--heads=2", "--head-dim=16", "--repeats=1", "--no-flex"
    rows = rows_of(gated_attention, *sizes, "--density", 1, 0.5, "--dtype", "float32", "bfloat16")
    cases = [(row["pass"], row["dtype"], row["density"]) for row in rows]
    expected = [
        (direction, dtype, density)
        for direction in ("forward", "backward")
        for dtype in ("float32", "bfloat16")
        for density in (1, 0.5)
    ]
    assert cases == expected
    for row in rows:
        assert (row["causal"], row["n"], row["batch"], row["heads"], row["head_dim"]) == (True, 48, 1, 2, 16)
        assert row["achieved_density"] == pytest.approx(row["density"], abs=0.03)
        assert row["peers"].keys() == {"sdpa", "flex", "eager"}
        assert row["peers"]["flex"] is None
        assert row["peers"]["eager"] > 0
        # One round, so the ratio of the round is that of the times.
        assert row["ratio"] == pytest.approx(row["peers"]["sdpa"] / row["seconds"])
    assert "ratio = best peer / sluice" in capsys.readouterr().out


def test_the_profile_of_gated_attention(rows_of, capsys):
    sizes = "--n=200", "--heads=2", "--head-dim=16", "--repeats=1", "--no-flex"
    rows = rows_of(gated_attention, *sizes, "--density", 1, 0.2, "--dtype", "float32", "--profile")
    assert "where the forward's time goes" in capsys.readouterr().out
    assert [row["pass"] for row in rows if row["profile"]] == ["forward", "forward"]
    dense, sparse = (row["profile"] for row in rows[:2])
    assert tuple(sparse) == attention_profile.PARTS
    assert all(seconds >= 0 for seconds in (*dense.values(), *sparse.values()))
    assert all(sparse[part] > 0 for part in set(attention_profile.PARTS) - {"idle"})
    # Time is not compared: of the products it is the share of wasted pairs, which is counted.
    shares = [profile["waste"] / (profile["waste"] + profile["products"]) for profile in (dense, sparse)]
    assert 0 < shares[0] < shares[1] < 1


def test_kv_cache(rows_of, capsys):
    sizes = "--n-k=512", "--heads=4", "--kv-heads=2", "--head-dim=16", "--repeats=1", "--batch", 1, 2
    rows = rows_of(kv_cache, *sizes, "--density", 1, 0.25, "--dtype", "float32", "--budget", 1, 0.3, "--shuffle")
    decode = [row for row in rows if row["operation"] == "decode"]
    evict = [row for row in rows if row["operation"] == "evict"]
    assert len(decode) + len(evict) == len(rows)
    assert [(row["batch"], row["density"]) for row in decode] == [(1, 1), (1, 0.25), (2, 1), (2, 0.25)]
    for row in decode:
        assert row["achieved_density"] == pytest.approx(row["density"], abs=0.01)
        assert row["peers"].keys() == {"contiguous", "sdpa", "read"}
        assert row["ratio"] == pytest.approx(row["peers"]["sdpa"] / row["seconds"])
        assert row["ratio_contiguous"] == pytest.approx(row["peers"]["contiguous"] / row["seconds"])
        assert row["cache_bytes"] == row["batch"] * 512 * 2 * (2 * 16 + 1) * 4
        keys = row["batch"] * 512 * 2
        needed = 4 * keys * (row["achieved_density"] * 2 * 16 + 1)
        assert row["bandwidth_share"] == pytest.approx(needed / row["seconds"] / row["bandwidth"], rel=1e-3)
    assert [row["budget"] for row in evict] == [None, 1, 0.3]
    by_gate, whole, part = evict
    assert by_gate["relative_error"] == whole["relative_error"] == 0
    assert by_gate["cache_bytes"] == whole["cache_bytes"] < by_gate["bytes_before"]
    assert part["cache_bytes"] / part["bytes_before"] == pytest.approx(0.3, abs=0.02)
    assert 0 < part["relative_error"] < part["peer_error"]
    assert "ratio = sdpa / sluice" in capsys.readouterr().out


def test_accumulate(rows_of, monkeypatch, capsys):
    monkeypatch.setattr(accumulate, "POOL_BYTES", 1 << 16)
    sizes = "--elements", 1000, "--width", 16, "--error-elements", 5000
    rows = rows_of(accumulate, *sizes, "--dtype", "float32", "--repeats", 1, "--every", 2)
    kinds = {kind: [row for row in rows if row["operation"] == kind] for kind in ("accumulate_", "window", "error")}
    assert sum(map(len, kinds.values())) == len(rows)
    assert [row["format"] for row in kinds["accumulate_"]] == ["fp32", "fp16 stochastic", "fp16 nearest"]
    for row in kinds["accumulate_"]:
        assert (row["elements"], row["memory"]) == (1000, "cold")
        assert row["peers"].keys() == {"add_", "add_ and measure", "adaptive_precision"}
        assert row["ratio"] == pytest.approx(row["peers"]["add_"] / row["seconds"])
        assert row["ratio_to_measuring"] == pytest.approx(row["peers"]["add_ and measure"] / row["seconds"])
    assert [row["format"] for row in kinds["window"]] == ["auto", "fp32", "fp16", "seed"]
    for row in kinds["window"]:
        assert row["ratio"] == pytest.approx(row["peers"]["torch"] / row["seconds"])
        assert row["peer_bytes"] == 4 * row["elements"] == 4 * 12 * 16**2
    errors = {row["format"]: row["relative_error"] for row in kinds["error"] if row["norm"] == 1e-3}
    assert errors.keys() == set(accumulate.FORMATS)
    assert errors["float32"] < errors["scaled float16, nearest"] < errors["float16"]
    assert {(row["seconds"], row["ratio"]) for row in kinds["error"]} == {(None, None)}
    assert "error of the sum of a window" in capsys.readouterr().out


def test_import_time(rows_of, capsys):
    (row,) = rows_of(import_time, "--repeats=1")
    assert (row["operation"], row["repeats"]) == ("import torch", 1)
    off, absent = row["peers"]["autoload off"], row["peers"]["no entry points"]
    assert (absent is None) == import_time.is_installed()
    assert row["ratio"] == pytest.approx(off / row["seconds"])
    assert row["added_seconds"]["autoload off"] == pytest.approx(row["seconds"] - off)
    assert row["spread"]["registered"] == [row["seconds"]] * 2
    assert import_time.middle_half([5.0, 1.0, 3.0, 2.0, 4.0]) == [2.0, 4.0]
    assert "registering adds" in capsys.readouterr().out


def test_accumulate_overhead(rows_of, capsys):
    pytest.importorskip("transformers")
    (row,) = rows_of(accumulate_overhead, "--quick", "--case", "gated", "--session", "every=1")
    assert row["overhead"] == pytest.approx(1 / row["ratio"] - 1)
    assert row["middle_half"][0] <= row["overhead"] <= row["middle_half"][1]
    assert "every=1" in capsys.readouterr().out


def test_monitor_overhead(rows_of, capsys):
    (row,) = rows_of(monitor_overhead, "--quick", "--case", "small model")
    assert (row["case"], row["rounds"], row["steps_a_round"]) == ("small model", 2, 3)
    assert row["ratio"] == pytest.approx(1 / (1 + row["overhead"]))
    assert row["middle_half"][0] <= row["overhead"] <= row["middle_half"][1]
    assert row["monitor_share"] == pytest.approx(row["monitor_seconds"] / row["peers"]["without"])
    assert row["mfu"] > 0
    assert "monitor's own code" in capsys.readouterr().out


def test_quantize_dispatch(rows_of, capsys):
    rows = rows_of(quantize_dispatch, "--repeats", 1)
    assert [row["case"] for row in rows] == list(quantize_dispatch.CASES)
    for row in rows:
        assert row["peers"].keys() == {"direct", "float", "subclass", "torchao"}
        assert row["overhead"] == pytest.approx(row["seconds"] - row["peers"]["direct"])
    assert "overhead" in capsys.readouterr().out


def test_channel_norms(rows_of, monkeypatch, capsys):
    small = {"out": ((8, 6), None, 0), "in, channels last": ((4, 6, 3, 3), torch.channels_last, 1)}
    monkeypatch.setattr(channel_norms, "CASES", small)
    rows = rows_of(channel_norms, "--repeats", 1)
    assert [(row["case"], row["dtype"]) for row in rows] == [(c, d) for d in ("float32", "bfloat16") for c in small]
    for row in rows:
        assert row["peers"].keys() == {"abs().sum()", "in float64", "vector_norm"}
        assert row["ratio"] == pytest.approx(min(row["peers"].values()) / row["seconds"])
    assert "L1 norms of channels" in capsys.readouterr().out


def test_recall(rows_of, capsys):
    sizes = "--n=48", "--steps=3", "--dense-steps=2", "--sequences=8", "--target", 0.3
    rows = rows_of(recall, *sizes)
    assert [row["method"] for row in rows] == ["dense", "gate", "window", *["window, untrained"] * 5]
    dense = rows[0]["accuracy"]
    for row in rows:
        assert (row["operation"], row["n"], row["causal"]) == ("recall", 48, True)
        assert 0 < row["density"] <= 1
        assert row["peers"] == {"dense": dense}
        assert row["ratio"] == (row["accuracy"] / dense if dense else None)
        assert (row["seconds"] is None) == (row["steps"] == 0)
    assert rows[0]["density"] == 1
    assert (rows[0]["steps"], rows[1]["target"], rows[1]["window"]) == (3, 0.3, 4)
    assert rows[2]["density"] <= 0.6 < rows[2]["density"] + 1 / 24
    assert "8 pairs, 16 queries" in capsys.readouterr().out


def test_recall_names_a_bad_size(capsys):
    with pytest.raises(SystemExit):
        recall.main(["--n=20"])
    assert "--n is 20, expected at least 48" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantize_recurrent(rows_of, capsys):
    rows = rows_of(quantize_recurrent, "--hidden", 24, "--batch", 2, "--steps", 3, "--repeats", 1)
    assert [row["kind"] for row in rows] == ["lstm", "gru"]
    for row in rows:
        assert (row["hidden"], row["batch"], row["steps"], row["state_bits"]) == (24, 2, 3, [16])
        assert row["peers"].keys() == {"fp32", "fbgemm"}
        assert row["ratio"] == row["ratios"]["fp32"] == pytest.approx(row["peers"]["fp32"] / row["seconds"])
        assert 0 < row["error"] < 0.03
        assert 0 < row["linear_error"] < 0.03
    assert "peer / sluice" in capsys.readouterr().out
