"""Writes i3d.safetensors and i3d.drawn.json: a narrow I3D with random weights and its logits.

Run: pip install torch==2.15.0 safetensors numpy && python i3d.py (a minute)
Reference: torch.nn.functional.conv3d, max_pool3d and batch_norm; the network is written out below from its description (padding
"SAME" of TensorFlow computed for each layer, zeros around maxima). Clips are waves that the test makes too.

weights.NAME: tensors with the names of the published checkpoint, drawn (drawn.py)
logits.T: [1, 10], mean over time, of the clip of T frames
"""

import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import drawn

torch.set_num_threads(2)
CLASSES = 10
BLOCKS = {
    "3b": (64, 96, 128, 16, 32, 32), "3c": (128, 128, 192, 32, 96, 64), "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64), "4d": (128, 128, 256, 24, 64, 64), "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128), "5b": (256, 160, 320, 32, 128, 128), "5c": (384, 192, 384, 48, 128, 128),
}
weights, own = {}, drawn.Drawn()


def weight(name, shape, gain=1.0):
    how = drawn.usual(name, shape, gain)
    weights[name] = torch.from_numpy(own(f"weights.{name}", [int(size) for size in shape], *how))


def narrow(width):
    return max(width // 16, 1)


def same_padding(shape, kernel, stride):
    sides = []
    for size, k, s in zip(shape, kernel, stride):
        total = max(k - s, 0) if size % s == 0 else max(k - size % s, 0)
        sides.append((total // 2, total - total // 2))
    return [side for pair in reversed(sides) for side in pair]


def unit(x, name, out, kernel, stride=(1, 1, 1)):
    key = f"{name}.conv3d.weight"
    if key not in weights:
        weight(key, (out, x.shape[1], *kernel), 2**0.5)
        for part in ("weight", "bias", "running_mean", "running_var"):
            weight(f"{name}.bn.{part}", (out,))
    x = F.conv3d(F.pad(x, same_padding(x.shape[2:], kernel, stride)), weights[key], stride=stride)
    norm = [weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return F.relu(F.batch_norm(x, *norm, training=False, eps=1e-5))


def pool(x, kernel, stride):
    return F.max_pool3d(F.pad(x, same_padding(x.shape[2:], kernel, stride)), kernel, stride)


def mixed(x, block):
    widths = [narrow(width) for width in BLOCKS[block]]
    name = f"Mixed_{block}"
    one, three = (1, 1, 1), (3, 3, 3)
    b0 = unit(x, f"{name}.b0", widths[0], one)
    b1 = unit(unit(x, f"{name}.b1a", widths[1], one), f"{name}.b1b", widths[2], three)
    b2 = unit(unit(x, f"{name}.b2a", widths[3], one), f"{name}.b2b", widths[4], three)
    b3 = unit(pool(x, three, one), f"{name}.b3b", widths[5], one)
    return torch.cat([b0, b1, b2, b3], 1)


def network(x):
    x = unit(x, "Conv3d_1a_7x7", narrow(64), (7, 7, 7), (2, 2, 2))
    x = pool(x, (1, 3, 3), (1, 2, 2))
    x = unit(x, "Conv3d_2b_1x1", narrow(64), (1, 1, 1))
    x = unit(x, "Conv3d_2c_3x3", narrow(192), (3, 3, 3))
    x = pool(x, (1, 3, 3), (1, 2, 2))
    for block in BLOCKS:
        if block == "4b":
            x = pool(x, (3, 3, 3), (2, 2, 2))
        if block == "5b":
            x = pool(x, (2, 2, 2), (2, 2, 2))
        x = mixed(x, block)
    x = F.avg_pool3d(x, (2, 7, 7), 1)
    if "logits.conv3d.weight" not in weights:
        weight("logits.conv3d.weight", (CLASSES, x.shape[1], 1, 1, 1))
        weight("logits.conv3d.bias", (CLASSES,))
    x = F.conv3d(x, weights["logits.conv3d.weight"], weights["logits.conv3d.bias"])
    return x[:, :, :, 0, 0].mean(2)


def clip(frames):
    c, t, y, x = np.meshgrid(np.arange(3), np.arange(frames), np.arange(224), np.arange(224), indexing="ij")
    values = np.sin(0.07 * x + 0.11 * y + 0.9 * t + 2.0 * c) * np.cos(0.013 * x * (t + 1))
    return torch.from_numpy(values.astype(np.float32))[None]


with torch.no_grad():
    outputs = {f"logits.{frames}": network(clip(frames)) for frames in (9, 16)}
print({name: value.flatten().tolist() for name, value in outputs.items()})
save_file(outputs, pathlib.Path(__file__).with_suffix(".safetensors"))
own.save(pathlib.Path(__file__).with_suffix(".drawn.json"))
