"""Writes panns.safetensors and panns.drawn.json: a narrow Cnn14 at 16 kHz with random weights, its log-mel spectrogram, embedding and
logits.

Run: pip install torch==2.15.0 librosa==0.11.0 safetensors numpy && python panns.py (some seconds)
Reference: librosa's stft, mel filters and power_to_db, torch.nn layers; the network is written out below from its description.

weights.NAME: tensors with the names of the published checkpoint, drawn (drawn.py) but for counters
wave [16100]: 16 kHz, drawn; every third value of mel [101, 64]; embedding [1, 14]; logits [1, 11]
"""

import pathlib

import librosa
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import drawn

RATE = 16000
WIDTHS = [3, 4, 5, 6, 7, 8]

own = drawn.Drawn()
# A tone of 440 Hz from 0.3 s on, and noise.
wave = own("wave", (16100,), drawn.exponent(0.02), 0, [[4800, 16100, 118111601, 0, 0, -15]])
spectrum = np.abs(librosa.stft(wave.astype(np.float64), n_fft=512, hop_length=160, pad_mode="reflect", dtype=np.complex128)) ** 2
bank = librosa.filters.mel(sr=RATE, n_fft=512, n_mels=64, fmin=50, fmax=8000, dtype=np.float64)
mel = librosa.power_to_db(bank @ spectrum, ref=1.0, amin=1e-10, top_db=None).T
mel = np.ascontiguousarray(mel, dtype=np.float32)


class Block(nn.Module):
    def __init__(self, inner, outer):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)

    def forward(self, x, pool):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.avg_pool2d(x, pool)


class Cnn14(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(64)
        for i, (inner, outer) in enumerate(zip([1] + WIDTHS, WIDTHS), 1):
            setattr(self, f"conv_block{i}", Block(inner, outer))
        self.fc1 = nn.Linear(WIDTHS[-1], 14)
        self.fc_audioset = nn.Linear(14, 11)

    def forward(self, x):
        x = self.bn0(x[:, None].transpose(1, 3)).transpose(1, 3)
        for i in range(1, 7):
            x = getattr(self, f"conv_block{i}")(x, (2, 2) if i < 6 else (1, 1))
        x = torch.mean(x, dim=3)
        x = torch.max(x, dim=2).values + torch.mean(x, dim=2)
        embedding = F.relu(self.fc1(x))
        return embedding, self.fc_audioset(embedding)




def places(name, shape):
    """Of the first norm as the decibels of a spectrogram are."""
    if name == "bn0.running_mean":
        return [drawn.exponent(0.1), -40]
    return [drawn.exponent(20.0), 100] if name == "bn0.running_var" else drawn.usual(name, shape, 2**0.5)


model = drawn.fill(Cnn14(), own, "weights.", places).eval()
with torch.no_grad():
    embedding, logits = model(torch.from_numpy(mel)[None])
print(embedding, logits)
tensors = {"mel": torch.from_numpy(mel.flatten()[::3].copy()), "embedding": embedding, "logits": logits}
tensors |= {f"weights.{name}": value for name, value in model.state_dict().items() if f"weights.{name}" not in own.how}
save_file(tensors, pathlib.Path(__file__).with_suffix(".safetensors"))
own.save(pathlib.Path(__file__).with_suffix(".drawn.json"))
