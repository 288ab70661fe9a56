"""Writes views.safetensors and views.drawn.json: the fifteen views of small videos that ImageBind compares with sounds and texts.

Run: pip install torch==2.15.0 numpy safetensors && python views.py (a second)
Reference: torch.nn.functional.interpolate; clips and crops as the paper's code takes them from videos, written out below.

CASE.frames: [frames, height, width, 3] u8 at 6 frames a second, drawn (drawn.py); CASE.views: every fifth value of [15, 3, 2, side, side]
"""

import math
import pathlib
from fractions import Fraction

import torch
from safetensors.torch import save_file

import drawn

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1, 1)
DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1, 1)


def views(frames, fps, side):
    total = len(frames)
    last = max(Fraction(total) / Fraction(fps) - 2, 0)
    out = []
    for k in range(5):
        start = last * k / 4
        first, end = math.ceil(fps * start), min(math.ceil(fps * (start + 2)), total)
        clip = frames[first:end]
        clip = clip[torch.linspace(0, len(clip) - 1, 2).long()]
        clip = clip.permute(3, 0, 1, 2).float() / 255
        height, width = clip.shape[2:]
        if width < height:
            size = (int(math.floor(float(height) / width * side)), side)
        else:
            size = (side, int(math.floor(float(width) / height * side)))
        clip = torch.nn.functional.interpolate(clip, size=size, mode="bilinear", align_corners=False)
        clip = (clip - MEAN) / DEVIATION
        high, wide = size
        for crop in range(3):
            top, left = math.ceil((high - side) / 2), math.ceil((wide - side) / 2)
            if high > wide:
                top = [0, top, high - side][crop]
            else:
                left = [0, left, wide - side][crop]
            out.append(clip[:, :, top:top + side, left:left + side])
    return torch.stack(out)


def main():
    tensors, own = {}, drawn.Drawn()
    for case, count, height, width, side in [("wide", 27, 11, 18, 8), ("high", 20, 13, 9, 12), ("square", 5, 10, 10, 7)]:
        frames = torch.from_numpy(own(f"{case}.frames", (count, height, width, 3), "u8"))
        tensors[f"{case}.views"] = views(frames, 6, side).flatten()[::5].contiguous()
    save_file(tensors, pathlib.Path(__file__).with_suffix(".safetensors"))
    own.save(pathlib.Path(__file__).with_suffix(".drawn.json"))


if __name__ == "__main__":
    main()
