"""Saving and loading compressed models: no half file on the disk, what is saved of which model, clear errors."""

import copy
import functools
import os
import resource
import subprocess
import sys

import pytest
import torch
from support.compress_models import MODELS, call_all_faster, make, mlp
from support.quantized_layers import Tied
from torch import nn

pytest.importorskip("transformers")

import torch_sluice
from torch_sluice.compress import quantization, storage
from torch_sluice.compress.calling import call_model, float_outputs
from torch_sluice.compress.changes import describe_changes


def run(model, inputs):
    with torch.no_grad():
        return float_outputs(call_model(model, inputs))[0]


@pytest.fixture(autouse=True)
def every_layer_is_faster(monkeypatch):
    monkeypatch.setattr(quantization, "_time_in_place", call_all_faster)


def compressed(name):
    return copy.deepcopy(compress_once(name))


@functools.cache
def compress_once(name):
    model, inputs = make(name)
    return model, inputs, torch_sluice.compress(model, inputs, [(inputs, None)], keep=0.3, progress=False)


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_model_gets_the_shapes_and_values_of_the_saved_one(name, tmp_path):
    model, inputs, small = compressed(name)
    path = tmp_path / "small.safetensors"
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
    ("part", "value", "message"),
    [
        ("modules", {"0": {"kind": "os.system"}}, "of kind .* is none that compression makes"),
        ("modules", {"nowhere": {"kind": "Identity"}}, "the model has no module 'nowhere'"),
        ("modules", {"0": 3}, "of kind 3 is none"),
        ("sizes", {"0": {"forward": 3}}, "an attribute 'forward' of '0' is no size of it"),
        ("sizes", {"0": {"training": 1}}, "an attribute 'training' of '0' is no size of it"),
        ("sizes", {"0": {"in_features": [3]}}, "an attribute 'in_features' of '0' is no size of it"),
        ("sizes", {"0": {"in_features": "3"}}, "an attribute 'in_features' of '0' is no size of it"),
        ("sizes", {"0": {"in_features": 1.5}}, "an attribute 'in_features' of '0' is no size of it"),
        ("sizes", {"0": {"__class__": 3}}, "an attribute '__class__' of '0' is no size of it"),
        ("sizes", {"0": 3}, ""),
        ("tensors", {"nowhere.weight": {"kind": "parameter", "shape": [1]}}, "the model has no module 'nowhere'"),
        ("tensors", {"0.bias": {"kind": "parameter", "shape": [10**6]}}, "0.bias has shape .* and is said to have"),
        ("tensors", {"0.forward": {"kind": "parameter", "shape": [10**6]}}, "0.forward is a method in the model"),
        ("tensors", {"0.bias": {}}, ""),
        ("original", {}, "its 0.weight has shape"),
    ],
)
def test_changes_that_are_none_of_compression_are_refused(part, value, message, tmp_path):
    model, _, small = compressed("mlp")
    small.compression_report.changes[part] = value
    torch_sluice.compress.save(small, tmp_path / "x")
    with pytest.raises(ValueError, match=f"x does not belong to this model .*{message}"):
        torch_sluice.compress.load(tmp_path / "x", model)


def test_a_report_of_another_version_does_not_keep_a_model_from_being_loaded(tmp_path, monkeypatch):
    model, inputs, small = compressed("mlp")
    path, plain = tmp_path / "small.safetensors", small.compression_report.as_dict()
    changed = {**plain, "joules": 1.0, "layers": [{**layer, "colour": "blue"} for layer in plain["layers"]]}
    monkeypatch.setattr(type(small.compression_report), "as_dict", lambda self: changed)
    torch_sluice.compress.save(small, path)
    monkeypatch.undo()
    loaded = torch_sluice.compress.load(path, model)
    assert torch.equal(run(loaded, inputs), run(small, inputs))
    assert loaded.compression_report.as_dict() == plain
    del changed["keep"]
    monkeypatch.setattr(type(small.compression_report), "as_dict", lambda self: changed)
    torch_sluice.compress.save(small, path)
    with pytest.raises(ValueError, match=r"has a report that cannot be read \(.*keep.*\): save the model again"):
        torch_sluice.compress.load(path, model)


class Sized(nn.Module):
    """Keeps sizes under names of its own, as attention of others does."""

    def __init__(self, width=64):
        super().__init__()
        self.my_width, self._shape, self.sizes, self.label = width, (width, 2), [width], "x"
        self.inner, self.head = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x):
        return self.head(self.inner(x).view(-1, *self._shape[:1]).view(-1, self.my_width).view(-1, *self.sizes))


def test_sizes_are_kept_whatever_their_names(tmp_path):
    torch.manual_seed(0)
    model, x = Sized().eval(), torch.randn(4, 8)
    small = torch_sluice.compress(model, x, [(x, None)] * 4, keep=0.5, prune=False, progress=False)
    cut = Sized(48).eval()
    for name, parameter in cut.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(small.get_submodule(owner), leaf, parameter)
    small.my_width, small._shape, small.sizes = cut.my_width, cut._shape, cut.sizes
    small.compression_report.changes = describe_changes(model, small)
    assert small.compression_report.changes["sizes"] == {"": {"my_width": 48, "_shape": [48, 2], "sizes": [48]}}
    torch_sluice.compress.save(small, tmp_path / "x")
    again = torch_sluice.compress.load(tmp_path / "x", model)
    assert (again.my_width, again._shape, again.sizes) == (48, (48, 2), [48])
    assert torch.equal(run(again, x), run(small, x))


@pytest.mark.parametrize("where", ["model", "layer"])
def test_a_compiled_model_is_saved_as_what_it_wraps(where, tmp_path):
    model, x, small = compressed("mlp")
    expected = run(small, x)
    wrapped = torch.compile(small, backend="eager")
    if where == "layer":
        small[0] = torch.compile(small[0], backend="eager")
        wrapped = small
    torch_sluice.compress.save(wrapped, tmp_path / "x")
    assert torch.equal(run(torch_sluice.compress.load(tmp_path / "x", model), x), expected)


def test_tied_weights_are_stored_once(tmp_path):
    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(300, (4, 5))
    small = torch_sluice.compress(model, ids, [(ids, None)] * 2, keep=0.5, prune=False, progress=False)
    torch_sluice.compress.save(small, tmp_path / "x")
    again = torch_sluice.compress.load(tmp_path / "x", Tied())
    assert again.head.weight is again.embed.weight
    assert torch.equal(run(again, ids), run(small, ids))
    assert (tmp_path / "x").stat().st_size < 304 * 40 + 48 * 40 + 10000  # the table once, in bytes, and the header
    small.embed.weight = small.head.weight = nn.Parameter(small.head.weight.unpack(), requires_grad=False)
    torch_sluice.compress.save(small, tmp_path / "x")
    again = torch_sluice.compress.load(tmp_path / "x", Tied())
    assert again.head.weight is again.embed.weight
    assert torch.equal(run(again, ids), run(small, ids))
    assert (tmp_path / "x").stat().st_size < 4 * 300 * 40 + 48 * 40 + 10000


def test_state_that_is_no_tensor_is_saved_if_it_is_plain(tmp_path):
    class Counting(nn.Linear):
        extra = None

        def get_extra_state(self):
            return self.extra

        def set_extra_state(self, state):
            self.read = state

    model, x = nn.Sequential(Counting(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(4, 8)
    model[0].extra = {"calls": 3, "names": ["a"]}
    small = torch_sluice.compress(model, x, [(x, None)] * 2, keep=0.5, prune=False, progress=False)
    torch_sluice.compress.save(small, tmp_path / "x")
    assert torch_sluice.compress.load(tmp_path / "x", model)[0].read == {"calls": 3, "names": ["a"]}
    small[0].extra = {1, 2}
    with pytest.raises(ValueError, match="a set at '0._extra_state', expected tensors and plain values"):
        torch_sluice.compress.save(small, tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_options_of_quantised_weights_are_saved_as_they_are_now(tmp_path):
    model, x, small = compressed("mlp")
    small[0].weight.set_target_sqnr(55.0)
    torch_sluice.compress.save(small, tmp_path / "x")
    again = torch_sluice.compress.load(tmp_path / "x", model)
    assert again[0].weight.options == small[0].weight.options
    assert torch.equal(run(again, x), run(small, x))


@pytest.mark.filterwarnings("ignore")
def test_a_model_whose_hooks_compute_weights_is_loaded(tmp_path):
    """Its weight is no leaf, which deepcopy refuses."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.utils.weight_norm(nn.Linear(20, 32)), nn.ReLU(), nn.Linear(32, 5)), torch.randn(4, 20)
    small = torch_sluice.compress(model, x, [(x, None)], keep=0.9, progress=False)
    torch_sluice.compress.save(small, tmp_path / "x")
    assert torch.equal(run(torch_sluice.compress.load(tmp_path / "x", model), x), run(small, x))


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
    path = tmp_path / "small.safetensors"
    path.write_bytes(b"the old file")
    process = subprocess.run([sys.executable, "-c", LIMITED, path], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["OSError", "27"], process.stdout + process.stderr
    assert path.read_bytes() == b"the old file"
    assert os.listdir(tmp_path) == ["small.safetensors"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_a_failed_flush_leaves_the_old_file(tmp_path, monkeypatch):
    _, _, small = compressed("mlp")
    path = tmp_path / "small.safetensors"
    path.write_bytes(b"the old file")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        torch_sluice.compress.save(small, path)
    assert path.read_bytes() == b"the old file"
    assert os.listdir(tmp_path) == ["small.safetensors"]
