"""What hgrn2_logits.py and lightnet_logits.py share: parts of flash-linear-attention's models in literal f64.

Needs: pip install torch transformers safetensors einops, then
       pip install --no-deps flash-linear-attention==0.6.0 fla-core==0.6.0
No GPU: the library's classes give configuration, names and starting weights; the logits come from the formulas below.
`check` then runs the library's own kernels in Triton's interpreter on the CPU and compares. Import this file before
anything of the library: the interpreter is chosen when Triton is first imported.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pathlib

import fla
import fla.layers.attn
import torch
import transformers
import triton.language as tl
from fla.ops.utils import op
from safetensors.torch import save_file
from torch.nn.functional import scaled_dot_product_attention, silu
from triton.runtime.autotuner import Autotuner

import drawn


def flash_attention(q, k, v, causal, window_size):
    """In place of the package flash-attn, which needs a GPU: the library refuses softmax layers without it."""
    assert causal and window_size == (-1, -1)
    share = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(share, 2), v.repeat_interleave(share, 2)))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


fla.layers.attn.flash_attn_func = flash_attention

FOLDER = pathlib.Path(__file__).parent

# There is nothing to time in the interpreter: every configuration is as good as the first.
Autotuner.do_bench = lambda self, call, quantiles: [1.0, 1.0, 1.0]
# The interpreter has no libdevice.
op.tldevice.log1p = lambda x: tl.log(1.0 + x)


def norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def mlp(x, weights, prefix):
    gate = x @ weights[f"{prefix}.gate_proj.weight"].T
    up = x @ weights[f"{prefix}.up_proj.weight"].T
    return (silu(gate) * up) @ weights[f"{prefix}.down_proj.weight"].T


def projections(x, weights, prefix, letters):
    """The maps `{letter}_proj` of x, behind their short convolutions where there are any: each channel's own, causal."""
    maps = []
    for letter in letters:
        y = x @ weights[f"{prefix}.{letter}_proj.weight"].T
        kernel = weights.get(f"{prefix}.{letter}_conv1d.weight")
        if kernel is not None:
            taps = kernel.shape[-1]
            padded = torch.cat([y.new_zeros(y.shape[0], taps - 1, y.shape[2]), y], 1)
            y = sum(padded[:, tap:tap + y.shape[1]] * kernel[:, 0, tap] for tap in range(taps))
        maps.append(y)
    return maps


def gated_recurrence(q, k, v, decay):
    """S_t = diag(decay_t) S_(t-1) + k_t v_t^T, o_t = S_t^T q_t / sqrt(K), for q, k, decay [T, K] and v [T, V]."""
    state = q.new_zeros(q.shape[1], v.shape[1])
    rows = []
    for t in range(q.shape[0]):
        state = decay[t][:, None] * state + k[t][:, None] * v[t][None, :]
        rows.append(state.T @ q[t] / q.shape[1] ** 0.5)
    return torch.stack(rows)


def mix_heads(q, k, v, decay, heads):
    """The recurrence for each sequence and head; heads are consecutive runs of channels."""
    def split(x):
        return x.unflatten(-1, (heads, -1))
    q, k, v, decay = split(q), split(k), split(v), split(decay)
    out = torch.empty_like(v)
    for b in range(v.shape[0]):
        for h in range(heads):
            out[b, :, h] = gated_recurrence(q[b, :, h], k[b, :, h], v[b, :, h], decay[b, :, h])
    return out.flatten(-2)


def softmax_attention(x, weights, prefix, spec, theta):
    """A layer of a hybrid: rotary positions that turn channel c with c + D / 2, grouped queries."""
    def heads(letter, count):
        name = f"{prefix}.{letter}_proj"
        return (x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)).unflatten(-1, (count, -1))
    groups = spec["num_kv_heads"]
    q, k, v = heads("q", spec["num_heads"]), heads("k", groups), heads("v", groups)
    half = q.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = (torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies)[:, None]
    def turn(y):
        a, b = y[..., :half], y[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)
    q, k = turn(q), turn(k)
    out = torch.empty_like(q)
    for t in range(x.shape[1]):
        for head in range(spec["num_heads"]):
            group = head * groups // spec["num_heads"]
            scores = torch.einsum("bd,bsd->bs", q[:, t, head], k[:, :t + 1, group]) / q.shape[-1] ** 0.5
            out[:, t, head] = torch.einsum("bs,bsd->bd", scores.softmax(-1), v[:, :t + 1, group])
    return out.flatten(-2) @ weights[f"{prefix}.o_proj.weight"].T


def logits(model, input_ids, mixer):
    """The model in f64; `mixer(x, weights, config, layer)` is the token mixer on the normed state."""
    config = model.config
    weights = {name: value.double() for name, value in model.state_dict().items()}
    state = weights["model.embeddings.weight"][input_ids]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        normed = norm(state, weights[f"{prefix}.attn_norm.weight"], config.norm_eps)
        state = state + mixer(normed, weights, config, layer)
        normed = norm(state, weights[f"{prefix}.mlp_norm.weight"], config.norm_eps)
        state = state + mlp(normed, weights, f"{prefix}.mlp")
    state = norm(state, weights["model.norm.weight"], config.norm_eps)
    return state @ weights["lm_head.weight"].T


def check(name, model, input_ids, expected):
    """The library's forward pass, f32, its kernels interpreted."""
    with torch.no_grad():
        found = model.eval()(input_ids=input_ids, use_cache=False).logits
    deviation = (found - expected).abs().max().item()
    print(f"{name}: logits of deviation {expected.std().item():.2f}, the library differs by {deviation:.1e}")
    assert deviation < 1e-5, deviation


def places(name, shape):
    """Exponent and centre of a weight; lower bounds are as large as words."""
    return [drawn.exponent(0.8)] if "lower_bounds" in name else drawn.usual(name, shape)


def random_model(kind, config):
    """A model whose weights are drawn (drawn.py), and how."""
    own = drawn.Drawn()
    return drawn.fill(kind(config), own, how=places), own


def write(family, models, vocabulary, mixer):
    """Writes the folder {family}_{name} of each model, and input_ids and all logits.{name} to one file."""
    torch.set_num_threads(1)
    torch.manual_seed(5)
    input_ids = torch.randint(0, vocabulary, (2, 37))
    tensors = {"input_ids": input_ids}
    for name, (model, own) in models.items():
        folder = FOLDER / f"{family}_{name}"
        drawn.save_model(model, folder, own)
        expected = logits(model, input_ids, mixer)
        check(folder.name, model, input_ids, expected)
        # Every third value.
        tensors[f"logits.{name}"] = expected.float().flatten()[::3].contiguous()
    # One entry: the order of several would differ from run to run.
    packages = {"flash-linear-attention": fla, "transformers": transformers, "torch": torch}
    versions = ", ".join(f"{name} {package.__version__}" for name, package in packages.items())
    path = FOLDER / f"{family}_logits.safetensors"
    save_file(tensors, path, metadata={"versions": versions})
    path.chmod(0o644)
