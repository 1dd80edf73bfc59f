"""Checkpoints of a run on a mesh: written under one, read under another, and refused when they are damaged."""

import shutil

import pytest
from support.mesh import SHORT, train_on_mesh, write_text

from torch_sluice.train.errors import TrainError
from torch_sluice.train.mesh.checkpoint import newest_checkpoint, read_state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def run_on_mesh(*arguments):
    return train_on_mesh(*arguments)


@pytest.fixture(scope="module")
def saved(ranks, folder, tmp_path_factory):
    """The folder of a run that was saved after three steps under dp=2,tp=2, and its losses so far."""
    out = tmp_path_factory.mktemp("run")
    results = ranks(4).run(run_on_mesh, folder, SHORT, dict(dp=2, tp=2), 3, None, out)
    return out, results[0][0]


def test_a_run_goes_on_under_other_meshes_as_if_nothing_had_happened(ranks, folder, saved, tmp_path):
    uninterrupted = ranks(2).run(run_on_mesh, folder, SHORT, dict(tp=2))[0][0]
    first, losses = saved
    second = tmp_path / "second"
    losses = losses + ranks(2).run(run_on_mesh, folder, SHORT, dict(pp=2), 5, first, second)[0][0]
    assert newest_checkpoint(second).name == "step-00000005"
    losses += ranks(2).run(run_on_mesh, folder, SHORT, dict(dp=2, data_parallel="fsdp"), None, second)[0][0]
    assert losses == pytest.approx(uninterrupted, rel=1e-6)


def expect_refusal(folder, run, options, words):
    with pytest.raises(TrainError) as caught:
        train_on_mesh(folder, SHORT, options, None, run)
    assert words in str(caught.value)


@pytest.mark.parametrize("harm", ["changed", "cut", "missing", "metadata"])
def test_damaged_files_are_refused_on_all_ranks(ranks, folder, saved, tmp_path, harm):
    run = tmp_path / "run"
    shutil.copytree(saved[0], run)
    path = newest_checkpoint(run)
    file = path / (".metadata" if harm == "metadata" else "__2_0.distcp")
    data = bytearray(file.read_bytes())
    if harm == "missing":
        file.unlink()
    elif harm == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    words = f"{file.name} is {'missing' if harm == 'missing' else 'not what was written'}"
    ranks(2).run(expect_refusal, folder, run, dict(tp=2), words)


def test_another_model_is_refused_on_all_ranks(ranks, folder, saved):
    ranks(2).run(expect_another_model_refused, folder, saved[0])


def expect_another_model_refused(folder, run):
    import dataclasses

    with pytest.raises(TrainError, match="is damaged or is not one"):
        train_on_mesh(folder, dataclasses.replace(SHORT, width=32), dict(tp=2), None, run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "which holds no checkpoint; give the --out folder of an earlier run"),
        ("", r"is damaged or is not one \(run.json: "),
        ('{"format": "another"}', "its format is 'another', expected"),
        ('{"format": "torch-sluice train --mesh, version 1"}', "run.json: 'settings'"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
        (tmp_path / "checkpoints/step-00000001/run.json").write_text(text)
    with pytest.raises(TrainError, match=message):
        read_state(tmp_path)
