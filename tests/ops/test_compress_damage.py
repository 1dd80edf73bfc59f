"""Files of compressed models that are damaged, cut off, forged or foreign: refused, before anything large is made."""

import dataclasses
import hashlib
import json
import os
import pickle
import random
import resource

import pytest
import torch
from torch import nn

import torch_sluice
from torch_sluice.compress import container, quantize_layer
from torch_sluice.compress.changes import describe_changes
from torch_sluice.compress.report import CompressionReport


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).eval().requires_grad_(False)


def small():
    compressed = model()
    quantize_layer(compressed[0])
    compressed.compression_report = report(describe_changes(model(), compressed))
    return compressed


def report(changes):
    """One in which every figure is 1."""
    required = [field.name for field in dataclasses.fields(CompressionReport) if is_required(field)]
    return CompressionReport(**dict.fromkeys(required, 1), changes=changes)


def is_required(field):
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "small"
    torch_sluice.compress.save(small(), path)
    return path


def load(path):
    return torch_sluice.compress.load(path, model)


def test_what_is_whole_is_loaded(saved):
    x = torch.randn(3, 8)
    assert torch.equal(load(saved)(x), small()(x))


def test_every_flipped_bit_is_refused(saved, tmp_path):
    content, bad = bytearray(saved.read_bytes()), tmp_path / "bad"
    for place in range(len(content)):
        for bit in range(8) if place < 64 else [random.Random(place).randrange(8)]:
            content[place] ^= 1 << bit
            bad.write_bytes(content)
            with pytest.raises(ValueError, match=r"bad (cannot be read|has version|is no file|is an archive)"):
                load(bad)
            content[place] ^= 1 << bit


def test_every_cut_and_every_addition_is_refused(saved, tmp_path):
    content, bad = saved.read_bytes(), tmp_path / "bad"
    for size in [*range(64), *range(64, len(content), 97), len(content) - 1]:
        bad.write_bytes(content[:size])
        with pytest.raises(ValueError, match="bad cannot be read .* damaged or cut off.* Save the model again"):
            load(bad)
    for more in (b"\0", b"x" * 1000):
        bad.write_bytes(content + more)
        with pytest.raises(ValueError, match="bad cannot be read"):
            load(bad)


class Malice:
    def __reduce__(self):
        return os.system, ("echo executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "bad cannot be read"),
        (b"\x89PNG\r\n" + bytes(200), "bad cannot be read"),
        (b"PK\x03\x04" + bytes(100), "bad is an archive of torch.save, as files of version 1 were; expected version 2"),
        (pickle.dumps(Malice()), "bad cannot be read"),
        ((10).to_bytes(8, "little") + b"[" * 10, "bad cannot be read .its header is no JSON"),
        ((100000).to_bytes(8, "little") + b"[" * 100000, "bad cannot be read .its header is no JSON"),
        ((2).to_bytes(8, "little") + b"[]", "its header is no JSON object"),
        ((2).to_bytes(8, "little") + b"{}", "is no file of torch_sluice.compress.save"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "its header is not within its length"),
    ],
)
def test_foreign_files_are_refused(content, message, tmp_path, capfd):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "bad")
    assert "executed" not in capfd.readouterr().out


def test_files_of_torch_and_of_safetensors_are_refused(tmp_path):
    torch.save(model().state_dict(), tmp_path / "bad")
    with pytest.raises(ValueError, match="is an archive of torch.save"):
        load(tmp_path / "bad")
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(model().state_dict(), tmp_path / "bad")
    with pytest.raises(ValueError, match="is no file of torch_sluice.compress.save"):
        load(tmp_path / "bad")
    with pytest.raises(FileNotFoundError, match="none is not a file"):
        load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load(tmp_path)


def forge(path, change):
    """A file with another header and a digest that is right for it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    structure = json.loads(header["__metadata__"]["structure"])
    change(header, structure)
    header["__metadata__"] |= {"structure": json.dumps(structure), "sha256": "0" * 64}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    forged = bytearray(len(raw).to_bytes(8, "little") + raw + content[8 + length :])
    place = container._place_of_digest(forged, 8 + len(raw))
    forged[place : place + 64] = hashlib.sha256(forged).hexdigest().encode()
    path.write_bytes(forged)


def test_a_forged_file_is_loaded_if_nothing_is_wrong_with_it(saved):
    forge(saved, lambda header, structure: structure["report"].update(more=1))
    load(saved)


HUGE = 1 << 14


def claim(where, shape):
    def change(header, structure):
        if where == "header":
            header["2.weight"]["shape"] = shape
            header["2.weight"]["data_offsets"][1] += 4 * HUGE * HUGE
        elif where == "weight":
            structure["changes"]["weights"][0]["shape"] = shape
        else:
            structure["changes"]["tensors"]["2.weight"] = {"kind": where, "shape": shape}

    return change


@pytest.mark.parametrize("where", ["header", "weight", "parameter", "buffer"])
@pytest.mark.parametrize("shape", [[HUGE, HUGE], [1 << 40, 1 << 40], [-1, 5]])
def test_a_file_that_names_a_huge_layer_makes_none(where, shape, saved):
    forge(saved, claim(where, shape))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="cannot be read|does not belong to this model"):
        load(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB; the layer would take 1 GB


@pytest.mark.parametrize(
    "change",
    [
        lambda header, structure: header["__metadata__"].update(version="3"),
        lambda header, structure: header["__metadata__"].update(format="else"),
        lambda header, structure: structure.pop("changes"),
        lambda header, structure: structure.update(changes=[]),
        lambda header, structure: structure["changes"].pop("weights"),
        lambda header, structure: structure["changes"].update(weights=3),
        lambda header, structure: structure["changes"].update(weights=[{}]),
        lambda header, structure: structure["changes"].update(sizes=[1]),
        lambda header, structure: structure["changes"]["weights"][0].update(kind="x"),
        lambda header, structure: structure["changes"]["weights"][0].update(places=["1.weight"]),
        lambda header, structure: structure["changes"]["weights"][0].update(places=["2.weight"]),
        lambda header, structure: structure["changes"]["weights"][0].update(places=[3]),
        lambda header, structure: structure["changes"]["weights"][0].update(dtype="int8"),
        lambda header, structure: structure["changes"]["weights"][0].update(dtype="nn"),
        lambda header, structure: structure["changes"]["weights"][0].update(target_sqnr="x"),
        lambda header, structure: structure["changes"]["weights"][0].update(weight_bits=4),
        lambda header, structure: structure["changes"]["weights"][0].update(more=32),
        lambda header, structure: structure.update(aliases={"2.bias": "nowhere"}),
        lambda header, structure: structure.update(extra={"more": 1}),
        lambda header, structure: structure["report"].pop("layers"),
        lambda header, structure: header.update({"more": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
        lambda header, structure: header.update({"2.other": header.pop("2.bias")}),
    ],
)
def test_a_forged_structure_is_refused_in_words(change, saved):
    forge(saved, change)
    with pytest.raises(ValueError, match=r"small (has version|is no file|cannot be read|does not belong|has a report)"):
        load(saved)
