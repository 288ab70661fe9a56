"""Writes av_align.safetensors and av_align.drawn.json: onsets of sounds and flow between frames.

Run: pip install librosa==0.11.0 opencv-python-headless==5.0.0.93 safetensors numpy && python av_align.py (some seconds)
Reference: librosa.onset.onset_strength and onset_detect with their defaults; cv2.calcOpticalFlowFarneback(pyr_scale 0.5, levels 3,
winsize 15, iterations 3, poly_n 5, poly_sigma 1.2), cv2.cartToPolar and cv2.mean.

wave.NAME [S] at 22050 Hz, drawn (drawn.py) -> strength.NAME [frames], onsets.NAME (frames that are onsets)
frames.NAME [3, H, W, 3] RGB bytes -> grey.NAME [3, H, W] bytes, flow.NAME [2, H, W, 2] (every third value), mean.NAME [2] mean magnitudes
score [S]: audio and video peaks, AV-Align of each case: see cases.audio, cases.video, cases.fps
"""

import pathlib

import cv2
import librosa
import numpy as np
from safetensors.numpy import save_file

import drawn

rng = np.random.default_rng(5)
RATE = 22050
tensors, own = {}, drawn.Drawn()


def burst(start, hertz, fade, exponent, rise=0):
    """A tone that fades within so many samples; noise, if it rises so fast that it passes all frequencies many times."""
    return [int(start * RATE), int(start * RATE) + fade, int(hertz / RATE * 2**32), rise, fade, exponent]


NOISE = 0x9E3779B1
waves = {
    "clicks": [int(1.9 * RATE), -16, 0, [burst(0.3, 600, 3000, -27), burst(0.85, 1500, 5000, -28), burst(1.4, 300, 8000, -28)]],
    "noise": [20000, drawn.exponent(0.02), 0, [burst(0.07, 0, 6000, -29, NOISE), burst(0.5, 0, 7000, -29, NOISE)]],
    "silence": [9000, None],
    "short": [700, None, 0, [[0, 700, int(500 / RATE * 2**32), 0, 0, -16]]],
}
for name, (count, *how) in waves.items():
    wave = own(f"wave.{name}", (count,), *how)
    strength = librosa.onset.onset_strength(y=wave, sr=RATE)
    onsets = librosa.onset.onset_detect(onset_envelope=strength, sr=RATE)
    print(name, strength.shape, onsets)
    tensors[f"strength.{name}"] = strength.astype(np.float32)
    tensors[f"onsets.{name}"] = onsets.astype(np.int64)


def scene(height, width, count, step):
    """A textured square that moves over a textured ground; the camera turns a little."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    frames = []
    for t in range(count):
        dx, dy = step[0] * t, step[1] * t
        ground = 120 + 60 * np.sin((x + 0.3 * t) / 5) * np.cos(y / 7)
        thing = 128 + 100 * np.sin((x - dx) / 2.5 + 1) * np.cos((y - dy) / 3.5)
        inside = (np.abs(x - width * 0.35 - dx) < width / 6) & (np.abs(y - height * 0.4 - dy) < height / 5)
        grey = np.where(inside, thing, ground)
        colour = np.stack([grey, 0.8 * grey + 20, 255 - grey], -1) + rng.normal(0, 2, (height, width, 3))
        frames.append(np.clip(colour, 0, 255).astype(np.uint8))
    return np.stack(frames)


def flow_of(first, second):
    return cv2.calcOpticalFlowFarneback(first, second, None, 0.5, 3, 15, 3, 5, 1.2, 0)


scenes = {
    "large": scene(72, 100, 3, (2.5, 1.0)),
    "odd": scene(67, 45, 3, (-1.5, 2.0)),
    "small": scene(24, 30, 3, (1.0, 0.0)),
    "tiny": scene(6, 9, 3, (1.0, 0.0)),
}
for name, frames in scenes.items():
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    flows = [flow_of(a, b) for a, b in zip(grey, grey[1:])]
    means = [cv2.mean(cv2.cartToPolar(flow[..., 0], flow[..., 1])[0])[0] for flow in flows]
    print(name, means)
    tensors[f"frames.{name}"] = frames
    if name in ("odd", "tiny"):
        tensors[f"grey.{name}"] = np.stack(grey)
        tensors[f"flow.{name}"] = np.stack(flows).astype(np.float32).flatten()[::3].copy()
    tensors[f"mean.{name}"] = np.asarray(means, dtype=np.float64)


def score(audio, video, fps):
    """The definition: onsets that have a peak of motion within one frame, over all events that are not shared."""
    matched = sum(any(peak - 1 / fps < onset < peak + 1 / fps for peak in video) for onset in audio)
    return matched / (len(audio) + len(video) - matched + 1e-6)


cases = [([0.3, 0.85, 1.4], [0.25, 0.875, 1.75], 8), ([0.5], [], 24), ([], [], 24), ([0.1, 0.11], [0.1], 12)]
for i, (audio, video, fps) in enumerate(cases):
    tensors[f"case.{i}.audio"] = np.asarray(audio, dtype=np.float64)
    tensors[f"case.{i}.video"] = np.asarray(video, dtype=np.float64)
    tensors[f"case.{i}.answer"] = np.asarray([fps, score(audio, video, fps)], dtype=np.float64)
save_file(tensors, pathlib.Path(__file__).with_suffix(".safetensors"))
own.save(pathlib.Path(__file__).with_suffix(".drawn.json"))
