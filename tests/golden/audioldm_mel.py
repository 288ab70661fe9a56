"""Writes audioldm_mel.safetensors and audioldm_mel.drawn.json: the log-mel spectrogram of a short sound as AudioLDM's codec takes it, without gain normalisation.

Run: pip install librosa==0.11.0 safetensors numpy && python audioldm_mel.py (some seconds)
Reference: librosa's stft and mel filters.

wave [9000]: 16 kHz, drawn (drawn.py); mel [57, 64]
"""

import pathlib

import librosa
import numpy as np
from safetensors.numpy import save_file

import drawn

own = drawn.Drawn()
# A tone that rises from 650 Hz, between noise of less than 0.001.
wave = own("wave", (9000,), -18, 0, [[1600, 7000, 174483046, 40000, 0, -15]])
magnitude = np.abs(librosa.stft(wave.astype(np.float64), n_fft=1024, hop_length=160, pad_mode="reflect", dtype=np.complex128))
bank = librosa.filters.mel(sr=16000, n_fft=1024, n_mels=64, fmin=0, fmax=8000, dtype=np.float64)
mel = np.log(np.maximum(bank @ magnitude, 1e-5)).T
save_file({"mel": np.ascontiguousarray(mel, dtype=np.float32)}, pathlib.Path(__file__).with_suffix(".safetensors"))
own.save(pathlib.Path(__file__).with_suffix(".drawn.json"))
