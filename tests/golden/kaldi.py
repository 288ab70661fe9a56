"""Writes kaldi.safetensors: Kaldi's filterbank and band-limited resampling, as torchaudio computes them.

Run: pip install torch==2.15.0 torchaudio==2.11.1 numpy safetensors && python kaldi.py (a second)
Reference: torchaudio.compliance.kaldi.fbank and torchaudio.functional.resample, with the settings of ImageBind.

wave.NAME, fbank.NAME: samples at 16 kHz, and [frames, 128] of those samples less their mean
rate.FROM.TO.in, rate.FROM.TO.out: samples at one rate and at another
"""

import pathlib

import numpy as np
import torch
import torchaudio
from safetensors.torch import save_file

rng = np.random.default_rng(11)
tensors = {}


def wave(n, rate=16000):
    t = np.arange(n) / rate
    sweep = 0.4 * np.sin(2 * np.pi * (120 * t + 900 * t * t)) + 0.1 * np.sin(2 * np.pi * 3300 * t)
    return torch.tensor(sweep * np.exp(-t) + rng.normal(0, 0.01, n), dtype=torch.float32)


def fbank(samples):
    samples = (samples - samples.mean()).unsqueeze(0)
    return torchaudio.compliance.kaldi.fbank(
        samples, htk_compat=True, sample_frequency=16000, use_energy=False, window_type="hanning", num_mel_bins=128,
        dither=0.0, frame_length=25, frame_shift=10)


waves = {
    "sweep": wave(2811),
    "shortest": wave(400),
    "tone": torch.tensor(0.5 * np.sin(2 * np.pi * 1000 * np.arange(560) / 16000), dtype=torch.float32),
    "loud": torch.tensor(rng.uniform(-1, 1, 1205), dtype=torch.float32),
    "silent": torch.zeros(720),
}
for name, samples in waves.items():
    tensors[f"wave.{name}"] = samples
    tensors[f"fbank.{name}"] = fbank(samples).contiguous()
for source, target, n in [(44100, 16000, 1105), (48000, 16000, 501), (22050, 16000, 497), (8000, 16000, 500),
                          (32000, 16000, 3), (11025, 16000, 333), (16000, 48000, 301)]:
    samples = wave(n, source)
    tensors[f"rate.{source}.{target}.in"] = samples
    tensors[f"rate.{source}.{target}.out"] = torchaudio.functional.resample(samples, source, target).contiguous()
save_file(tensors, pathlib.Path(__file__).with_suffix(".safetensors"))
