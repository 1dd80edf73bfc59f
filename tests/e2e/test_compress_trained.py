"""The models that are trained for the benchmark of compressed models, at sizes that say nothing."""

import importlib

import pytest
import torch
import torch.nn.functional as F

import torch_sluice
from benchmarks.models import pitch, t5, tones
from benchmarks.models.task import MissingPackageError, call
from benchmarks.models.training import trained

NAMES = ("gpt2", "t5", "pitch", "vit")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads a task once, from a cache of its own."""
    tasks, folder = {}, tmp_path_factory.mktemp("cache")

    def load(name):
        if name not in tasks:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(folder))
                try:
                    tasks[name] = importlib.import_module(f"benchmarks.models.{name}").load(quick=True)
                except MissingPackageError as reason:
                    pytest.skip(str(reason))
        return tasks[name]

    return load


def rows(batches):
    first = [inputs[0] if isinstance(inputs, tuple) else inputs for inputs, _ in batches]
    return {row.numpy().tobytes() for batch in first for row in batch}


@pytest.mark.parametrize("name", NAMES)
def test_parts_share_nothing_and_the_metric_can_fail(load, name):
    task = load(name)
    selection, heldout = rows(task.selection), rows(task.heldout)
    assert len(selection) > 15
    assert selection.isdisjoint(heldout)
    inputs = task.draw_inputs(3)
    out = call(task.model, inputs)
    assert len(out) == 3
    assert out.isfinite().all()
    assert 0 < task.metric(task.model, task.heldout) < 1
    for turn, expected in ((0, 1.0), (1, 0.0)):
        answers = iter([target for _, target in task.heldout])
        told = task.metric(
            lambda *_, answers=answers, turn=turn: F.one_hot((next(answers) + turn) % 256, 256), task.heldout
        )
        assert told == expected


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_where_it_was(load, name):
    task = load(name)
    with torch.no_grad():
        first, again, other = (task.train_step(task.model, step).item() for step in (0, 0, 1))
    assert first == pytest.approx(again, rel=1e-5)
    assert first != other


@pytest.mark.parametrize("name", NAMES)
def test_they_are_compressed(load, name):
    pytest.importorskip("torch_pruning", reason="pip install 'torch-sluice[compress]'")
    task = load(name)
    compressed = torch_sluice.compress(
        task.model, task.draw_inputs(1), task.selection, keep=0.5, threads=1, progress=False
    )
    report = compressed.compression_report
    assert report.bytes_after < 0.9 * report.bytes_before, report
    assert call(compressed, task.draw_inputs(5)).shape == call(task.model, task.draw_inputs(5)).shape


def test_training_lowers_the_loss_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    steps = []

    def loss(model, step):
        steps.append(step)
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    model = trained("line", "a", lambda: torch.nn.Linear(3, 1), loss, 60, rate=0.1)
    assert steps == list(range(60))
    assert not model.training
    assert loss(model, 1000).item() < 0.05
    again = trained("line", "a", lambda: torch.nn.Linear(3, 1), loss, 60, rate=0.1)
    assert len(steps) == 61
    assert torch.equal(model.weight, again.weight)
    trained("line", "b", lambda: torch.nn.Linear(3, 1), loss, 60, rate=0.1)
    assert len(steps) == 121


def test_a_quarter_of_the_bytes_is_covered():
    texts = torch.randint(32, 127, (50, 40), generator=torch.Generator().manual_seed(0))
    covered, before = t5.cover(texts, torch.Generator().manual_seed(0))
    gone = covered == t5.COVERED
    assert 0.2 < gone.float().mean() < 0.3
    assert torch.equal(covered[~gone], texts[~gone])
    assert (before[:, 0] == t5.START).all()
    assert torch.equal(before[:, 1:], texts[:, :-1])


def test_semitones_are_those_of_the_tones():
    spectra, semitones = pitch.draw_spectra(32, 7)
    assert spectra.shape == (32, 9, pitch.BINS)
    frames, hertz = tones.draw_tones(32, torch.Generator().manual_seed(7), pitch.NOISE)
    assert semitones.min() >= 0
    assert semitones.max() < pitch.TONES
    cents = 1200 * (hertz / (tones.LOWEST * 2 ** (semitones / 12))).log2()
    assert cents.abs().max() <= 50.01
    window = frames[0, :512] * torch.hann_window(512)
    assert torch.allclose(spectra[0, 0], torch.fft.rfft(window).abs().add(0.1).log(), atol=1e-4)
