"""Writes clap.json, clap.safetensors and clap_features.safetensors, each with its .drawn.json: a tiny CLAP with random weights and its
vectors, and spectrograms of the published front end.

Run: pip install torch==2.15.0 transformers==5.24.0 safetensors numpy && python clap.py (some seconds)
Reference: ClapModel and ClapFeatureExtractor of transformers.

weights.NAME: the state of the model, drawn (drawn.py) but for places and counters
input_features.short [2, 1, 100, 8] (stretched by the model to 128 frames), input_features.whole [1, 1, 128, 8], drawn ->
audio_embeds.*
input_ids, attention_mask [3, 9] -> text_embeds [3, 12]
wave.short (0.3 s, repeated), wave.long (cut), drawn -> every third value of features.* [1, 101, 64], of one second at 48 kHz
"""

import json
import pathlib

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

import drawn

torch.manual_seed(3)
folder = pathlib.Path(__file__).parent
config = ClapConfig(
    text_config=dict(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
                     max_position_embeddings=20, projection_dim=12),
    audio_config=dict(window_size=4, num_mel_bins=8, spec_size=32, patch_size=2, patch_stride=[2, 2], hidden_size=32,
                      depths=[2, 3, 2], num_attention_heads=[1, 2, 4], patch_embeds_hidden_size=8, projection_dim=12,
                      num_hidden_layers=3),
    projection_dim=12,
)


def places(name, shape):
    """Wide enough that windows, shifts and biases of places can be seen in the result."""
    if name.startswith("logit_scale"):
        return [drawn.exponent(0.1), 2.625]
    if len(shape) > 1:
        return [drawn.exponent(1.0 if "table" in name else 0.3)]
    return [drawn.exponent(1.0)] if "running_mean" in name else drawn.usual(name, shape)


own = drawn.Drawn()
model = drawn.fill(ClapModel(config), own, "weights.", places).eval()

ids = torch.randint(3, 50, (3, 9))
mask = torch.ones(3, 9, dtype=torch.long)
for row, length in [(1, 5), (2, 1)]:
    ids[row, length:], mask[row, length:] = 1, 0
tensors = {"input_ids": ids, "attention_mask": mask}
inputs = {name: torch.from_numpy(own(f"input_features.{name}", shape, -6))
          for name, shape in [("short", (2, 1, 100, 8)), ("whole", (1, 1, 128, 8))]}
with torch.no_grad():
    for name in ("short", "whole"):
        out = model(input_ids=ids, attention_mask=mask, input_features=inputs[name])
        tensors[f"audio_embeds.{name}"] = out.audio_embeds
    tensors["text_embeds"] = out.text_embeds
print(out.audio_embeds, out.text_embeds)
tensors |= {f"weights.{name}": value.clone().contiguous() for name, value in model.state_dict().items()
            if f"weights.{name}" not in own.how}
save_file(tensors, folder / "clap.safetensors")
own.save(folder / "clap.drawn.json")
(folder / "clap.json").write_text(json.dumps(json.loads(config.to_json_string(use_diff=False)), indent=1) + "\n")

extract = ClapFeatureExtractor(frequency_min=50, frequency_max=14000, max_length_s=1, truncation="rand_trunc")
tensors, own = {}, drawn.Drawn()
for name, count in [("short", 14400), ("long", 60000)]:
    # 90 Hz to 11 kHz within a second, and noise of 0.01.
    wave = own(f"wave.{name}", (count,), drawn.exponent(0.01), 0, [[0, count, 2**23, 10000, 0, -15]])
    # The reference cuts at random; its first second is the one that is compared.
    cut = wave[:48000].astype(np.float64)
    features = extract(cut, sampling_rate=48000, return_tensors="np")["input_features"][0]
    assert features.shape == (1, 101, 64), features.shape
    tensors[f"features.{name}"] = torch.from_numpy(np.asarray(features, dtype=np.float32).flatten()[::3].copy())
save_file(tensors, folder / "clap_features.safetensors")
own.save(folder / "clap_features.drawn.json")
