"""The text that is trained on and the text that is held out."""

import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_sluice.train.data import load_corpus
from torch_sluice.train.errors import TrainError


def _files(text):
    return bytes(text).split(b"\0")


def test_default_text_is_the_standard_library_and_holds_out_what_it_does_not_train_on():
    corpus = load_corpus(None, 4096)
    assert corpus.name.startswith("the standard library of Python 3.")
    assert len(corpus.train) > 1e6
    train, heldout = _files(corpus.train), _files(corpus.heldout)
    assert (len(train), len(heldout)) == (corpus.train_files, corpus.heldout_files)
    assert not set(train) & set(heldout)
    assert corpus.train_files / corpus.heldout_files == pytest.approx(7, rel=0.1)
    with open(os.__file__, "rb") as file:
        assert (file.read() in train) != (file.read() in heldout)


@pytest.fixture
def mixed_folder(tmp_path):
    """40 good files of which one is a copy, and everything else that a folder may hold."""
    (tmp_path / "inner").mkdir()
    for number in range(40):
        folder = tmp_path / "inner" if number % 2 else tmp_path
        (folder / f"{number}.txt").write_text(f"<{number}> some text, ü\n" * (number + 5))
    (tmp_path / "copy.txt").write_bytes((tmp_path / "0.txt").read_bytes())
    (tmp_path / "empty").write_bytes(b"\n \n")
    (tmp_path / "latin").write_bytes("für".encode("latin-1"))
    (tmp_path / "binary").write_bytes(b"ab\0cd")
    (tmp_path / ".hidden").write_text("<hidden>")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("<hidden>")
    (tmp_path / "broken link").symlink_to(tmp_path / "nowhere")
    return tmp_path


def test_folder_of_good_and_bad_files(mixed_folder):
    corpus = load_corpus(str(mixed_folder), 32)
    train, heldout = _files(corpus.train), _files(corpus.heldout)
    assert sorted(train + heldout) == sorted(f"<{n}> some text, ü\n".encode() * (n + 5) for n in range(40))
    assert (
        (corpus.train_files, corpus.heldout_files, corpus.skipped_files) == (len(train), len(heldout), 4) == (35, 5, 4)
    )
    again = load_corpus(str(mixed_folder), 32)
    assert again.fingerprint == corpus.fingerprint
    (mixed_folder / "5.txt").write_text("other text")
    assert load_corpus(str(mixed_folder), 32).fingerprint != corpus.fingerprint


def test_file_that_may_not_be_read(mixed_folder, monkeypatch):
    read = Path.read_bytes

    def refuse(path):  # root may read everything, so the system is not asked
        if path.name == "2.txt":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert load_corpus(str(mixed_folder), 32).skipped_files == 5
    with pytest.raises(TrainError, match=r"2\.txt', which cannot be read: Permission denied"):
        load_corpus(str(mixed_folder / "2.txt"), 32)


def test_names_that_are_no_utf8(tmp_path):
    folder = os.fsencode(tmp_path) + b"/n\xff"
    os.mkdir(folder)
    for number in range(3):
        Path(os.fsdecode(folder + b"/%d\xff.txt" % number)).write_text(f"text {number} " * 40)
    corpus = load_corpus(os.fsdecode(folder), 32)
    assert (corpus.train_files, corpus.heldout_files) == (2, 1)
    assert corpus.name.encode() == os.fsencode(tmp_path) + "/n\ufffd".encode()


def test_single_file_is_cut_at_its_last_eighth(tmp_path):
    text = bytes(range(1, 128)) * 8
    (tmp_path / "text").write_bytes(text)
    corpus = load_corpus(str(tmp_path / "text"), 32)
    assert bytes(corpus.train) + bytes(corpus.heldout) == text
    assert len(corpus.heldout) == len(text) // 8


def test_batches_are_pieces_of_the_training_text(mixed_folder):
    corpus = load_corpus(str(mixed_folder), 32)
    batch = corpus.batch(seed=3, step=5, micro=1, size=20, context=32)
    assert batch.shape == (20, 33)
    assert batch.dtype == torch.int64
    train = bytes(corpus.train)
    assert all(bytes(row.tolist()) in train for row in batch)
    assert torch.equal(batch, corpus.batch(3, 5, 1, 20, 32))
    for other in ((4, 5, 1), (3, 6, 1), (3, 5, 0)):
        assert not torch.equal(batch, corpus.batch(*other, 20, 32))


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (7, 7), (1000, 31)])
def test_heldout_windows_do_not_overlap(mixed_folder, count, expected):
    positions = dataclasses.replace(load_corpus(str(mixed_folder), 32), heldout=np.arange(1000))
    windows = positions.heldout_windows(count, 32)
    assert windows.shape == (expected, 33)
    starts = windows[:, 0]
    assert torch.equal(windows, starts[:, None] + torch.arange(33))
    assert (starts.diff() >= 32).all()
