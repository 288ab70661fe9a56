"""Writes kaldi.safetensors and kaldi.drawn.json: Kaldi's filterbank and band-limited resampling, as torchaudio computes them.

Run: pip install torch==2.15.0 torchaudio==2.11.1 numpy safetensors && python kaldi.py (a second)
Reference: torchaudio.compliance.kaldi.fbank and torchaudio.functional.resample, with the settings of ImageBind.

wave.NAME, fbank.NAME: samples at 16 kHz, drawn (drawn.py), and [frames, 128] of those samples less their mean
rate.FROM.TO.in, rate.FROM.TO.out: samples at one rate and at another
"""

import pathlib

import numpy as np
import torch
import torchaudio
from safetensors.torch import save_file

import drawn

rng = np.random.default_rng(11)
tensors, own = {}, drawn.Drawn()


def wave(n, rate=16000):
    t = np.arange(n) / rate
    sweep = 0.4 * np.sin(2 * np.pi * (120 * t + 900 * t * t)) + 0.1 * np.sin(2 * np.pi * 3300 * t)
    return torch.tensor(sweep * np.exp(-t) + rng.normal(0, 0.01, n), dtype=torch.float32)


def fbank(samples):
    samples = (samples - samples.mean()).unsqueeze(0)
    return torchaudio.compliance.kaldi.fbank(
        samples, htk_compat=True, sample_frequency=16000, use_energy=False, window_type="hanning", num_mel_bins=128,
        dither=0.0, frame_length=25, frame_shift=10)


# A falling tone that rises from 120 Hz, with another of 3.3 kHz; tones alone, noise alone, nothing.
sweep = [[0, 6111, 32212255, 241592, 8000, -28], [0, 6111, 885837004, 0, 0, -17]]
waves = {
    "sweep": [6111, drawn.exponent(0.01), 0, sweep],
    "shortest": [400, drawn.exponent(0.01), 0, sweep],
    "tone": [560, None, 0, [[0, 560, 2**28, 0, 0, -15]]],
    "loud": [1205, -8],
    "silent": [720, None],
}
for name, (count, *how) in waves.items():
    tensors[f"fbank.{name}"] = fbank(torch.from_numpy(own(f"wave.{name}", (count,), *how))).contiguous()
for source, target, n in [(44100, 16000, 2205), (48000, 16000, 1001), (22050, 16000, 997), (8000, 16000, 500),
                          (32000, 16000, 3), (11025, 16000, 333), (16000, 48000, 301)]:
    samples = wave(n, source)
    tensors[f"rate.{source}.{target}.in"] = samples
    tensors[f"rate.{source}.{target}.out"] = torchaudio.functional.resample(samples, source, target).contiguous()
save_file(tensors, pathlib.Path(__file__).with_suffix(".safetensors"))
own.save(pathlib.Path(__file__).with_suffix(".drawn.json"))
