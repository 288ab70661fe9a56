"""Writes blip_tiny/, blip.safetensors and blip.drawn.json: a small random BLIP captioner, and what it makes of pictures.

Run: pip install torch==2.15.0 transformers==5.24.0 safetensors && python blip.py (seconds)
Reference: BlipForConditionalGeneration of transformers, its `generate` with and without beams, and BertTokenizer.

Weights and pixels are drawn (drawn.py).
input_ids, attention_mask: texts beside the first pictures of pixel_values; states: of the pictures; logits, unmasked: of the texts
greedy, beams3, beams4, long, short: what `generate` gives, -1 behind the end; prompted: behind the tokens of prompt
words: what is said of the tokens of greedy, one text a line, in bytes
"""

import pathlib

import torch
from safetensors.torch import save_file
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration

import drawn

HERE = pathlib.Path(__file__).parent
PIECES = """[PAD] [UNK] [CLS] . [MASK] a dog ball bell ##s ##ing ring bark jump the over of and is , [SEP] ' two red blue
small man woman sit ##t stand on in grass water boat river ##side picture with play run ##n an old house it's don do n't ! near
[DEC] [ENC]""".split()
torch.manual_seed(3)
tensors, own, inputs = {}, drawn.Drawn(), drawn.Drawn()
BOS, SEP = PIECES.index("[DEC]"), PIECES.index("[SEP]")
config = BlipConfig(
    text_config=dict(vocab_size=len(PIECES), hidden_size=20, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
                     max_position_embeddings=24, bos_token_id=BOS, sep_token_id=SEP, eos_token_id=2, pad_token_id=0),
    vision_config=dict(hidden_size=18, intermediate_size=30, num_hidden_layers=2, num_attention_heads=3, image_size=12, patch_size=4))


def places(name, shape):
    """Exponent and centre of a parameter: words far apart, and norms before them that let them be told apart."""
    if "word_embeddings" in name:
        return [drawn.exponent(0.6)]
    if name.endswith("predictions.bias"):
        return [drawn.exponent(0.9)]
    if "crossattention" in name and len(shape) == 2:
        return [drawn.exponent(2.5 / shape[1] ** 0.5)]
    return drawn.usual(name, shape)


model = BlipForConditionalGeneration(config).eval()
drawn.fill(model, own, how=places)
folder = HERE / "blip_tiny"
drawn.save_model(model, folder, own)
(folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
tokenizer = BertTokenizer(str(folder / "vocab.txt"), additional_special_tokens=["[DEC]", "[ENC]"])
pixels = torch.from_numpy(inputs("pixel_values", (4, 3, 12, 12), -7))
ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
for row, length in enumerate([9, 6, 3]):
    ids[row, 0] = BOS
    ids[row, 1:length] = torch.randint(5, BOS, (length - 1,))
    mask[row, :length] = 1
with torch.no_grad():
    out = model(pixel_values=pixels[:3], input_ids=ids, attention_mask=mask)
    bare = model(pixel_values=pixels[:3], input_ids=ids)
    tensors |= {"input_ids": ids, "attention_mask": mask, "states": out.last_hidden_state, "logits": out.logits,
                "unmasked": bare.logits}
    for name, options in {
        "greedy": {},
        "beams3": {"num_beams": 3},
        "beams4": {"num_beams": 4, "max_length": 9},
        "long": {"num_beams": 3, "length_penalty": 2.0},
        "short": {"num_beams": 3, "length_penalty": -1.0},
    }.items():
        rows = [model.generate(pixels[i:i + 1], **{"max_length": 20, **options})[0, 1:] for i in range(len(pixels))]
        rows = [row[:(row == SEP).nonzero()[0, 0]] if (row == SEP).any() else row for row in rows]
        print(name, [row.tolist() for row in rows])
        longest = max(len(row) for row in rows)
        tensors[name] = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=-1) for row in rows])
        if name == "greedy":
            texts = [tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=True) for row in rows]
            print(texts)
            tensors["words"] = torch.tensor(list("\n".join(texts).encode()), dtype=torch.uint8)
    prompt = tokenizer("A picture of", return_tensors="pt").input_ids
    row = model.generate(pixels[:1], input_ids=prompt.clone(), max_length=20)[0]
    print("prompt", prompt, row)
    row = row[prompt.shape[1] - 1:]
    row = row[:(row == SEP).nonzero()[0, 0]] if (row == SEP).any() else row
    tensors |= {"prompt": prompt[0], "prompted": row}
save_file({k: v.detach().contiguous() for k, v in tensors.items()}, HERE / "blip.safetensors")
inputs.save(HERE / "blip.drawn.json")
