"""Writes audioldm_mel.safetensors: the log-mel spectrogram of a short sound as AudioLDM's codec takes it, without gain normalisation.

Run: pip install librosa==0.11.0 safetensors numpy && python audioldm_mel.py (some seconds)
Reference: librosa's stft and mel filters.

wave [9000]: 16 kHz, f16; mel [57, 64]
"""

import pathlib

import librosa
import numpy as np
from safetensors.numpy import save_file

rng = np.random.default_rng(7)
time = np.arange(9000) / 16000
wave = 0.3 * np.sin(2 * np.pi * (150 + 2500 * time) * time) * (time > 0.1) + 0.01 * rng.normal(size=time.size)
wave[7000:] = 0
wave = wave.astype(np.float16)
magnitude = np.abs(librosa.stft(wave.astype(np.float64), n_fft=1024, hop_length=160, pad_mode="reflect", dtype=np.complex128))
bank = librosa.filters.mel(sr=16000, n_fft=1024, n_mels=64, fmin=0, fmax=8000, dtype=np.float64)
mel = np.log(np.maximum(bank @ magnitude, 1e-5)).T
save_file({"wave": wave, "mel": np.ascontiguousarray(mel, dtype=np.float32)}, pathlib.Path(__file__).with_suffix(".safetensors"))
