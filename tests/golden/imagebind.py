"""Writes imagebind_tiny/, imagebind_wrapped/ and imagebind.safetensors: small random ImageBind models, and what they make of inputs.

Run: pip install torch==2.15.0 numpy safetensors && python imagebind.py (seconds)
Reference: plain PyTorch modules, put together below as the paper (Girdhar et al., 2023) and the names of its checkpoint say.

imagebind_tiny: config.json and model.safetensors, f16, with towers that nobody reads; imagebind_wrapped: weights.ckpt of torch.save in
f16, below "state_dict" and the prefix "model."; its vision tower has patches of one frame.
MODEL.NAME.in or .shape, MODEL.NAME.out: token ids, or the shape of the numbers sin(0.37 i) + cos(0.011 i) / 2, and embeddings of images,
clips, several clips, sounds, several sounds and texts
"""

import json
import math
import pathlib

import torch
from safetensors.torch import save_file
from torch import nn

HERE = pathlib.Path(__file__).parent
torch.manual_seed(5)
torch.use_deterministic_algorithms(True)


class Block(nn.Module):
    def __init__(self, width, heads, bias_kv):
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.MultiheadAttention(width, heads, bias=True, add_bias_kv=bias_kv, batch_first=True)
        self.norm_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x, mask):
        h = self.norm_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm_2(x))))


class Trunk(nn.Module):
    def __init__(self, width, blocks, heads, bias_kv, norm):
        super().__init__()
        if norm:
            self.pre_transformer_layer = nn.Sequential(nn.LayerNorm(width, eps=1e-6))
        self.norm = norm
        self.blocks = nn.ModuleList(Block(width, heads, bias_kv) for _ in range(blocks))

    def forward(self, x, mask=None):
        if self.norm:
            x = self.pre_transformer_layer(x)
        for block in self.blocks:
            x = block(x, mask)
        return x


class Slots(nn.Module):
    """Modules under the numbers that a checkpoint has; the others have no parameters."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name.lstrip("_"), module)


class Parameters(nn.Module):
    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.3))


def model(config):
    c, out = config, config["out_embed_dim"]
    v, a, t = c["vision"], c["audio"], c["text"]
    pre, trunk, head = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
    pre["vision"] = Parameters(cls_token=(1, 1, v["width"]))
    pre["vision"].rgbt_stem = Slots(
        proj=Slots(_1=nn.Conv3d(3, v["width"], v["kernel"], v["kernel"], bias=False)))
    pre["vision"].pos_embedding_helper = Parameters(pos_embed=(1, v["tokens"] + 1, v["width"]))
    trunk["vision"] = Trunk(v["width"], v["blocks"], v["heads"], False, True)
    head["vision"] = Slots(_0=nn.LayerNorm(v["width"], eps=1e-6), _2=nn.Linear(v["width"], out, bias=False))
    pre["audio"] = Parameters(cls_token=(1, 1, a["width"]))
    pre["audio"].rgbt_stem = Slots(proj=nn.Conv2d(1, a["width"], a["kernel"], a["stride"], bias=False),
                                   norm_layer=nn.LayerNorm(a["width"]))
    pre["audio"].pos_embedding_helper = Parameters(pos_embed=(1, a["tokens"] + 1, a["width"]))
    trunk["audio"] = Trunk(a["width"], a["blocks"], a["heads"], True, False)
    head["audio"] = Slots(_0=nn.LayerNorm(a["width"], eps=1e-6), _2=nn.Linear(a["width"], out, bias=False))
    pre["text"] = Parameters(pos_embed=(1, t["context"], t["width"]))
    pre["text"].token_embedding = nn.Embedding(t["vocabulary"], t["width"])
    pre["text"].register_buffer("mask", torch.full((t["context"],) * 2, -math.inf).triu(1))
    trunk["text"] = Trunk(t["width"], t["blocks"], t["heads"], False, False)
    head["text"] = Slots(proj=Slots(_0=nn.LayerNorm(t["width"], eps=1e-6), _1=nn.Linear(t["width"], out, bias=False)))
    post = nn.ModuleDict({"text": Slots(_1=Slots()), "audio": Slots(_1=Slots())})
    getattr(post["text"], "1").register_parameter("log_logit_scale", nn.Parameter(torch.tensor(math.log(1 / 0.07))))
    getattr(post["audio"], "1").register_buffer("log_logit_scale", torch.tensor(math.log(20.0)))
    names = ["preprocessors", "trunks", "heads", "postprocessors"]
    whole = nn.ModuleDict({f"modality_{n}": m for n, m in zip(names, [pre, trunk, head, post])})
    with torch.no_grad():
        for name, p in whole.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.2)
    return whole


def unit(x):
    return nn.functional.normalize(x, dim=-1)


@torch.no_grad()
def embed(m, kind, x):
    pre, trunk, head = m["modality_preprocessors"][kind], m["modality_trunks"][kind], m["modality_heads"][kind]
    clips = None
    if x.dim() >= 5 and kind != "text":
        clips = x.shape[:2]
        x = x.flatten(0, 1)
    if kind == "text":
        h = trunk(pre.token_embedding(x) + pre.pos_embed, pre.mask)
        h = h[torch.arange(len(x)), x.argmax(-1)]
        h = getattr(head.proj, "1")(getattr(head.proj, "0")(h))
        scale = getattr(m["modality_postprocessors"]["text"], "1").log_logit_scale.exp().clip(max=100)
        return unit(h) * scale
    if kind == "vision":
        stem = getattr(pre.rgbt_stem.proj, "1")
        if x.dim() == 4:
            x = x.unsqueeze(2).repeat(1, 1, stem.kernel_size[0], 1, 1)
        h = stem(x).flatten(2).transpose(1, 2)
    else:
        h = pre.rgbt_stem.norm_layer(pre.rgbt_stem.proj(x).flatten(2).transpose(1, 2))
    h = torch.cat([pre.cls_token.expand(len(h), -1, -1), h], 1) + pre.pos_embedding_helper.pos_embed
    h = getattr(head, "2")(getattr(head, "0")(trunk(h))[:, 0])
    h = unit(h)
    if kind == "audio":
        h = h * getattr(m["modality_postprocessors"]["audio"], "1").log_logit_scale.exp().clip(max=100)
    return h if clips is None else h.reshape(*clips, -1).mean(1)


def halved(m):
    """The model with weights that f16 holds."""
    with torch.no_grad():
        for values in [*m.parameters(), *m.buffers()]:
            values.copy_(values.half().float())
    return m


def numbers(*shape):
    """Numbers that need not be stored."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (torch.sin(0.37 * i) + 0.5 * torch.cos(0.011 * i)).float().reshape(shape)


def case(tensors, name, m, kind, x):
    tensors[f"{name}.shape" if x.is_floating_point() else f"{name}.in"] = (
        torch.tensor(x.shape) if x.is_floating_point() else x)
    tensors[f"{name}.out"] = embed(m, kind, x).contiguous()


def texts(n, context, vocabulary):
    ids = torch.zeros(n, context, dtype=torch.int64)
    for i in range(n):
        length = int(torch.randint(0, context - 1, ()))
        ids[i, 0] = vocabulary - 2
        ids[i, 1:1 + length] = torch.randint(1, vocabulary - 2, (length,))
        ids[i, 1 + length] = vocabulary - 1
    return ids


tensors = {}
sizes = {
    "out_embed_dim": 20,
    "vision": {"width": 24, "blocks": 2, "heads": 3, "kernel": (2, 7, 7), "tokens": 25},
    "audio": {"width": 16, "blocks": 3, "heads": 2, "kernel": 16, "stride": 10, "tokens": 228},
    "text": {"width": 20, "blocks": 2, "heads": 5, "context": 11, "vocabulary": 53},
}
tiny = halved(model(sizes))
folder = HERE / "imagebind_tiny"
folder.mkdir(exist_ok=True)
state = {k: v.detach().half().contiguous() for k, v in tiny.state_dict().items()}
state["modality_trunks.depth.blocks.0.norm_1.weight"] = torch.zeros(3)
state["modality_heads.imu.0.weight"] = torch.zeros(3)
state["modality_preprocessors.thermal.cls_token"] = torch.zeros(1, 1, 3)
save_file(state, folder / "model.safetensors")
(folder / "config.json").write_text(json.dumps({
    "vision_embed_dim": 24, "vision_num_blocks": 2, "vision_num_heads": 3, "audio_embed_dim": 16, "audio_num_blocks": 3,
    "audio_num_heads": 2, "text_embed_dim": 20, "text_num_blocks": 2, "text_num_heads": 5, "out_embed_dim": 20,
}, indent=1) + "\n")
case(tensors, "tiny.image", tiny, "vision", numbers(3, 3, 35, 35))
case(tensors, "tiny.clips", tiny, "vision", numbers(2, 3, 3, 2, 35, 35))
case(tensors, "tiny.images", tiny, "vision", numbers(1, 2, 3, 35, 35))
case(tensors, "tiny.sound", tiny, "audio", numbers(1, 1, 128, 204))
case(tensors, "tiny.sounds", tiny, "audio", numbers(1, 2, 1, 128, 204))
case(tensors, "tiny.text", tiny, "text", texts(5, 11, 53))

sizes = {
    "out_embed_dim": 8,
    "vision": {"width": 16, "blocks": 1, "heads": 2, "kernel": (1, 5, 5), "tokens": 4},
    "audio": {"width": 12, "blocks": 1, "heads": 3, "kernel": 6, "stride": 4, "tokens": 4 * 7},
    "text": {"width": 8, "blocks": 1, "heads": 1, "context": 9, "vocabulary": 31},
}
wrapped = halved(model(sizes))
folder = HERE / "imagebind_wrapped"
folder.mkdir(exist_ok=True)
state = {f"model.{k}": v.detach().half() for k, v in wrapped.state_dict().items()}
del state["model.modality_postprocessors.audio.1.log_logit_scale"]
torch.save({"epoch": 3, "note": ["of a test"], "state_dict": state}, folder / "weights.ckpt")
(folder / "config.json").write_text(json.dumps({
    "vision_num_heads": 2, "audio_num_heads": 3, "text_num_heads": 1, "audio_kernel_size": 6, "audio_stride": 4,
    "audio_num_mel_bins": 18, "audio_target_len": 31,
}, indent=1) + "\n")
# Without its own scale, that of sounds is the usual one.
getattr(wrapped["modality_postprocessors"]["audio"], "1").log_logit_scale.fill_(math.log(20.0))
case(tensors, "wrapped.image", wrapped, "vision", numbers(2, 3, 10, 10))
case(tensors, "wrapped.sounds", wrapped, "audio", numbers(3, 2, 1, 18, 31))
case(tensors, "wrapped.text", wrapped, "text", texts(4, 9, 31))
save_file(tensors, HERE / "imagebind.safetensors")
