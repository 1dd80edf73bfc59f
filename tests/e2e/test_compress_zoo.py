"""``torch_sluice.compress`` on models that it was not built on, all of torch's in the zoo and a dozen of transformers';
and the program that goes through all of them."""

import argparse
import json
import time

import pytest
import torch
from torch import nn

import torch_sluice
from benchmarks import compress_zoo, zoo, zoo_inputs, zoo_run
from benchmarks.zoo_torch import MODELS

pytest.importorskip("transformers")
ARCHITECTURES = (
    "bert", "clip", "deepseek_v3", "gpt2", "llama", "mamba", "qwen2_vl", "qwen3_moe", "resnet", "swin", "t5", "vit",
    "wav2vec2",
)  # fmt: skip
FIELDS = {"model", "family", "status", "reason", "seconds"}
FOUND = {"copy_error", "kept", "kept_low", "kept_fresh", "bytes", "pruned", "quantized", "stayed", "notes"}


def examine(name):
    return compress_zoo.examine(zoo.find(name), lambda more: None)


def check(name):
    notes = {}
    row = compress_zoo.examine(zoo.find(name), notes.update)
    assert row["status"] in ("compressed", "unchanged", "refused"), row["reason"]
    assert row["status"] == "compressed" or row["reason"]
    assert notes["copy_error"] <= compress_zoo.EQUAL


@pytest.mark.parametrize("name", MODELS)
def test_models_of_torch_are_compressed_or_left_alone(name):
    check(name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_of_transformers_are_compressed_or_left_alone(name):
    check(name)


def test_the_zoo_has_every_architecture_and_builds_the_same_again():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    entries = zoo.architectures()
    assert {entry.name for entry in entries if entry.family == "transformers"} == set(CONFIG_MAPPING_NAMES)
    assert len({entry.name for entry in entries}) == len(entries)
    entry = zoo.find("llama")
    (model, example), (again, same) = entry.build(), zoo.find("llama").build()
    assert entry.can_generate
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert all(torch.equal(example[name], same[name]) for name in example)
    (plain, _), (padded, _) = entry.batches(2, rows=4)
    assert plain["input_ids"].shape == (4, 12)
    assert plain["attention_mask"].all()
    assert padded["attention_mask"][1::2, 0].eq(0).all()
    assert padded["attention_mask"][:, -1].all()
    assert not torch.equal(plain["input_ids"], entry.batches(1, rows=4, seed=2)[0][0]["input_ids"])


def test_an_architecture_that_cannot_be_built_says_why():
    entry = zoo.Entry("none", "transformers", lambda: zoo.make_transformer("timm_wrapper"))
    with pytest.raises(zoo.Unbuildable, match="timm"):
        entry.build()


def test_inputs_are_drawn_for_any_number_of_rows():
    """A tower of vision that takes patches of all images together, and a text that holds as many image tokens as asked
    for and no more by chance."""
    tower = zoo.find("qwen3_vl_vision")
    model, _ = tower.build()
    inputs = tower.batches(1, rows=8)[0][0]
    with torch.no_grad():
        assert zoo.outputs_of(zoo.call(model, inputs))
    assert inputs["hidden_states"].shape[0] == 16 * 8
    plan = zoo_inputs.Plan({"input_ids": 0}, {12: 4})
    model, _ = zoo.find("llama").build()
    text = torch.cat([plan.draw(model, 64, seed)["input_ids"] for seed in range(50)])
    assert text.eq(12).sum(1).eq(4).all()


class Wrong(nn.Module):
    """A compressed model that is not what its report says."""

    def __init__(self, model, report, change):
        super().__init__()
        self.model, self.compression_report, self.change = model, report, change

    def forward(self, x):
        return self.change(self.model(x))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: y.flip(1), "on fresh batches"),
        (lambda y: y[:, :3], "other shapes"),
        (lambda y: y * torch.nan, "on fresh batches"),
    ],
    ids=["wrong", "shape", "nan"],
)
def test_a_wrong_result_is_an_error(monkeypatch, change, reason):
    compress = torch_sluice.compress

    def wrong(model, *arguments, **options):
        small = compress(model, *arguments, **options)
        return Wrong(small, small.compression_report, change)

    monkeypatch.setattr(torch_sluice, "compress", wrong)
    row = examine("gated MLP, glu")
    assert row["status"] == "error"
    assert reason in row["reason"]


def test_a_model_that_was_changed_is_an_error(monkeypatch):
    compress = torch_sluice.compress

    def wrong(model, *arguments, **options):
        small = compress(model, *arguments, **options)
        with torch.no_grad():
            next(model.parameters()).add_(1)
        return small

    monkeypatch.setattr(torch_sluice, "compress", wrong)
    row = examine("gated MLP, glu")
    assert row["status"] == "error"


def test_only_a_sentence_of_compress_itself_is_a_refusal(monkeypatch):
    monkeypatch.setattr(compress_zoo, "KEEP", 2)
    row = examine("MLP")
    assert row["status"] == "refused"
    assert "keep is 2" in row["reason"]

    def fail(*arguments, **options):
        raise ValueError("too many values to unpack")

    monkeypatch.setattr(torch_sluice, "compress", fail)
    row = examine("MLP")
    assert row["status"] == "error"
    assert "ValueError" in row["reason"]
    assert "too many values" in row["reason"]


def test_the_program_writes_rows_and_resumes(tmp_path, capsys):
    path = tmp_path / "results" / "rows.json"
    compress_zoo.main(["--only", "gated MLP, glu|timm_wrapper", "--jobs", "2", f"--json={path}"])
    rows = {row["model"]: row for row in json.loads(path.read_text())}
    assert rows.keys() == {"gated MLP, glu", "timm_wrapper"}
    assert all(row.keys() >= FIELDS for row in rows.values())
    assert rows["timm_wrapper"]["status"] == "unbuilt"
    assert rows["gated MLP, glu"].keys() >= FOUND
    output = capsys.readouterr()
    assert "[2/2" in output.err
    assert "goal" in output.out
    kept = {**rows["gated MLP, glu"], "reason": "from the file"}
    path.write_text("[\n" + json.dumps(kept) + "\n]\n")
    other = tmp_path / "other.json"
    compress_zoo.main(["--only", "gated MLP, glu|timm_wrapper", f"--resume={path}", f"--json={other}"])
    assert json.loads(other.read_text())[0] == kept
    assert "[1/1" in capsys.readouterr().err
    path.write_text(json.dumps([kept, {**rows["timm_wrapper"], "reason": "indented"}], indent=2))
    compress_zoo.main(["--only", "gated MLP, glu|timm_wrapper", f"--resume={path}", f"--json={other}"])
    assert {row["reason"] for row in json.loads(other.read_text())} == {"from the file", "indented"}
    assert not capsys.readouterr().err  # nothing ran
    path.write_text("[\n" + json.dumps(kept) + ',\n{"model": "timm_wr')  # cut off while it was written
    assert list(zoo_run._read(path)) == [kept]
    with pytest.raises(SystemExit, match="no model matches 'nothing'"):
        compress_zoo.main(["--only", "nothing"])


def test_a_model_that_hangs_dies_or_raises_gets_a_row():
    def hang(entry, note):
        note({"class": "Hanging", "stage": "turning in circles"})
        begin = time.process_time()
        while time.process_time() - begin < 30:
            pass

    def exhaust(entry, note):
        return {"kept": len(bytearray(1 << 35))}

    options = argparse.Namespace(jobs=2, seconds=1, gigabytes=12, threads=1)
    entry = zoo.find("MLP")
    (row,) = zoo_run.run_each([entry], hang, options)
    assert row["status"] == "error"
    assert row["reason"] == "not done after 1 s of processor time, while turning in circles"
    assert row["class"] == "Hanging"
    options.seconds = 30
    (row,) = zoo_run.run_each([entry], exhaust, options)
    assert row["status"] == "error"
    assert "MemoryError" in row["reason"]


def test_bytes_are_counted_in_what_a_tensor_is_made_of():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = nn.Parameter(torch.zeros(4, 4))
    expected = sum(4 * t.numel() for t in (*model.parameters(), *model.buffers())) + 4  # the int64 counter
    assert compress_zoo.held_bytes(model) == expected
    model.tied = model[0].weight
    assert compress_zoo.held_bytes(model) == expected
    table = nn.Embedding(4096, 64)
    with torch.no_grad():
        small = torch_sluice.compress(
            table, torch.arange(8), [(torch.arange(4096).view(8, 512)[i], None) for i in range(8)]
        )
    assert compress_zoo.held_bytes(small) < 0.3 * compress_zoo.held_bytes(table)
