#!/usr/bin/env python3
"""Trains one language model with what people would use instead of ours; scripts/bench-lm.py starts it for each peer.

    scripts/lm_peers.py hf-llama-compiled --sizes '{"layers": 24, ...}' --metrics FILE

Random ids that are drawn on the device, whole steps: loss, gradients, clipping of their norm, AdamW on f32 weights, fused by PyTorch.
`autocast` computes in bf16 from f32 weights and keeps the residual stream in f32; `masters` keeps a bf16 copy of the weights, which
PyTorch's FSDP and trainers on it do, and a bf16 stream. Writes a line of JSON for every few steps, as our runs do, until it is
stopped: the first line includes what compiling and tuning took. At the first line memory that they took is given back.
"""
import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import sys
import time

# Name: model, compiled, arithmetic. `fla` has no TNL; RetNet has its recurrence, constant decays, with rotary positions, without
# activations, and with an output gate of full rank.
PEERS = {
    "hf-llama": ("llama", False, "autocast"),
    "hf-llama-compiled": ("llama", True, "autocast"),
    "hf-llama-compiled-masters": ("llama", True, "masters"),
    "fla-hgrn2": ("hgrn2", False, "masters"),
    "fla-hgrn2-compiled": ("hgrn2", True, "masters"),
    "fla-lightnet": ("lightnet", False, "masters"),
    "fla-lightnet-compiled": ("lightnet", True, "masters"),
    "fla-retnet": ("retnet", False, "masters"),
    "fla-retnet-compiled": ("retnet", True, "masters"),
}
TITLES = {
    "llama": "transformers LlamaForCausalLM",
    "hgrn2": "flash-linear-attention HGRN2ForCausalLM",
    "lightnet": "flash-linear-attention LightNetForCausalLM",
    "retnet": "flash-linear-attention RetNetForCausalLM, a stand-in",
}
PACKAGES = ["torch", "triton", "transformers", "flash-linear-attention", "fla-core"]


def versions():
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def causal_sdpa():
    """Name of PyTorch's attention without a mask tensor.

    Under torch.compile older versions of transformers build the causal mask, and FlashAttention takes none. A registered name has
    no mask function, so none is built and `is_causal` is set.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    return "sdpa_without_mask"


def build(model, sizes):
    """The model in f32, on the CPU."""
    shared = {
        "vocab_size": sizes["vocabulary"],
        "hidden_size": sizes["width"],
        "intermediate_size": sizes["hidden"],
        "num_hidden_layers": sizes["layers"],
        "max_position_embeddings": sizes["context"],
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    heads, head_width = sizes["heads"], sizes["width"] // sizes["heads"]
    if model == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(num_attention_heads=heads, attn_implementation=causal_sdpa(), **shared)
        return LlamaForCausalLM(config)
    from fla import models

    if model == "hgrn2":
        config = models.HGRN2Config(num_heads=heads, expand_ratio=head_width, **shared)
        return models.HGRN2ForCausalLM(config)
    if model == "lightnet":
        config = models.LightNetConfig(num_heads=heads, expand_ratio=head_width, gate_low_rank_dim=head_width, **shared)
        return models.LightNetForCausalLM(config)
    config = models.RetNetConfig(num_heads=heads, expand_k=1.0, expand_v=1.0, **shared)
    return models.RetNetForCausalLM(config)


def matmul_weights(model):
    """Weights of matrix products; the tied head is one, the lookup of the embedding is not counted again."""
    return sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "lower_bounds" not in name)


class Update:
    """Clipping and AdamW on f32 weights, which are the parameters themselves or masters of them."""

    def __init__(self, parameters, arithmetic):
        import torch

        self.torch, self.parameters = torch, parameters
        self.masters = None
        updated = parameters
        if arithmetic == "masters":
            self.masters = [p.detach().float().clone() for p in parameters]
            for parameter, master in zip(parameters, self.masters):
                parameter.data = parameter.data.bfloat16()
                master.grad = torch.zeros_like(master)
            updated = self.masters
        groups = [
            {"params": [p for p in updated if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in updated if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.updated = updated
        self.optimiser = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)

    def __call__(self):
        if self.masters is not None:
            gradients = [p.grad for p in self.parameters]
            self.torch._foreach_copy_([m.grad for m in self.masters], gradients)
        self.torch.nn.utils.clip_grad_norm_(self.updated, 1.0, foreach=True)
        self.optimiser.step()
        if self.masters is not None:
            with self.torch.no_grad():
                self.torch._foreach_copy_(self.parameters, self.masters)
        for parameter in self.parameters:
            parameter.grad = None


def tune(few, threads):
    """Limits or speeds up the tuning of Triton kernels; must come before they are imported."""
    if few or threads:
        root = pathlib.Path(__file__).resolve().parent.parent
        sys.path.insert(0, str(root / "kernels/benches"))
        import tuning

        if few:
            tuning.limit(few)
        if threads:
            tuning.compile_in_threads(threads)


def train(arguments, out):
    import torch

    name, compiled, arithmetic = PEERS[arguments.peer]
    sizes, device = arguments.sizes, torch.device(arguments.device)
    if name != "llama":
        tune(arguments.few, arguments.tuning_threads)
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    model = build(name, sizes).float().to(device).train()
    weights = matmul_weights(model)
    update = Update(list(model.parameters()), arithmetic)
    call = torch.compile(model, mode=arguments.compile_mode) if compiled else model
    batch, context, parts = sizes["batch"], sizes["context"], arguments.micro_batches
    if batch % parts:
        sys.exit(f"{parts} parts of a batch of {batch}: expected a divisor")
    title = f"{TITLES[name]}, {'compiled' if compiled else 'eager'}, {arithmetic}"
    write = lambda line: (out.write(json.dumps(line) + "\n"), out.flush())
    write({"peer": title, "weights": weights, "versions": versions()})
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=arithmetic == "autocast")
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    began = since = time.monotonic()
    step = 0
    while True:
        for part in torch.randint(sizes["vocabulary"], (parts, batch // parts, context), device=device):
            with autocast():
                loss = call(input_ids=part, labels=part).loss / parts
            loss.backward()
        update()
        step += 1
        if step % arguments.log_every:
            continue
        synchronize()
        now = time.monotonic()
        rate = arguments.log_every * batch * context / (now - since)
        line = {"step": step, "elapsed_s": round(now - began, 3), "loss": loss.item() * parts, "tokens_per_s": rate}
        if device.type == "cuda":
            line["allocated"], line["reserved"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            if step == arguments.log_every:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        write(line)
        since = time.monotonic()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--sizes", type=json.loads, required=True, help="layers, width, hidden, heads, vocabulary, batch, context")
    parser.add_argument("--metrics", required=True, help="where lines are written")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--log-every", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=1, help="parts of a batch, whose gradients are added")
    parser.add_argument("--few", type=int, default=0, help="limit Triton's autotuners to so many configurations")
    parser.add_argument("--tuning-threads", type=int, default=0, help="compile configurations in so many threads before tuning")
    parser.add_argument("--compile-mode", default="default")
    arguments = parser.parse_args()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with open(arguments.metrics, "w") as out:
        try:
            train(arguments, out)
        except Exception as error:  # a peer that fails is a row that says so
            lines = str(error).strip().splitlines() or [""]
            sys.exit(f"{type(error).__name__}: {lines[0][:200]}")


if __name__ == "__main__":
    main()
