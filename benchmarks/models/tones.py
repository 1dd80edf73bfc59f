"""Tones of known pitch: harmonic signals with vibrato and noise, in frames of 1024 samples at 16 kHz."""

import math

import torch
from torch import Tensor

RATE = 16000  # samples a second
FRAME = 1024  # samples
LOWEST, HIGHEST = 55.0, 1600.0  # Hz


def draw_tones(
    count: int, generator: torch.Generator, noise: tuple[float, float] = (-6.0, 24.0)
) -> tuple[Tensor, Tensor]:
    """Frames [count, 1024], each of mean 0 and deviation 1 as CREPE wants them, and their pitches [count] in Hz.

    The pitch is what the tone has in the frame's middle; vibrato of 4 to 8 Hz and up to 40 cents goes round it. A third
    of the tones have odd partials only, a third lack their fundamental; partials fall off by a random power. White
    noise is added at a ratio, in dB, drawn from ``noise``.
    """

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    pitch = LOWEST * (HIGHEST / LOWEST) ** torch.rand(count, generator=generator)
    time = (torch.arange(FRAME) - FRAME / 2) / RATE
    vibrato_rate, depth, start = uniform(4, 8), uniform(0, 40), uniform(0, 2 * math.pi)
    swing = torch.sin(2 * math.pi * vibrato_rate[:, None] * time + start[:, None]) - torch.sin(start)[:, None]
    frequency = pitch[:, None] * 2 ** (depth[:, None] * swing / 1200)
    phase = 2 * math.pi * torch.cumsum(frequency / RATE, 1)
    number = torch.arange(1, 17)
    amplitude = number ** -uniform(0.3, 2.0, 1) * uniform(0.3, 1.0, len(number))
    kind = torch.randint(3, (count,), generator=generator)[:, None]
    amplitude = amplitude * ((kind != 1) | (number % 2 == 1)) * ((kind != 2) | (number > 1))
    amplitude = amplitude * (number * pitch[:, None] < 0.45 * RATE)
    offset = uniform(0, 2 * math.pi, len(number))
    signal = torch.zeros(count, FRAME)
    for n in range(len(number)):
        signal += amplitude[:, n, None] * torch.sin(number[n] * phase + offset[:, n, None])
    power = signal.square().mean(1, keepdim=True)
    deviation = (power * 10 ** (-uniform(*noise, 1) / 10)).sqrt()
    frames = signal + deviation * torch.randn(count, FRAME, generator=generator)
    frames = frames - frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True).clamp(min=1e-10), pitch
