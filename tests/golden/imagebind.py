"""Writes imagebind_tiny/, imagebind_wrapped/, imagebind.safetensors and imagebind.drawn.json: small random ImageBind models, and what
they make of inputs.

Run: pip install torch==2.15.0 numpy safetensors && python imagebind.py (seconds)
Reference: plain PyTorch modules, put together below as the paper (Girdhar et al., 2023) and the names of its checkpoint say.

imagebind_tiny: config.json and weights, with towers that nobody reads, drawn (drawn.py) but for the mask of the text tower;
imagebind_wrapped: weights.ckpt of torch.save in f16, below "state_dict" and the prefix "model."; its vision tower has patches of one
frame.
MODEL.NAME.in (drawn, or i64), MODEL.NAME.out: inputs and embeddings of images, clips, several clips, sounds, several sounds and texts
"""

import json
import math
import pathlib

import torch
from safetensors.torch import save_file
from torch import nn

import drawn

HERE = pathlib.Path(__file__).parent
TINY = {
    "out_embed_dim": 20,
    "vision": {"width": 36, "blocks": 2, "heads": 3, "kernel": (2, 7, 7), "tokens": 25},
    "audio": {"width": 24, "blocks": 3, "heads": 2, "kernel": 16, "stride": 10, "tokens": 228},
    "text": {"width": 40, "blocks": 2, "heads": 5, "context": 11, "vocabulary": 53},
}
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
    return whole


def places(name, shape):
    """Exponent and centre of a parameter; a scale near log(1 / 0.07)."""
    return [drawn.exponent(0.1), 2.625] if name.endswith("log_logit_scale") else drawn.usual(name, shape)


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


def case(tensors, inputs, name, m, kind, x):
    """x: ids, or the shape of an input that is drawn."""
    if isinstance(x, tuple):
        x = torch.from_numpy(inputs(f"{name}.in", x, -7))
    else:
        tensors[f"{name}.in"] = x
    tensors[f"{name}.out"] = embed(m, kind, x).contiguous()


def texts(n, context, vocabulary):
    ids = torch.zeros(n, context, dtype=torch.int64)
    for i in range(n):
        length = int(torch.randint(0, context - 1, ()))
        ids[i, 0] = vocabulary - 2
        ids[i, 1:1 + length] = torch.randint(1, vocabulary - 2, (length,))
        ids[i, 1 + length] = vocabulary - 1
    return ids


def main():
    tensors, inputs, weights = {}, drawn.Drawn(), drawn.Drawn()
    tiny = drawn.fill(model(TINY), weights, how=places)
    folder = HERE / "imagebind_tiny"
    folder.mkdir(exist_ok=True)
    rest = {k: v.detach().clone().contiguous() for k, v in tiny.state_dict().items() if k not in weights.how}
    for unread in ["trunks.depth.blocks.0.norm_1.weight", "heads.imu.0.weight", "preprocessors.thermal.cls_token"]:
        weights(f"modality_{unread}", (1, 1, 3) if "token" in unread else (3,), -9)
    weights.save(folder / "drawn.json")
    save_file(rest, folder / "rest.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "vision_embed_dim": 36, "vision_num_blocks": 2, "vision_num_heads": 3, "audio_embed_dim": 24, "audio_num_blocks": 3,
        "audio_num_heads": 2, "text_embed_dim": 40, "text_num_blocks": 2, "text_num_heads": 5, "out_embed_dim": 20,
    }, indent=1) + "\n")
    case(tensors, inputs, "tiny.image", tiny, "vision", (3, 3, 35, 35))
    case(tensors, inputs, "tiny.clips", tiny, "vision", (2, 3, 3, 2, 35, 35))
    case(tensors, inputs, "tiny.images", tiny, "vision", (1, 2, 3, 35, 35))
    case(tensors, inputs, "tiny.sound", tiny, "audio", (1, 1, 128, 204))
    case(tensors, inputs, "tiny.sounds", tiny, "audio", (1, 2, 1, 128, 204))
    case(tensors, inputs, "tiny.text", tiny, "text", texts(5, 11, 53))

    sizes = {
        "out_embed_dim": 8,
        "vision": {"width": 16, "blocks": 1, "heads": 2, "kernel": (1, 5, 5), "tokens": 4},
        "audio": {"width": 12, "blocks": 1, "heads": 3, "kernel": 6, "stride": 4, "tokens": 4 * 7},
        "text": {"width": 8, "blocks": 1, "heads": 1, "context": 9, "vocabulary": 31},
    }
    wrapped = drawn.fill(model(sizes), drawn.Drawn(), how=places)
    with torch.no_grad():
        for p in wrapped.parameters():
            p.copy_(p.half().float())
    folder = HERE / "imagebind_wrapped"
    folder.mkdir(exist_ok=True)
    state = {f"model.{k}": v.detach().half() for k, v in wrapped.state_dict().items()}
    del state["model.modality_postprocessors.audio.1.log_logit_scale"]
    torch.save({"epoch": 3, "note": ["of a test"], "state_dict": state}, folder / "weights.ckpt")
    (folder / "config.json").write_text(json.dumps({
        "vision_num_heads": 2, "audio_num_heads": 3, "text_num_heads": 1, "audio_kernel_size": 6, "audio_stride": 4,
        "audio_num_mel_bins": 18, "audio_target_len": 31,
    }, indent=1) + "\n")
    # What f16 keeps of the text scale.
    with torch.no_grad():
        scale = getattr(wrapped["modality_postprocessors"]["text"], "1").log_logit_scale
        scale.copy_(scale.half().float())
    case(tensors, inputs, "wrapped.image", wrapped, "vision", (2, 3, 10, 10))
    case(tensors, inputs, "wrapped.sounds", wrapped, "audio", (3, 2, 1, 18, 31))
    case(tensors, inputs, "wrapped.text", wrapped, "text", texts(4, 9, 31))
    save_file(tensors, HERE / "imagebind.safetensors")
    inputs.save(HERE / "imagebind.drawn.json")


if __name__ == "__main__":
    main()
