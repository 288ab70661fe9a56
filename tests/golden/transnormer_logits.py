"""Writes transnormer_mixed/, a tiny TransNormerLLM in the layout of its published checkpoints, whose weights are drawn (drawn.py) but for
the angles of LRPE, and its logits.

Run: pip install torch numpy safetensors && python transnormer_logits.py (2 seconds on one core)
Reference: the formulas of the paper (arXiv 2307.14995) and of its published code, written out below in f64: the library needs
Triton kernels on a GPU. Names, shapes, the order q, k, v, u of the fused map, decays and eps are those of
`modeling_transnormer.py` (OpenNLPLab/TransnormerLLM); no published checkpoint was compared.

Model: three layers, LRPE in the first and in the last, five heads (whose slopes are those of four and one of eight), biases,
tied embeddings (transformers ties where a configuration does not say otherwise), embeddings times sqrt(width).
transnormer_logits.safetensors: input_ids [2, 37] (i64), logits.mixed [2, 37, 61] (f32)
"""

import json
import math
import pathlib

import drawn
import torch
from safetensors.torch import save_file
from torch.nn.functional import silu

FOLDER = pathlib.Path(__file__).parent
VOCABULARY, WIDTH, HIDDEN, LAYERS, HEADS = 61, 30, 44, 3, 5
EPS = 1e-6
CONFIG = {
    "architectures": ["TransnormerForCausalLM"], "model_type": "transnormer", "vocab_size": VOCABULARY,
    "decoder_embed_dim": WIDTH, "hidden_dim": WIDTH, "decoder_layers": LAYERS, "decoder_attention_heads": HEADS,
    "glu_dim": HIDDEN, "linear_use_lrpe_list": [1, 0, 1], "linear_act_fun": "silu", "norm_type": "simplermsnorm",
    "no_scale_embedding": False, "bias": True, "init_std": 0.02, "torch_dtype": "float32",
}
SLOPES = [2.0 ** (-8 * h / 4) for h in range(1, 5)] + [2.0 ** (-8 / 8)]


def random_weights():
    torch.manual_seed(15)
    own, rest = drawn.Drawn(), {}

    def draw(name, shape, deviation):
        return torch.from_numpy(own(name, shape, drawn.exponent(deviation)))

    name = "model.embed_tokens.weight"
    weights = {name: draw(name, (VOCABULARY, WIDTH), 0.3)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes = {
            "token_mixer.qkvu_proj": (4 * WIDTH, WIDTH), "token_mixer.out_proj": (WIDTH, WIDTH),
            "channel_mixer.l1": (HIDDEN, WIDTH), "channel_mixer.l2": (HIDDEN, WIDTH), "channel_mixer.l3": (WIDTH, HIDDEN),
        }
        for name, shape in shapes.items():
            weights[f"{prefix}.{name}.weight"] = draw(f"{prefix}.{name}.weight", shape, 0.2)
            weights[f"{prefix}.{name}.bias"] = draw(f"{prefix}.{name}.bias", shape[:1], 0.2)
        if CONFIG["linear_use_lrpe_list"][layer]:
            theta = 10000 ** (-2 / WIDTH * torch.arange(WIDTH))
            # As if it had been trained for a while.
            theta = theta * (1 + 0.1 * torch.randn(WIDTH))
            rest[f"{prefix}.token_mixer.lrpe.theta"] = theta.reshape(HEADS, 1, -1).contiguous()
    return weights | rest, own, rest


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def mixer(x, weights, layer):
    prefix = f"model.layers.{layer}.token_mixer"
    q, k, v, u = linear(x, weights, f"{prefix}.qkvu_proj").chunk(4, -1)
    q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in (silu(q), silu(k), v))
    theta = weights.get(f"{prefix}.lrpe.theta")
    if theta is not None:
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * theta[:, 0]
        q, k = (torch.cat([part * angles.cos(), part * angles.sin()], -1) for part in (q, k))
    out = torch.zeros_like(v)
    for t in range(x.shape[1]):
        for head in range(HEADS):
            rate = SLOPES[head] * (1 - layer / (LAYERS - 1) + 1e-5)
            for s in range(t + 1):
                score = (q[:, t, head] * k[:, s, head]).sum(-1) * math.exp(-rate * (t - s))
                out[:, t, head] += score[:, None] * v[:, s, head]
    return linear(norm(out.flatten(-2)) * u, weights, f"{prefix}.out_proj")


def logits(weights, input_ids):
    weights = {name: value.double() for name, value in weights.items()}
    x = weights["model.embed_tokens.weight"][input_ids] * math.sqrt(WIDTH)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.channel_mixer"
        x = x + mixer(norm(x), weights, layer)
        normed = norm(x)
        inner = linear(normed, weights, f"{prefix}.l1") * linear(normed, weights, f"{prefix}.l2")
        x = x + linear(inner, weights, f"{prefix}.l3")
    return norm(x) @ weights["model.embed_tokens.weight"].T


def main():
    torch.set_num_threads(1)
    weights, own, rest = random_weights()
    input_ids = torch.randint(0, VOCABULARY, (2, 37))
    folder = FOLDER / "transnormer_mixed"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2, sort_keys=True) + "\n")
    tensors = {"input_ids": input_ids, "logits.mixed": logits(weights, input_ids).float().contiguous()}
    own.save(folder / "drawn.json")
    paths = {folder / "rest.safetensors": rest, FOLDER / "transnormer_logits.safetensors": tensors}
    for path, content in paths.items():
        save_file(content, path, metadata={"versions": f"torch {torch.__version__}"})
        path.chmod(0o644)


if __name__ == "__main__":
    main()
