"""Saving and loading compressed models: no code in the file, no half file on the disk, clear errors."""

import copy
import os
import pickle
import resource
import subprocess
import sys

import pytest
import torch
from support.compress_models import MODELS, call_all_faster, make, mlp
from torch import nn

pytest.importorskip("transformers")

import torch_sluice
from torch_sluice.compress import quantization, storage
from torch_sluice.compress.calling import call_model, float_outputs


def run(model, inputs):
    with torch.no_grad():
        return float_outputs(call_model(model, inputs))[0]


@pytest.fixture(autouse=True)
def every_layer_is_faster(monkeypatch):
    monkeypatch.setattr(quantization, "_time_in_place", call_all_faster)


def compressed(name, keep=0.3):
    model, inputs = make(name)
    return model, inputs, torch_sluice.compress(model, inputs, [(inputs, None)], keep=keep, progress=False)


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_model_gets_the_shapes_and_values_of_the_saved_one(name, tmp_path):
    model, inputs, small = compressed(name)
    path = tmp_path / "small.pt"
    torch_sluice.compress.save(small, path)
    expected = run(small, inputs)
    fresh, _ = make(name, seed=5)
    before = copy.deepcopy(fresh.state_dict())
    for source in (fresh, lambda: make(name, seed=6)[0]):
        loaded = torch_sluice.compress.load(path, source)
        assert torch.equal(run(loaded, inputs), expected)
        assert not loaded.training
        assert loaded.compression_report.as_dict() == small.compression_report.as_dict()
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())
    again = tmp_path / "again.pt"
    torch_sluice.compress.save(loaded, again)
    assert torch.equal(run(torch_sluice.compress.load(again, model), inputs), expected)


def test_a_model_that_was_trained_further_is_saved_as_it_is_now(tmp_path):
    model, x = make("mlp")
    small = torch_sluice.compress(model, x, [(x, None)], keep=0.3, quantize=False, progress=False).train()
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    small(x).square().mean().backward()
    optimizer.step()
    torch_sluice.compress.save(small, tmp_path / "x.pt")
    assert torch.equal(run(torch_sluice.compress.load(tmp_path / "x.pt", model), x), run(small.eval(), x))


def test_a_file_that_is_cut_off_or_foreign_is_refused(tmp_path):
    model, _, small = compressed("mlp")
    path, bad = tmp_path / "small.pt", tmp_path / "bad.pt"
    torch_sluice.compress.save(small, path)
    content = path.read_bytes()
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        bad.write_bytes(content[:size])
        with pytest.raises(ValueError, match="bad.pt cannot be read .* cut off, or no file of .* Save the model again"):
            torch_sluice.compress.load(bad, model)
    for foreign in (b"hello", b"\x89PNG\r\n" + bytes(200), b"PK\x03\x04" + bytes(100)):
        bad.write_bytes(foreign)
        with pytest.raises(ValueError, match="bad.pt cannot be read"):
            torch_sluice.compress.load(bad, model)
    torch.save(model.state_dict(), bad)
    with pytest.raises(ValueError, match="is no file of torch_sluice.compress.save"):
        torch_sluice.compress.load(bad, model)
    torch.save({"format": "torch-sluice compressed", "version": 99}, bad)
    with pytest.raises(ValueError, match="has version 99, expected 1: update torch-sluice"):
        torch_sluice.compress.load(bad, model)
    with pytest.raises(FileNotFoundError, match="none.pt is not a file"):
        torch_sluice.compress.load(tmp_path / "none.pt", model)


class Malice:
    def __reduce__(self):
        return os.system, ("echo executed",)


def test_no_code_of_a_file_is_run(tmp_path, capfd):
    for write in (lambda p: torch.save({"format": Malice()}, p), lambda p: p.write_bytes(pickle.dumps(Malice()))):
        write(tmp_path / "bad.pt")
        with pytest.raises(ValueError, match="cannot be read"):
            torch_sluice.compress.load(tmp_path / "bad.pt", mlp())
    assert "executed" not in capfd.readouterr().out


def test_a_file_of_another_model_is_refused(tmp_path):
    _, _, small = compressed("mlp")
    torch_sluice.compress.save(small, tmp_path / "x.pt")
    for other in (nn.Linear(3, 3), mlp(inputs=21), make("convolutions")[0]):
        with pytest.raises(
            ValueError, match=r"x.pt does not belong to this model .* Give the model that was compressed"
        ):
            torch_sluice.compress.load(tmp_path / "x.pt", other)
    with pytest.raises(TypeError, match="model gave a int"):
        torch_sluice.compress.load(tmp_path / "x.pt", lambda: 3)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("modules", {"0": {"kind": "os.system"}}),
        ("modules", {"nowhere": {"kind": "Identity"}}),
        ("sizes", {"0": {"forward": 3}}),
        ("tensors", {"nowhere.weight": {"kind": "parameter", "shape": [1]}}),
    ],
)
def test_changes_that_are_none_of_compression_are_refused(part, value, tmp_path):
    model, _, small = compressed("mlp")
    small.compression_report.changes[part] = value
    torch_sluice.compress.save(small, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="does not belong to this model"):
        torch_sluice.compress.load(tmp_path / "x.pt", model)


def test_a_report_of_another_version_does_not_keep_a_model_from_being_loaded(tmp_path):
    model, inputs, small = compressed("mlp")
    path = tmp_path / "small.pt"
    torch_sluice.compress.save(small, path)
    content = torch.load(path, weights_only=True)
    content["report"]["joules"] = 1.0
    content["report"]["layers"][0]["colour"] = "blue"
    torch.save(content, path)
    loaded = torch_sluice.compress.load(path, model)
    assert torch.equal(run(loaded, inputs), run(small, inputs))
    assert loaded.compression_report.as_dict() == small.compression_report.as_dict()
    del content["report"]["keep"]
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"has a report that cannot be read \(.*keep.*\): save the model again"):
        torch_sluice.compress.load(path, model)


def test_what_was_not_compressed_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="without a compression_report, expected what torch_sluice.compress"):
        torch_sluice.compress.save(mlp(), tmp_path / "x.pt")


LIMITED = """
import resource, sys, torch, torch_sluice
torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(20, 256), torch.nn.ReLU(), torch.nn.Linear(256, 20))
x = torch.randn(4, 20)
small = torch_sluice.compress(model, x, [(x, None)], keep=0.99, quantize=False, progress=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    torch_sluice.compress.save(small, sys.argv[1])
except OSError as error:
    print("OSError", error.errno)
"""


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """The limit on a file's size stands for the full disk: both make a write fail half way."""
    path = tmp_path / "small.pt"
    path.write_bytes(b"the old file")
    process = subprocess.run([sys.executable, "-c", LIMITED, path], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["OSError", "27"], process.stdout + process.stderr
    assert path.read_bytes() == b"the old file"
    assert os.listdir(tmp_path) == ["small.pt"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_a_failed_flush_leaves_the_old_file(tmp_path, monkeypatch):
    _, _, small = compressed("mlp")
    path = tmp_path / "small.pt"
    path.write_bytes(b"the old file")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        torch_sluice.compress.save(small, path)
    assert path.read_bytes() == b"the old file"
    assert os.listdir(tmp_path) == ["small.pt"]
