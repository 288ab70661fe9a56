#!/usr/bin/env python3
"""Times what people would use instead of our kernels, on one GPU: one line of JSON for each.

Needs PyTorch with Triton; flash-linear-attention 0.6.0, fla-core 0.6.0 and lightning-attn 0.0.5 where they are installed.
Nearly all of the time of tuning goes into compiling, by one processor: `--tuning-threads T` lets T threads compile the
configurations of a kernel before they are timed. `--few N` limits every Triton autotuner to N configurations, spread over all of
them; rows say so. Medians by triton.testing.do_bench; the backward pass is the time of forward and backward less that of forward.
"""
import argparse
import json

import torch
import torch.nn.functional as F

import tuning

MAIN = (4, 8192, 32, 128)
BF16 = torch.bfloat16


def median(call):
    import triton

    return triton.testing.do_bench(call, warmup=20, rep=60, return_mode="median")


def rows(shape, count=3, head_first=False):
    b, n, h, d = shape
    layout = (b, h, n, d) if head_first else (b, n, h, d)
    return [(torch.randn(layout, device="cuda", dtype=BF16) * 0.3).requires_grad_() for _ in range(count)]


def report(peer, kind, shape, make, note=None, backward=True):
    try:
        torch.cuda.empty_cache()
        call, inputs = make(shape)

        def output():
            result = call()
            return result[0] if isinstance(result, tuple) else result

        with torch.no_grad():
            forward = median(output)
        line = {"peer": peer, "kind": kind, "shape": shape, "forward_ms": round(forward, 4)}
        if backward:
            gradient = torch.randn_like(output())
            both = median(lambda: torch.autograd.grad(output(), inputs, gradient))
            line["backward_ms"] = round(both - forward, 4)
    except Exception as error:  # a peer that fails is a row that says so
        line = {"peer": peer, "kind": kind, "shape": shape, "error": str(error).splitlines()[0][:200]}
    if note:
        line["note"] = note
    print(json.dumps(line), flush=True)


def fla_lightning(shape):
    from fla.ops.lightning_attn import chunk_lightning_attn

    q, k, v = rows(shape)
    return (lambda: chunk_lightning_attn(q, k, v, layer_idx=4, num_layers=24)), (q, k, v)


def lightning_attention_2(shape):
    from lightning_attn.ops import lightning_attn_func
    from lightning_attn.utils import _build_slope_tensor

    q, k, v = rows(shape, head_first=True)
    slopes = _build_slope_tensor(shape[2]).cuda().float()
    return (lambda: lightning_attn_func(q, k, v, slopes)), (q, k, v)


def fla_gla(shape):
    from fla.ops.gla import chunk_gla

    q, k, v = rows(shape)
    gates = F.logsigmoid(torch.randn(shape, device="cuda") + 3).to(BF16).requires_grad_()
    return (lambda: chunk_gla(q, k, v, g=gates)), (q, k, v, gates)


def fla_lightnet(shape):
    from fla.ops.gla import chunk_gla

    q, logits, v = rows(shape)

    def call():
        z = logits.float().logcumsumexp(1)
        before = torch.cat((z[:, :1], z[:, :-1]), 1)
        return chunk_gla(q, torch.exp(logits - z).to(BF16), v, g=(before - z).to(BF16))

    return call, (q, logits, v)


def softmax(backend):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def make(shape):
        q, k, v = rows(shape, head_first=True)

        def call():
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return call, (q, k, v)

    return make


def compiled_noncausal(shape):
    q, k, v = rows(shape, head_first=True)

    @torch.compile
    def call():
        return F.silu(q) @ (torch.softmax(k, dim=-2).transpose(-1, -2) @ v)

    return call, (q, k, v)


def fla_step(shape):
    from fla.ops.lightning_attn import fused_recurrent_lightning_attn

    b, _, h, d = shape
    with torch.no_grad():
        q, k, v = rows(shape)
        state = torch.randn(b, h, d, d, device="cuda")
    options = {"layer_idx": 4, "num_layers": 24, "initial_state": state, "output_final_state": True}
    return (lambda: fused_recurrent_lightning_attn(q, k, v, **options)), ()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default="head,step,noncausal,channel,additive", help="rows to measure")
    parser.add_argument("--few", type=int, default=0, help="configurations of each autotuner (0: all)")
    parser.add_argument("--tuning-threads", type=int, default=0, help="threads that compile what autotuners try")
    arguments = parser.parse_args()
    kinds, few = arguments.kinds.split(","), arguments.few
    note = f"autotuning limited to {few} configurations" if few else None
    if few:
        tuning.limit(few)
    if arguments.tuning_threads:
        tuning.compile_in_threads(arguments.tuning_threads)
    fla, lightning = "flash-linear-attention 0.6.0", "lightning-attn 0.0.5"
    if "step" in kinds:
        report(fla, "step", (64, 1, 32, 128), fla_step, note, backward=False)
    if "noncausal" in kinds:
        report("PyTorch, compiled", "noncausal", (8, 16384, 16, 64), compiled_noncausal)
    if "head" in kinds:
        for name, backend in (("cuDNN", "CUDNN_ATTENTION"), ("FlashAttention-2", "FLASH_ATTENTION")):
            report(f"softmax attention, {name}", "head", MAIN, softmax(backend))
        report(lightning, "head", MAIN, lightning_attention_2)
        for shape in (MAIN, (1, 32768, 32, 128), (1, 262144, 16, 128)):
            report(fla, "head", shape, fla_lightning, note)
    if "channel" in kinds:
        report(fla, "channel", MAIN, fla_gla, note)
    if "additive" in kinds:
        report(fla + ", composed", "additive", MAIN, fla_lightnet, note)


if __name__ == "__main__":
    main()
