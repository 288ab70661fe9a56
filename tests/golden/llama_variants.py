"""Writes llama_scaled/, a tiny LLaMA in shards with all that a configuration may ask for, and llama_variants.safetensors.

Run: pip install torch transformers safetensors && python llama_variants.py (5 seconds on one core)
Reference: transformers.LlamaForCausalLM, f32, eager attention, one thread on a CPU; versions in the metadata.

Model: grouped queries, a head_dim that is not hidden_size / num_attention_heads, biases of attention and of the MLP, rotary
positions as in Llama 3, whose three ranges of wavelengths all occur; weights in shards with an index, drawn (drawn.py).
Tensors: input_ids [2, 41] (i64), and every third value of [2, 41, 61] (f32)
    logits.llama3  of llama_scaled/config.json
    logits.linear  of the same weights under llama_linear.json, in the form of the library's versions before 5: rope_scaling
                   of type linear, and rope_theta beside it
"""

import json
import pathlib

import torch
import transformers
from safetensors.torch import save_file

import drawn

FOLDER = pathlib.Path(__file__).parent
VOCABULARY = 61


def logits(model, input_ids):
    with torch.no_grad():
        return model.eval()(input_ids=input_ids, use_cache=False).logits.flatten()[::3].contiguous()


def scaled_model():
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=10, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-4, initializer_range=0.2,
        max_position_embeddings=64,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )
    config._attn_implementation = "eager"
    own = drawn.Drawn()
    return drawn.fill(transformers.LlamaForCausalLM(config), own, how=places), own


def places(name, shape):
    """Norms and biases away from 1 and 0, so that one left out shows in the logits."""
    return [drawn.exponent(0.2)] if len(shape) > 1 else drawn.usual(name, shape)


def linear_model():
    """The same weights under a configuration of the old form."""
    config = json.loads((FOLDER / "llama_scaled/config.json").read_text())
    del config["rope_parameters"]
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.44.0"
    config |= {"rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 2.5}}
    path = FOLDER / "llama_linear.json"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    config = transformers.LlamaConfig.from_json_file(path)
    assert config.rope_parameters["rope_type"] == "linear" and config.rope_parameters["rope_theta"] == 20000.0, config
    config._attn_implementation = "eager"
    return drawn.load_model(transformers.LlamaForCausalLM(config), FOLDER / "llama_scaled")


def main():
    torch.set_num_threads(1)
    torch.manual_seed(12)
    input_ids = torch.randint(0, VOCABULARY, (2, 41))
    model, own = scaled_model()
    drawn.save_model(model, FOLDER / "llama_scaled", own, max_shard_size="24KB")
    tensors = {
        "input_ids": input_ids,
        "logits.llama3": logits(model, input_ids),
        "logits.linear": logits(linear_model(), input_ids),
    }
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    path = FOLDER / "llama_variants.safetensors"
    save_file(tensors, path, metadata={"versions": versions})
    path.chmod(0o644)


if __name__ == "__main__":
    main()
