"""Writes frames.safetensors and frames.drawn.json: frames of three sizes as the inputs of I3D.

Run: pip install torch==2.15.0 safetensors numpy && python frames.py (a second)
Reference: torch.nn.functional.interpolate(mode="bilinear", align_corners=False).

frames.NAME [T, H, W, 3] bytes, drawn (drawn.py); every third value of usual.NAME, javisbench.NAME [1, 3, T, 16, 16]
"""

import math
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import drawn

SIZE = 16


def prepare(x):
    """Frames [T, 3, H, W] of values from 0 to 1."""
    height, width = x.shape[2:]
    scale = SIZE / min(height, width)
    target = (SIZE, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), SIZE)
    x = F.interpolate(x, size=target, mode="bilinear", align_corners=False)
    top, left = (x.shape[2] - SIZE) // 2, (x.shape[3] - SIZE) // 2
    return (x[:, :, top:top + SIZE, left:left + SIZE] * 2 - 1).permute(1, 0, 2, 3).flatten()[::3].contiguous()


tensors, own = {}, drawn.Drawn()
for name, shape in [("wide", (3, 37, 50, 3)), ("tall", (2, 41, 24, 3)), ("small", (2, 9, 12, 3))]:
    plain = torch.from_numpy(own(f"frames.{name}", shape, "u8")).permute(0, 3, 1, 2).double() / 255
    tensors[f"usual.{name}"] = prepare(plain.float())
    height, width = shape[1:3]
    side = max(height, width)
    square = torch.zeros(shape[0], 3, side, side, dtype=torch.float64)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, :, top:top + height, left:left + width] = plain
    upper = ((square + 1) * 127.5).to(torch.uint8).float() / 255
    tensors[f"javisbench.{name}"] = prepare(upper)
save_file(tensors, pathlib.Path(__file__).with_suffix(".safetensors"))
own.save(pathlib.Path(__file__).with_suffix(".drawn.json"))
