"""Tones to learn from: made waveforms, patches of them as latents, .wav files, and what a spectrum says of a tone.

Legend: B sounds, S samples at RATE, N = S / PATCH patches, which are PATCH channels of N latents.
"""

from __future__ import annotations

import math
import os
import wave

import torch
from torch import Tensor

from sd.files.atomic import atomic_write

RATE, PATCH = 8000, 32  # so a patch is one period of 250 Hz
PITCHES = range(1, 5)  # in periods of a patch: 250 to 1000 Hz
SOUNDS = {"sine": (1,), "octave": (2,), "square": (1, 3, 5, 7)}  # the harmonics that sound, each as loud as 1 / its number


def tones(sound: str, pitch: Tensor, phase: Tensor, samples: int) -> Tensor:
    """Waveforms [B, S], the lowest harmonic 0.8 loud. pitch [B]: whole periods of a patch, phase [B]: in turns.

    Harmonics that RATE cannot hold are left out.
    """
    n = torch.arange(samples, dtype=torch.float64)
    turns = pitch[:, None] * n / PATCH + phase[:, None]  # [B, S]
    sounds = torch.zeros_like(turns)
    for k in SOUNDS[sound]:
        audible = (k * pitch < PATCH / 2)[:, None]
        sounds += 0.8 * SOUNDS[sound][0] / k * torch.sin(2 * math.pi * k * turns) * audible
    return sounds.float()


def to_latents(wave: Tensor) -> Tensor:
    """[B, S] -> [B, PATCH, N], without a loss: what stable-audio-tools calls a patched pretransform."""
    return wave.unflatten(-1, (-1, PATCH)).mT.contiguous()


def to_wave(latents: Tensor) -> Tensor:
    """Inverse of `to_latents`."""
    return latents.mT.flatten(1)


def harmonics(wave: Tensor, pitch: int, highest: int = 7) -> Tensor:
    """Amplitudes [B, highest] of the fundamental and its harmonics, of whole patches [B, S]."""
    spectrum = torch.fft.rfft(wave.double()).abs() * 2 / wave.shape[-1]
    bins = pitch * wave.shape[-1] // PATCH * torch.arange(1, highest + 1)
    return torch.where(bins < spectrum.shape[-1], spectrum[:, bins.clamp(max=spectrum.shape[-1] - 1)], 0.0)


def write_wav(path: str | os.PathLike, samples: Tensor) -> None:
    """One waveform [S] in -1..1 as 16 bits, mono; the file is replaced at once or not at all."""
    with atomic_write(path) as file, wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RATE)
        sound.writeframes((samples.clamp(-1, 1) * 32767).round().short().numpy().tobytes())
