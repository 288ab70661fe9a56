#!/usr/bin/env python3
"""Times steps of training of softmax ViTs as people would run them instead of ours; scripts/bench-vision.py starts it for each peer.

    scripts/vision_peers.py timm-compiled --size small --side 224 --batch 256

Pictures of noise on the device, whole steps: loss against shares of classes, gradients, clipping of their norm to 1, AdamW on f32
weights, fused by PyTorch; branches in bf16 by autocast. Steps are waited for four at a time, as ours. Prints one line of JSON.
"""
import argparse
import contextlib
import importlib.metadata
import json
import statistics
import sys
import time

# Name: compiled, attention. All of them are timm's; `flash` and `cudnn` are the kernels that PyTorch is told to take.
PEERS = {
    "timm": (False, None),
    "timm-compiled": (True, None),
    "timm-compiled-flash": (True, "FLASH_ATTENTION"),
    "timm-compiled-cudnn": (True, "CUDNN_ATTENTION"),
}
MODELS = {"tiny": "deit_tiny_patch16_224", "small": "deit_small_patch16_224", "base": "deit_base_patch16_224"}
TOGETHER, WARM = 4, 3


def versions():
    found = {}
    for package in ["torch", "triton", "timm"]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--size", choices=MODELS, default="small")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()

    import timm
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    compiled, attention = PEERS[arguments.peer]
    device, side = arguments.device, arguments.side
    began = time.monotonic()
    model = timm.create_model(MODELS[arguments.size], img_size=side, num_classes=arguments.classes).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=device != "cpu")
    pixels = torch.rand(arguments.batch, 3, side, side, device=device) * 2 - 1
    classes = torch.randint(arguments.classes, (arguments.batch,), device=device)
    targets = torch.nn.functional.one_hot(classes, arguments.classes).float()
    forward = torch.compile(model) if compiled else model

    def step():
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = forward(pixels)
        loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def wait():
        if device != "cpu":
            torch.cuda.synchronize()

    kernels = sdpa_kernel(getattr(SDPBackend, attention)) if attention else contextlib.nullcontext()
    with kernels:
        for _ in range(WARM):
            step()
        wait()
        start_s = time.monotonic() - began
        before = 0
        if device != "cpu":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        times = []
        while len(times) * TOGETHER < arguments.steps:
            wait()
            began = time.monotonic()
            for _ in range(TOGETHER):
                step()
            wait()
            times.append(1e3 * (time.monotonic() - began) / TOGETHER)
    median = statistics.median(times)
    found = {
        "peer": arguments.peer,
        "model": MODELS[arguments.size],
        "parameters": parameters,
        "side": side,
        "batch": arguments.batch,
        "ms": {"median": median, "low": min(times), "high": max(times)},
        "images_per_s": 1e3 * arguments.batch / median,
        "start_s": round(start_s, 1),
        "packages": versions(),
    }
    if device != "cpu":
        found["bytes_per_image"] = (torch.cuda.max_memory_allocated() - before) // arguments.batch
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    main()
