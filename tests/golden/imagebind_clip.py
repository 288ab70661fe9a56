"""Writes imagebind_clip.safetensors and imagebind_clip.drawn.json: what ImageBind makes of a whole clip, and its scores.

Run: pip install torch==2.15.0 torchaudio==2.11.1 pillow==13.0.0 numpy safetensors && python imagebind_clip.py (seconds)
Reference: the network of imagebind.py with the weights of imagebind_tiny; views as views.py takes them, pictures by Pillow, the
filterbank of torchaudio, sounds as the paper's code takes clips from them, written out below.

frames: [33, 20, 28, 3] u8 at 6 frames a second, wave: [5 s, 2 channels] at 16 kHz in steps of 2^-15, both drawn (drawn.py)
seen: vectors of the frames as still pictures; heard: the mean of three clips of the first channel; video: the mean of fifteen views
avhscore: mean cosine of seen and heard; av: cosine of video and heard
"""

import json
import pathlib
from fractions import Fraction

import torch
import torchaudio
from PIL import Image
from safetensors.torch import load_file, save_file

import drawn
import imagebind
import views

HERE = pathlib.Path(__file__).parent
SIDE, FPS, RATE = 35, 6, 16000


def still(frame):
    """The shorter side to SIDE, the square in the middle, less the mean and by the deviation."""
    image = Image.fromarray(frame.numpy())
    width, height = image.size
    scale = SIDE / min(width, height)
    wide, high = (SIDE, int(height * scale)) if width <= height else (int(width * scale), SIDE)
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = round((wide - SIDE) / 2), round((high - SIDE) / 2)
    pixels = torch.tensor(list(image.crop((left, top, left + SIDE, top + SIDE)).tobytes())).view(SIDE, SIDE, 3)
    return (pixels.permute(2, 0, 1).float() / 255 - views.MEAN[..., 0]) / views.DEVIATION[..., 0]


def sounds(channel):
    """Three clips of two seconds as pictures of the filterbank."""
    last = max(Fraction(len(channel), RATE) - 2, 0)
    out = []
    for k in range(3):
        start = last * k / 2
        clip = channel[int(start * RATE):int((start + 2) * RATE)]
        bank = torchaudio.compliance.kaldi.fbank(
            (clip - clip.mean()).unsqueeze(0), htk_compat=True, sample_frequency=RATE, use_energy=False,
            window_type="hanning", num_mel_bins=128, dither=0.0, frame_length=25, frame_shift=10).T
        bank = torch.nn.functional.pad(bank, (0, max(0, 204 - bank.shape[1])))[:, :204]
        out.append(((bank + 4.268) / 9.138).unsqueeze(0))
    return torch.stack(out)


def main():
    model = imagebind.model(imagebind.TINY).eval()
    how = json.loads((HERE / "imagebind_tiny/drawn.json").read_text())
    state = {name: torch.from_numpy(drawn.draw(name, *one)) for name, one in how.items()}
    state |= load_file(HERE / "imagebind_tiny/rest.safetensors")
    missing, _ = model.load_state_dict(state, strict=False)
    assert not missing, missing
    own = drawn.Drawn()
    frames = torch.from_numpy(own("frames", (33, 20, 28, 3), "u8"))
    # Seconds that differ: a rising tone, then a steady one, and noise below both.
    rise = [[0, 70000, 2**26, 600, 0, -15], [70000, 160000, 2**28, 0, 0, -15]]
    wave = torch.from_numpy(own("wave", (80000, 2), -15, 0, rise))
    with torch.no_grad():
        seen = imagebind.embed(model, "vision", torch.stack([still(frame) for frame in frames]))
        heard = imagebind.embed(model, "audio", sounds(wave[:, 0].contiguous()).unsqueeze(0))[0]
        video = imagebind.embed(model, "vision", views.views(frames, FPS, SIDE).unsqueeze(0))[0]
    cosine = torch.nn.functional.cosine_similarity
    tensors = {"seen": seen, "heard": heard, "video": video, "avhscore": cosine(seen, heard[None], eps=1e-6).mean(),
               "av": cosine(video, heard, dim=0, eps=1e-6)}
    print(tensors["avhscore"], tensors["av"])
    save_file({name: value.contiguous() for name, value in tensors.items()}, HERE / "imagebind_clip.safetensors")
    own.save(HERE / "imagebind_clip.drawn.json")


if __name__ == "__main__":
    main()
