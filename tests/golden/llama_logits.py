"""Writes llama_logits.safetensors: logits of the two tiny LLaMAs on one batch of ids.

Run: pip install torch transformers safetensors && python llama_logits.py, after llama_steps.py wrote the models
Reference: transformers.LlamaForCausalLM, f32, eager attention, one thread on a CPU; versions in the metadata.

Tensors: input_ids [2, 37] (i64); of logits.untied, logits.tied and logits.theta_500000 [2, 37, 97] (f32) every third value. The last
are those of the weights of llama_untied under the configuration llama_theta_500000.json, which this script writes in the form of the
library's versions before 5: rope_theta and rope_scaling beside the other fields, not in rope_parameters, and no head_dim.
"""

import json
import pathlib

import torch
import transformers
from safetensors.torch import save_file

import drawn

FOLDER = pathlib.Path(__file__).parent
THETA = 500000.0


def logits(folder, input_ids, config=None):
    config = config or transformers.LlamaConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    model = drawn.load_model(transformers.LlamaForCausalLM(config), folder)
    with torch.no_grad():
        return model.eval()(input_ids=input_ids, use_cache=False).logits.flatten()[::3].contiguous()


def config_of_old_form():
    """Writes llama_theta_500000.json and returns what the library reads from it."""
    config = json.loads((FOLDER / "llama_untied/config.json").read_text())
    del config["rope_parameters"], config["head_dim"]
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.44.0"
    config |= {"rope_theta": THETA, "rope_scaling": None}
    path = FOLDER / "llama_theta_500000.json"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    config = transformers.LlamaConfig.from_json_file(path)
    assert config.rope_parameters["rope_theta"] == THETA and config.rope_parameters["rope_type"] == "default", config
    return config


def main():
    torch.set_num_threads(1)
    torch.manual_seed(4)
    input_ids = torch.randint(0, 97, (2, 37))
    tensors = {
        "input_ids": input_ids,
        "logits.untied": logits(FOLDER / "llama_untied", input_ids),
        "logits.tied": logits(FOLDER / "llama_tied", input_ids),
        "logits.theta_500000": logits(FOLDER / "llama_untied", input_ids, config_of_old_form()),
    }
    # One entry: the order of several would differ from run to run.
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    path = FOLDER / "llama_logits.safetensors"
    save_file(tensors, path, metadata={"versions": versions})
    path.chmod(0o644)


if __name__ == "__main__":
    main()
