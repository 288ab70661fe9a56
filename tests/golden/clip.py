"""Writes clip_quick/, clip_gelu/, clip_text/, clip_vision/ and clip.safetensors: small random CLIP models, and what they make of inputs.

Run: pip install torch==2.15.0 transformers==5.24.0 safetensors && python clip.py (seconds)
Reference: CLIPModel, CLIPTextModel and CLIPVisionModelWithProjection of transformers.

MODEL.NAME: inputs and outputs by their names there; embeddings of a whole CLIPModel have length one
"""

import pathlib

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPVisionModelWithProjection

HERE = pathlib.Path(__file__).parent
torch.manual_seed(7)
tensors = {}


def config(act, eos, head):
    text = dict(vocab_size=61, hidden_size=4 * head, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=13, hidden_act=act, eos_token_id=eos, bos_token_id=58, pad_token_id=1)
    vision = dict(hidden_size=3 * head, intermediate_size=44, num_hidden_layers=3, num_attention_heads=3, image_size=30,
                  patch_size=6, hidden_act=act)
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=14)


def lively(model):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + torch.randn_like(p) * (0.2 if p.dim() == 1 else 0.12)).half().float())
    return model.eval()


def save(model, name):
    """Writes the weights, which f16 holds, as f16."""
    model.half().save_pretrained(HERE / f"clip_{name}")
    model.float()


def ids(n, length, eos):
    ids, mask = torch.ones(n, length, dtype=torch.int64), torch.zeros(n, length, dtype=torch.int64)
    for i in range(n):
        words = int(torch.randint(0, length - 1, ())) if i else length - 2
        ids[i, 0] = 58
        ids[i, 1:1 + words] = torch.randint(2, 58, (words,))
        ids[i, 1 + words] = eos
        mask[i, :2 + words] = 1
    return ids, mask


def keep(name, **values):
    for key, value in values.items():
        value = value.half() if key == "pixel_values" else value
        tensors[f"{name}.{key}"] = value.detach().contiguous()


for name, act, eos, end, head in [("quick", "quick_gelu", 2, 60, 6), ("gelu", "gelu", 59, 59, 5)]:
    model = lively(CLIPModel(config(act, eos, head)))
    save(model, name)
    input_ids, mask = ids(3, 13, end)
    if eos == 59:
        input_ids[1, 1] = 60
    pixels = torch.randn(2, 3, 30, 30).half().float()
    with torch.no_grad():
        out = model(input_ids=input_ids, pixel_values=pixels, attention_mask=mask)
        bare = model(input_ids=input_ids[:, :9], pixel_values=pixels)
    keep(name, pixel_values=pixels, input_ids=input_ids, attention_mask=mask, image_embeds=out.image_embeds,
         text_embeds=out.text_embeds, short_text_embeds=bare.text_embeds)

text = lively(CLIPTextModel(config("quick_gelu", 2, 6).text_config))
save(text, "text")
input_ids, mask = ids(4, 12, 60)
with torch.no_grad():
    out = text(input_ids=input_ids, attention_mask=mask)
    bare = text(input_ids=input_ids)
keep("text", input_ids=input_ids, attention_mask=mask, last_hidden_state=out.last_hidden_state,
     pooler_output=out.pooler_output, unmasked=bare.last_hidden_state)

settings = config("gelu", 2, 8)
vision = settings.vision_config
vision.projection_dim = 14
vision = lively(CLIPVisionModelWithProjection(vision))
save(vision, "vision")
pixels = torch.randn(2, 3, 30, 30).half().float()
with torch.no_grad():
    out = vision(pixel_values=pixels)
keep("vision", pixel_values=pixels, image_embeds=out.image_embeds, last_hidden_state=out.last_hidden_state)
save_file(tensors, HERE / "clip.safetensors")
