"""An LSTM that hears the semitone of a tone, trained here: a small encoder of sound, as speaker encoders are.

It reads spectra of 9 overlapping windows of a frame. Tones are synthetic (benchmarks/models/tones.py); each part of the
data has its own seed.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.digits import accuracy
from benchmarks.models.task import Task, make_batches
from benchmarks.models.tones import FRAME, HIGHEST, LOWEST, draw_tones
from benchmarks.models.training import trained

WINDOW, HOP = 512, 64  # samples
BINS = WINDOW // 2 + 1
TONES = 1 + round(12 * math.log2(HIGHEST / LOWEST))
NOISE = (0.0, 30.0)  # dB
SIZES = (128, 192, 2)  # inputs and hidden units of the LSTM, layers
TRAINED = 64  # frames of a step
BATCH = 8


class PitchEncoder(nn.Module):
    """Logits [B, TONES] of spectra [B, T, BINS]: a linear layer, an LSTM, and a head on its last hidden state."""

    def __init__(self, width: int, hidden: int, layers: int):
        super().__init__()
        self.project = nn.Linear(BINS, width)
        self.lstm = nn.LSTM(width, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, TONES)

    def forward(self, spectra: Tensor) -> Tensor:
        hidden, _ = self.lstm(F.relu(self.project(spectra)))
        return self.head(hidden[:, -1])


def draw_spectra(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Log-magnitude spectra [count, T, BINS], T = 9, and the nearest semitones above LOWEST, int64 [count]."""
    frames, pitch = draw_tones(count, torch.Generator().manual_seed(seed), NOISE)
    windows = frames.unfold(1, WINDOW, HOP) * torch.hann_window(WINDOW)
    assert windows.shape[1] == (FRAME - WINDOW) // HOP + 1
    return torch.fft.rfft(windows).abs().add(0.1).log(), (12 * (pitch / LOWEST).log2()).round().long()


def load(quick: bool = False) -> Task:
    """The task; trains the model the first time (a cached file after that). ``quick``: a toy."""
    sizes, steps, rate = ((32, 32, 1), 200, 1e-2) if quick else (SIZES, 800, 2e-3)

    def loss(model, step):
        spectra, tones = draw_spectra(TRAINED, 1_000_000 + step)
        return F.cross_entropy(model(spectra), tones)

    model = trained("pitch", f"{sizes} {WINDOW} {HOP} {NOISE}", lambda: PitchEncoder(*sizes), loss, steps, rate)
    counts = (64, 64) if quick else (768, 1024)
    selection, heldout = (draw_spectra(count, seed) for seed, count in enumerate(counts))
    return Task(
        name="pitch",
        title=f"LSTM of {sizes[2]} layers and {sizes[1]} units, semitones of frames of 64 ms, trained here",
        metric_name="accuracy",
        model=model,
        selection=make_batches(*selection, BATCH),
        heldout=make_batches(*heldout, BATCH),
        metric=accuracy,
        draw_inputs=lambda batch: heldout[0][:batch].clone(),
        train_step=lambda model, step: loss(model, 500_000 + step),
        train_steps=10 if quick else 200,
        learning_rate=1e-3,
        notes=[f"pitch: synthetic tones with vibrato and noise of {NOISE[0]:g} to {NOISE[1]:g} dB"],
    )
