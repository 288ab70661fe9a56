"""Writes two tiny LightNet models of flash-linear-attention and lightnet_logits.safetensors, their logits on one batch.

Run: see fla_reference.py for the packages, then python lightnet_logits.py (20 seconds on one core)
Reference: fla_reference.py and `mixer` below, f64, rounded to f32; the library's own kernels agree, see `check`.

Tensors: input_ids [2, 37] (i64) and for each model logits.NAME, every third of [2, 37, 61] (f32).
    lightnet_square/  expand_ratio alone, which makes as many key channels as hidden ones
    lightnet_narrow/  num_heads and expand_ratio, fewer key channels than hidden ones, tied embeddings, norm_eps of 1e-3
    lightnet_conv/    short convolutions before the activations, an output norm without weights, num_heads alone
    lightnet_hybrid/  softmax attention in one layer, with grouped queries, biases, and a base that the library ignores
"""

import fla_reference
import torch
from fla.models.lightnet import LightNetConfig, LightNetForCausalLM
from torch.nn.functional import silu

VOCABULARY = 61
# The library does not hand norm_eps to the function that norms, gates and projects, so that one's own default holds.
OUTPUT_NORM_EPS = 1e-6


def additive_gate(x):
    """k_t = exp(x_t) / z_t with z_t the sum of exp(x) up to t, and the decay z_(t-1) / z_t, which starts as 0."""
    total = x.exp().cumsum(1)
    before = torch.cat([torch.zeros_like(total[:, :1]), total[:, :-1]], 1)
    return x.exp() / total, before / total


def mixer(x, weights, config, layer):
    prefix = f"model.layers.{layer}.attn"
    if config.attn is not None and layer in config.attn["layers"]:
        # The library does not hand rope_theta to these layers, so that their own default holds.
        return fla_reference.softmax_attention(x, weights, prefix, config.attn, 10000.0)
    q, k, v = fla_reference.projections(x, weights, prefix, "qkv")
    q = silu(q)
    k, decay = additive_gate(k)
    gate = x @ weights[f"{prefix}.g_proj.0.weight"].T @ weights[f"{prefix}.g_proj.1.weight"].T
    heads = config.num_heads or config.hidden_size // config.expand_ratio
    out = fla_reference.mix_heads(q, k, v, decay, heads)
    # One norm over all heads together, then the gate.
    out = fla_reference.norm(out, weights.get(f"{prefix}.g_norm.weight", 1.0), OUTPUT_NORM_EPS) * silu(gate)
    return out @ weights[f"{prefix}.o_proj.weight"].T


def models():
    square = LightNetConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, expand_ratio=16, gate_low_rank_dim=8,
        intermediate_size=48, initializer_range=0.15,
    )
    narrow = LightNetConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_heads=3, expand_ratio=8, gate_low_rank_dim=5,
        intermediate_size=40, tie_word_embeddings=True, norm_eps=1e-3, initializer_range=0.15,
    )
    conv = LightNetConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_heads=4, expand_ratio=None, gate_low_rank_dim=7,
        use_short_conv=True, elementwise_affine=False, intermediate_size=40, initializer_range=0.2,
    )
    hybrid = LightNetConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, expand_ratio=12, gate_low_rank_dim=7,
        attn={"layers": [1], "num_heads": 6, "num_kv_heads": 2, "qkv_bias": True, "rope_theta": 50.0},
        intermediate_size=40, initializer_range=0.2,
    )
    return {
        "square": fla_reference.random_model(LightNetForCausalLM, square),
        "narrow": fla_reference.random_model(LightNetForCausalLM, narrow),
        "conv": fla_reference.random_model(LightNetForCausalLM, conv),
        "hybrid": fla_reference.random_model(LightNetForCausalLM, hybrid),
    }


if __name__ == "__main__":
    fla_reference.write("lightnet", models(), VOCABULARY, mixer)
