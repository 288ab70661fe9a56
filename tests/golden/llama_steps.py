"""Writes two tiny LLaMAs, a file of tokens and the losses of 200 training steps of each model.

Run: pip install torch transformers numpy && python llama_steps.py, then llama_logits.py (20 seconds on one core)
Reference: transformers.LlamaForCausalLM with eager attention and torch.optim.AdamW, f32, one thread on a CPU;
versions are in llama_steps.json.

Writes, beside this script:
    llama_untied/  llama_tied/   config.json as the library saves it, and the weights before the first step, drawn (drawn.py)
    llama_tokens.bin             u16, little-endian
    llama_steps.json             for each model the loss, the norm of the gradient before clipping and the learning
                                 rate of each step; the loss is that of the batch before the step's update

Window i of step s is the 64 tokens from ((s * 8 + i) * 64) mod (tokens - 65) on; its targets are the same tokens, one
further. A step clips by the global norm as torch does, g *= min(1, 1 / (norm + 1e-6)), then decays tensors of two or
more dimensions, embeddings included, and no others. A tied embedding is one parameter.

29 steps of the untied model and 3 of the tied one are clipped. Measured with other starting weights of such models: a second run
gives the same bits; with f64 weights (the library still takes norms and softmax in f32), or with starting weights moved by 2e-7 of
themselves, no loss moves by more than 1e-6 and no gradient norm by more than 2e-6 of itself.
"""

import json
import math
import pathlib
import random
import struct

import torch
import transformers
from torch.nn.functional import cross_entropy

import drawn

VOCABULARY = 97
TOKENS = 20011
STEPS, BATCH, WINDOW = 200, 8, 64
FOLDER = pathlib.Path(__file__).parent


def markov_tokens():
    """Each token has four likely followers; now and then the token five places back comes again."""
    source = random.Random(1)
    followers = [[source.randrange(VOCABULARY) for _ in range(4)] for _ in range(VOCABULARY)]
    tokens = [source.randrange(VOCABULARY) for _ in range(5)]
    while len(tokens) < TOKENS:
        choice = source.random()
        if choice < 0.2:
            tokens.append(tokens[-5])
        elif choice < 0.25:
            tokens.append(source.randrange(VOCABULARY))
        else:
            # 0, 1, 2, 3 with falling chances: the square leans to the first.
            tokens.append(followers[tokens[-1]][int(4 * source.random() ** 2)])
    return tokens


def configuration(**options):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=128, initializer_range=0.1, pad_token_id=None, **options,
    )
    config._attn_implementation = "eager"
    return config


def model_of(config):
    """A model and how its weights are drawn; norms are away from 1, so that one left out shows in the logits."""
    own = drawn.Drawn()
    model = transformers.LlamaForCausalLM(config)
    return drawn.fill(model, own, how=places), own


def places(name, shape):
    return drawn.usual(name, shape) if "norm" in name else [drawn.exponent(0.1)]


def models():
    untied = configuration(
        hidden_size=48, intermediate_size=128, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        rope_theta=10000.0, rms_norm_eps=1e-6, tie_word_embeddings=False,
    )
    tied = configuration(
        hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        head_dim=12, rope_theta=10000.0, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )
    return {"untied": model_of(untied), "tied": model_of(tied)}


def learning_rate(step):
    return 3e-3 * min(1, (step + 1) / 20) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / STEPS)))


def train(model, tokens):
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95), eps=1e-8, foreach=False,
    )
    record = {"loss": [], "gradient_norm": [], "learning_rate": []}
    for step in range(STEPS):
        starts = [((step * BATCH + i) * WINDOW) % (len(tokens) - WINDOW - 1) for i in range(BATCH)]
        windows = torch.stack([tokens[start:start + WINDOW + 1] for start in starts])
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        for key, value in [("loss", loss.item()), ("gradient_norm", norm.item()), ("learning_rate", learning_rate(step))]:
            # As many digits as an f32 has.
            record[key].append(float(f"{value:.9g}"))
    return record


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokens = markov_tokens()
    (FOLDER / "llama_tokens.bin").write_bytes(struct.pack(f"<{len(tokens)}H", *tokens))
    tokens = torch.tensor(tokens)
    record = {"versions": {"transformers": transformers.__version__, "torch": torch.__version__}}
    for name, (model, own) in models().items():
        drawn.save_model(model, FOLDER / f"llama_{name}", own)
        record[name] = train(model, tokens)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    (FOLDER / "llama_steps.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
