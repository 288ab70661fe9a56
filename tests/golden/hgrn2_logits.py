"""Writes three tiny HGRN2 models of flash-linear-attention and hgrn2_logits.safetensors, their logits on one batch.

Run: see fla_reference.py for the packages, then python hgrn2_logits.py (20 seconds on one core)
Reference: fla_reference.py and `mixer` below, f64, rounded to f32; the library's own kernels agree, see `check`.

Tensors: input_ids [2, 37] (i64) and for each model logits.NAME, every third of [2, 37, 61] (f32).
    hgrn2_bounded/  expand_ratio and num_heads, lower bounds of the forget gates, three layers
    hgrn2_tied/     num_heads alone, no lower bounds, tied embeddings, norm_eps of 1e-3, the default width of the MLP
    hgrn2_plain/    an output norm without weights (elementwise_affine false), lower bounds, untied
    hgrn2_conv/     short convolutions before the activations, fewer key channels than hidden ones
    hgrn2_hybrid/   softmax attention in one layer, with grouped queries, biases and a base of its own
"""

import fla_reference
import torch
from fla.models.hgrn2 import HGRN2Config, HGRN2ForCausalLM
from torch.nn.functional import silu

VOCABULARY = 61
# The library does not hand norm_eps to the function that norms and projects, so that one's own default holds.
OUTPUT_NORM_EPS = 1e-5


def lower_bound(weights, layer):
    share = weights["model.lower_bounds"].softmax(0)
    return share[1:layer + 1].sum(0)


def mixer(x, weights, config, layer):
    prefix = f"model.layers.{layer}.attn"
    if config.attn is not None and layer in config.attn["layers"]:
        return fla_reference.softmax_attention(x, weights, prefix, config.attn, config.attn["rope_theta"])
    q, forget, v = fla_reference.projections(x, weights, prefix, "qfi")
    q, forget = silu(q), torch.sigmoid(forget)
    if config.use_lower_bound and layer > 0:
        bound = lower_bound(weights, layer)
        forget = bound + (1 - bound) * forget
    # Where expand_ratio is there, num_heads of the configuration has no say.
    heads = config.hidden_size // config.expand_ratio
    out = fla_reference.mix_heads(q, 1 - forget, v, forget, heads)
    # One norm over all heads together.
    out = fla_reference.norm(out, weights.get(f"{prefix}.g_norm.weight", 1.0), OUTPUT_NORM_EPS)
    return out @ weights[f"{prefix}.o_proj.weight"].T


def models():
    bounded = HGRN2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, expand_ratio=16, num_heads=2, use_lower_bound=True,
        intermediate_size=48, initializer_range=0.15,
    )
    tied = HGRN2Config(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, expand_ratio=None, num_heads=4,
        use_lower_bound=False, tie_word_embeddings=True, norm_eps=1e-3, initializer_range=0.15,
    )
    plain = HGRN2Config(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, expand_ratio=12, elementwise_affine=False,
        intermediate_size=40, initializer_range=0.15,
    )
    conv = HGRN2Config(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, expand_ratio=10, use_lower_bound=False,
        use_short_conv=True, conv_size=3, intermediate_size=40, initializer_range=0.2,
    )
    hybrid = HGRN2Config(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, expand_ratio=12,
        attn={"layers": [1], "num_heads": 6, "num_kv_heads": 2, "qkv_bias": True, "rope_theta": 50.0},
        intermediate_size=40, initializer_range=0.2,
    )
    return {
        "bounded": fla_reference.random_model(HGRN2ForCausalLM, bounded),
        "tied": fla_reference.random_model(HGRN2ForCausalLM, tied),
        "plain": fla_reference.random_model(HGRN2ForCausalLM, plain),
        "conv": fla_reference.random_model(HGRN2ForCausalLM, conv),
        "hybrid": fla_reference.random_model(HGRN2ForCausalLM, hybrid),
    }


if __name__ == "__main__":
    fla_reference.write("hgrn2", models(), VOCABULARY, mixer)
