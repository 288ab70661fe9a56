"""Writes clip_quick/, clip_gelu/, clip_text/, clip_vision/, clip.safetensors and clip.drawn.json: small random CLIP models, and what they
make of inputs.

Run: pip install torch==2.15.0 transformers==5.24.0 safetensors && python clip.py (seconds)
Reference: CLIPModel, CLIPTextModel and CLIPVisionModelWithProjection of transformers.

Weights and pixels are drawn (drawn.py).
MODEL.NAME: inputs and outputs by their names there; embeddings of a whole CLIPModel have length one
"""

import pathlib

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPVisionModelWithProjection

import drawn

HERE = pathlib.Path(__file__).parent
torch.manual_seed(7)
tensors, inputs = {}, drawn.Drawn()


def config(act, eos, head):
    text = dict(vocab_size=61, hidden_size=4 * head, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=13, hidden_act=act, eos_token_id=eos, bos_token_id=58, pad_token_id=1)
    vision = dict(hidden_size=3 * head, intermediate_size=44, num_hidden_layers=3, num_attention_heads=3, image_size=30,
                  patch_size=6, hidden_act=act)
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=14)


def places(name, shape):
    """Exponent and centre of a parameter; a scale near log(1 / 0.07)."""
    return [drawn.exponent(0.1), 2.625] if name == "logit_scale" else drawn.usual(name, shape)


def keep_model(name, model):
    """Draws the weights of a model and writes its folder."""
    own = drawn.Drawn()
    drawn.fill(model, own, how=places)
    drawn.save_model(model, HERE / f"clip_{name}", own)
    return model.eval()


def pixels_of(name, count):
    return torch.from_numpy(inputs(f"{name}.pixel_values", (count, 3, 30, 30), -7))


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
        tensors[f"{name}.{key}"] = value.detach().contiguous()


for name, act, eos, end, head in [("quick", "quick_gelu", 2, 60, 10), ("gelu", "gelu", 59, 59, 7)]:
    model = keep_model(name, CLIPModel(config(act, eos, head)))
    input_ids, mask = ids(3, 13, end)
    if eos == 59:
        input_ids[1, 1] = 60
    pixels = pixels_of(name, 2)
    with torch.no_grad():
        out = model(input_ids=input_ids, pixel_values=pixels, attention_mask=mask)
        bare = model(input_ids=input_ids[:, :9], pixel_values=pixels)
    keep(name, input_ids=input_ids, attention_mask=mask, image_embeds=out.image_embeds,
         text_embeds=out.text_embeds, short_text_embeds=bare.text_embeds)

text = keep_model("text", CLIPTextModel(config("quick_gelu", 2, 6).text_config))
input_ids, mask = ids(4, 12, 60)
with torch.no_grad():
    out = text(input_ids=input_ids, attention_mask=mask)
    bare = text(input_ids=input_ids)
keep("text", input_ids=input_ids, attention_mask=mask, last_hidden_state=out.last_hidden_state,
     pooler_output=out.pooler_output, unmasked=bare.last_hidden_state)

settings = config("gelu", 2, 8)
vision = settings.vision_config
vision.projection_dim = 14
vision = keep_model("vision", CLIPVisionModelWithProjection(vision))
pixels = pixels_of("vision", 3)
with torch.no_grad():
    out = vision(pixel_values=pixels)
keep("vision", image_embeds=out.image_embeds, last_hidden_state=out.last_hidden_state)
save_file(tensors, HERE / "clip.safetensors")
inputs.save(HERE / "clip.drawn.json")
