"""Writes clap.json, clap.safetensors and clap_features.safetensors: a tiny CLAP with random weights and its vectors, and
spectrograms of its front end.

Run: pip install torch==2.15.0 transformers==5.24.0 safetensors numpy && python clap.py (some seconds)
Reference: ClapModel and ClapFeatureExtractor of transformers.

weights.NAME: the state of the model, f16
input_features.short [2, 1, 100, 8] (stretched by the model to 128 frames), input_features.whole [1, 1, 128, 8] -> audio_embeds.*
input_ids, attention_mask [3, 9] -> text_embeds [3, 12]
wave.short (0.3 s, repeated), wave.long (cut) -> features.* [1, 101, 32], of one second at 16 kHz; waves are f16
"""

import json
import pathlib

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

torch.manual_seed(3)
rng = np.random.default_rng(3)
folder = pathlib.Path(__file__).parent
config = ClapConfig(
    text_config=dict(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
                     max_position_embeddings=20, projection_dim=12),
    audio_config=dict(window_size=4, num_mel_bins=8, spec_size=32, patch_size=2, patch_stride=[2, 2], hidden_size=32,
                      depths=[2, 3, 2], num_attention_heads=[1, 2, 4], patch_embeds_hidden_size=8, projection_dim=12,
                      num_hidden_layers=3),
    projection_dim=12,
)
model = ClapModel(config).eval()
for name, value in model.named_parameters():
    if value.ndim > 1:
        # Wide enough that windows, shifts and biases of places can be seen in the result.
        value.data = torch.randn_like(value) * (1.0 if "table" in name else 0.3)
    elif not name.startswith("logit_scale"):
        value.data = (1.0 if name.endswith("weight") else 0.0) + 0.2 * torch.randn_like(value)
norm = model.audio_model.audio_encoder.batch_norm
norm.running_mean = torch.randn(8)
norm.running_var = 0.5 + torch.rand(8)
for value in model.state_dict().values():
    if value.is_floating_point():
        value.copy_(value.half().float())

ids = torch.randint(3, 50, (3, 9))
mask = torch.ones(3, 9, dtype=torch.long)
for row, length in [(1, 5), (2, 1)]:
    ids[row, length:], mask[row, length:] = 1, 0
tensors = {"input_ids": ids, "attention_mask": mask}
tensors["input_features.short"] = torch.randn(2, 1, 100, 8) * 2
tensors["input_features.whole"] = torch.randn(1, 1, 128, 8) * 2
with torch.no_grad():
    for name in ("short", "whole"):
        out = model(input_ids=ids, attention_mask=mask, input_features=tensors[f"input_features.{name}"])
        tensors[f"audio_embeds.{name}"] = out.audio_embeds
    tensors["text_embeds"] = out.text_embeds
print(out.audio_embeds, out.text_embeds)
tensors |= {f"weights.{name}": (value.half() if value.is_floating_point() else value.clone()).contiguous() for name, value in model.state_dict().items()}
save_file(tensors, folder / "clap.safetensors")
(folder / "clap.json").write_text(json.dumps(json.loads(config.to_json_string(use_diff=False)), indent=1) + "\n")

extract = ClapFeatureExtractor(feature_size=32, sampling_rate=16000, hop_length=160, frequency_min=50, frequency_max=7000, max_length_s=1, truncation="rand_trunc")
time = np.arange(20000) / 16000
wave = (0.4 * np.sin(2 * np.pi * 1500 * time * time) + 0.01 * rng.normal(size=time.size)).astype(np.float16)
tensors = {}
for name, own in [("short", wave[:4800]), ("long", wave)]:
    # The reference cuts at random; its first second is the one that is compared.
    cut = own[:16000].astype(np.float64)
    features = extract(cut, sampling_rate=16000, return_tensors="np")["input_features"][0]
    tensors[f"wave.{name}"] = torch.from_numpy(own)
    tensors[f"features.{name}"] = torch.from_numpy(np.asarray(features, dtype=np.float32))
save_file(tensors, folder / "clap_features.safetensors")
