"""Writes vggish.safetensors and vggish.drawn.json: a narrow VGGish with random weights, its log-mel patches and vectors of a sound of
2.1 s.

Run: pip install torch==2.15.0 safetensors numpy && python vggish.py (a second)
Reference: torch.nn layers and numpy.fft; front end and network are written out below from their description.

weights.NAME: tensors with the names of the published checkpoint, drawn (drawn.py)
wave [33600]: 16 kHz, drawn; every fifth value of patches [2, 96, 64]; vectors [2, 12]
"""

import pathlib

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import drawn

RATE = 16000
CHANNELS = [3, 5, 6, 7, 8, 9]
LINEAR = [24, 20, 12]

# A tone that rises from 200 Hz, a short one at 4 kHz that fades, and one that rises from 1.5 kHz; little noise between them.
own = drawn.Drawn()
wave = own("wave", (int(2.1 * RATE),), -16, 0, [
    [0, 8000, 53687091, 12000, 0, -15], [12000, 33600, 400000000, 20000, 0, -15], [9000, 9400, 2**30, 0, 400, -25]])


def mel(hertz):
    return 1127.0 * np.log(1.0 + hertz / 700.0)


def log_mel(wave):
    count = 1 + (len(wave) - 400) // 160
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = np.stack([wave[i * 160:i * 160 + 400].astype(np.float64) * window for i in range(count)])
    magnitude = np.abs(np.fft.rfft(frames, 512))
    bins = mel(np.linspace(0.0, RATE / 2, 257))
    edges = np.linspace(mel(125.0), mel(7500.0), 66)
    matrix = np.zeros((257, 64))
    for band in range(64):
        low, centre, high = edges[band:band + 3]
        matrix[:, band] = np.maximum(0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
    matrix[0] = 0
    return np.log(magnitude @ matrix + 0.01)


mels = log_mel(wave)
patches = np.stack([mels[i * 96:(i + 1) * 96] for i in range(len(mels) // 96)]).astype(np.float32)

layers, inner = [], 1
for width, pools in zip(CHANNELS, [1, 1, 0, 1, 0, 1]):
    layers += [nn.Conv2d(inner, width, 3, padding=1), nn.ReLU()]
    layers += [nn.MaxPool2d(2, 2)] if pools else []
    inner = width
features = nn.Sequential(*layers)
first, second, last = LINEAR
embeddings = nn.Sequential(nn.Linear(6 * 4 * inner, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, last))
for prefix, module in [("features", features), ("embeddings", embeddings)]:
    drawn.fill(module, own, f"weights.{prefix}.", lambda name, shape: drawn.usual(name, shape, 2**0.5))
with torch.no_grad():
    x = features(torch.from_numpy(patches)[:, None])
    # [B, C, time, band] to (time, band, channel).
    x = torch.transpose(torch.transpose(x, 1, 3), 1, 2).reshape(len(patches), -1)
    vectors = embeddings(x)
tensors = {"patches": torch.from_numpy(patches.flatten()[::5].copy()), "vectors": vectors}
save_file(tensors, pathlib.Path(__file__).with_suffix(".safetensors"))
own.save(pathlib.Path(__file__).with_suffix(".drawn.json"))
