"""Writes bert.safetensors: a tiny random BertModel of transformers, its inputs and its outputs.

Run: pip install torch transformers safetensors && python bert.py
Reference: transformers.BertModel, f32, eager attention; versions go into the metadata of the file.
"""

import pathlib

import torch
import transformers
from safetensors.torch import save_file

torch.manual_seed(0)
config = transformers.BertConfig(
    vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
    max_position_embeddings=17, type_vocab_size=2, hidden_act="gelu", layer_norm_eps=1e-12,
)
config._attn_implementation = "eager"
model = transformers.BertModel(config, add_pooling_layer=False).eval()
with torch.no_grad():
    for parameter in model.parameters():
        # Wider than the usual start, so that every term of the formula shows in the output.
        parameter.add_(0.3 * torch.randn_like(parameter))
    input_ids = torch.randint(0, 61, (3, 9))
    attention_mask = torch.ones(3, 9, dtype=torch.long)
    attention_mask[1, 5:] = 0
    attention_mask[2, 1:] = 0
    state = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

tensors = {f"bert.{name}": value.contiguous() for name, value in model.state_dict().items()}
tensors = {name: value for name, value in tensors.items() if value.is_floating_point()}
tensors |= {"input_ids": input_ids, "attention_mask": attention_mask, "last_hidden_state": state}
versions = {"transformers": transformers.__version__, "torch": torch.__version__}
save_file(tensors, pathlib.Path(__file__).with_name("bert.safetensors"), metadata=versions)
