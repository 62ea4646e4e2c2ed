"""Synthetic tones: waveforms, their patches as latents, .wav files, and the amplitudes of harmonics.

Legend: B sounds, S samples at RATE, N = S / PATCH patches, i.e. N latents with PATCH channels.
"""

from __future__ import annotations

import math
import os
import wave

import torch
from torch import Tensor

from sd.files.atomic import atomic_write

RATE, PATCH = 8000, 32  # a patch is one period of 250 Hz
PITCHES = range(1, 5)  # in periods per patch: 250 to 1000 Hz
SOUNDS = {"sine": (1,), "octave": (2,), "square": (1, 3, 5, 7)}  # harmonics of each sound, with amplitudes 1 / their number


def tones(sound: str, pitch: Tensor, phase: Tensor, samples: int) -> Tensor:
    """Waveforms [B, S] whose lowest harmonic has amplitude 0.8. pitch [B]: periods per patch, phase [B]: in turns.

    Harmonics above the Nyquist frequency are left out.
    """
    n = torch.arange(samples, dtype=torch.float64)
    turns = pitch[:, None] * n / PATCH + phase[:, None]  # [B, S]
    sounds = torch.zeros_like(turns)
    for k in SOUNDS[sound]:
        audible = (k * pitch < PATCH / 2)[:, None]
        sounds += 0.8 * SOUNDS[sound][0] / k * torch.sin(2 * math.pi * k * turns) * audible
    return sounds.float()


def to_latents(wave: Tensor) -> Tensor:
    """[B, S] -> [B, PATCH, N], lossless: the patched pretransform of stable-audio-tools."""
    return wave.unflatten(-1, (-1, PATCH)).mT.contiguous()


def to_wave(latents: Tensor) -> Tensor:
    """Inverse of `to_latents`."""
    return latents.mT.flatten(1)


def harmonics(wave: Tensor, pitch: int, highest: int = 7) -> Tensor:
    """Amplitudes [B, highest] of the fundamental and its harmonics in whole patches [B, S]."""
    spectrum = torch.fft.rfft(wave.double()).abs() * 2 / wave.shape[-1]
    bins = pitch * wave.shape[-1] // PATCH * torch.arange(1, highest + 1)
    return torch.where(bins < spectrum.shape[-1], spectrum[:, bins.clamp(max=spectrum.shape[-1] - 1)], 0.0)


def write_wav(path: str | os.PathLike, samples: Tensor) -> None:
    """Write a waveform [S] in -1..1 as 16-bit mono, atomically."""
    with atomic_write(path) as file, wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RATE)
        sound.writeframes((samples.clamp(-1, 1) * 32767).round().short().numpy().tobytes())
