"""Writes published/*.safetensors: tiny published networks with random weights, inputs, and what the reference gives for them.

Run: pip install torch diffusers transformers safetensors && python published.py
Reference: UNet2DConditionModel, UNetMotionModel and AutoencoderKL of diffusers, SpeechT5HifiGan of transformers, f32, one thread on a CPU;
versions in the metadata. Names of first releases are those of the library's own converters, which have to give the weights back.

Tensors: `model.NAME` (f16, which the reference was rounded to), `in.NAME`, `out.NAME`; the metadata has the text of config.json, where
there is one, and those of a UNet and a MotionAdapter that hold the same weights in two folders.
"""

import contextlib
import json
import pathlib
import re

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).parent / "published"
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"


def randomise(model, seed):
    """No parameter at a value that hides it; all of them exact in f16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.2 if parameter.dim() == 1 else 0.3 * parameter.std().nan_to_num(0.3).clamp(0.05, 0.5)
            parameter.add_(noise * scale)
            parameter.copy_(parameter.half().float())
        for name, buffer in model.named_buffers():
            if name in ("mean", "scale"):
                buffer.add_(0.3 * torch.rand(buffer.shape, generator=generator))
                buffer.copy_(buffer.half().float())
    return model.eval()


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(name, weights, inputs, outputs, config=None, pair=None):
    tensors = {f"model.{key}": value.half().contiguous() for key, value in weights.items()}
    tensors |= {f"in.{key}": value.contiguous() for key, value in inputs.items()}
    tensors |= {f"out.{key}": value.float().contiguous() for key, value in outputs.items()}
    versions = f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    # One entry: the order of several would differ from run to run.
    text = json.dumps({"versions": versions, "config": config, "pair": pair})
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.safetensors"
    save_file({key: value.clone() for key, value in tensors.items()}, path, metadata={"golden": text})
    path.chmod(0o644)
    size = path.stat().st_size
    rms = {key: round(float(value.square().mean().sqrt()), 3) for key, value in outputs.items()}
    print(f"{name}: {size} bytes, {rms}")
    assert size < 400_000, name
    assert all(0.01 < value < 1e3 for value in rms.values()), rms


def config_of(model):
    return dict(model.config) | {"_class_name": type(model).__name__, "_diffusers_version": diffusers.__version__}


def state(model):
    return {key: value for key, value in model.state_dict().items()}


def unet(name, sample, text, timesteps, **settings):
    torch.manual_seed(1)
    model = randomise(diffusers.UNet2DConditionModel(**settings), 2)
    inputs = {
        "sample": normal(3, *sample),
        "timestep": torch.tensor(timesteps),
        "encoder_hidden_states": normal(4, *text),
    }
    out = model(**inputs).sample
    write(name, state(model), inputs, {"sample": out}, config_of(model))
    return model, inputs, out


def pictures():
    small = {"block_out_channels": (4, 8, 8, 12), "norm_num_groups": 2}
    model, inputs, out = unet(
        "unet_sd", (2, 4, 8, 16), (2, 7, 12), [981, 3], cross_attention_dim=12, attention_head_dim=2, **small,
    )
    write("unet_ldm", ldm_unet(model), inputs, {"sample": out}, config_of(model))
    unet(
        "unet_tango", (2, 8, 13, 7), (2, 5, 10), [500, 1], in_channels=8, out_channels=8, cross_attention_dim=10,
        attention_head_dim=(2, 4, 4, 3), use_linear_projection=True, upcast_attention=True, **small,
    )
    unet(
        "unet_odd", (1, 3, 9, 11), (1, 4, 6), [777], in_channels=3, out_channels=5, center_input_sample=True,
        flip_sin_to_cos=False, freq_shift=1, down_block_types=(PLAIN, CROSS, CROSS), up_block_types=(CROSS_UP, PLAIN_UP, CROSS_UP),
        block_out_channels=(12, 8, 16), layers_per_block=(1, 2, 1), downsample_padding=0, mid_block_scale_factor=1.5,
        act_fn="gelu", norm_num_groups=2, norm_eps=1e-3, cross_attention_dim=(6, 6, 6), transformer_layers_per_block=(1, 2, 1),
        attention_head_dim=(3, 2, 3), resnet_time_scale_shift="scale_shift", time_embedding_dim=20, conv_in_kernel=5, conv_out_kernel=1,
    )
    unet(
        "unet_plain", (2, 4, 7, 5), (2, 3, 4), [0, 999], down_block_types=(PLAIN, PLAIN), up_block_types=(PLAIN_UP, PLAIN_UP),
        block_out_channels=(9, 15), layers_per_block=1, norm_num_groups=3, cross_attention_dim=4, mid_block_type="UNetMidBlock2D",
    )


def ldm_unet(model):
    """The weights by the names of latent diffusion, checked with the library's converter from them."""
    layers = len(model.down_blocks[0].resnets)
    resnet = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
        "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }
    ends = {
        "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0", "conv_out": "out.2",
    }

    def rename(key):
        for old, new in ends.items():
            if key.startswith(old + "."):
                return new + key[len(old):]
        match = re.fullmatch(r"(down|mid|up)_blocks?\.?(\d*)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key)
        way, i, kind, j, rest = match.groups()
        i, j = int(i or 0), int(j)
        if kind == "resnets":
            part = next(part for part in resnet if rest.startswith(part + "."))
            rest = resnet[part] + rest[len(part):]
        if way == "mid":
            return f"middle_block.{1 if kind == 'attentions' else 2 * j}.{rest}"
        if way == "down":
            if kind == "downsamplers":
                return f"input_blocks.{1 + i * (layers + 1) + layers}.0.{rest.replace('conv', 'op')}"
            return f"input_blocks.{1 + i * (layers + 1) + j}.{0 if kind == 'resnets' else 1}.{rest}"
        if kind == "upsamplers":
            place = 2 if hasattr(model.up_blocks[i], "attentions") else 1
            return f"output_blocks.{i * (layers + 1) + layers}.{place}.{rest}"
        return f"output_blocks.{i * (layers + 1) + j}.{0 if kind == 'resnets' else 1}.{rest}"

    weights = {f"model.diffusion_model.{rename(key)}": value for key, value in state(model).items()}
    config = dict(model.config)
    back = single_file_utils.convert_ldm_unet_checkpoint(dict(weights), config)
    same(back, state(model))
    # Files of whole pipelines hold other networks too.
    return weights | {"first_stage_model.quant_conv.bias": torch.zeros(3)}


def same(found, expected):
    assert sorted(found) == sorted(expected), set(found) ^ set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key].reshape(value.shape), value), key


def clips():
    small = {
        "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 6,
        "down_block_types": (CROSS, PLAIN), "up_block_types": (PLAIN_UP, CROSS_UP), "attention_head_dim": 2,
    }
    for name, heads, mid, frames, size in [("motion_mid", 4, True, 5, (7, 6)), ("motion_plain", (2, 8), False, 3, (8, 4))]:
        torch.manual_seed(1)
        still = diffusers.UNet2DConditionModel(**small)
        adapter = diffusers.MotionAdapter(
            block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=heads, motion_norm_num_groups=4,
            motion_max_seq_length=6, use_motion_mid_block=mid,
        )
        model = randomise(diffusers.UNetMotionModel.from_unet2d(still, adapter), 5)
        for key, table in model.named_buffers():
            if key.endswith(".pe") and not mid:
                table.copy_(table.half().float())
        inputs = {
            "sample": normal(6, 2, 4, frames, *size),
            "timestep": torch.tensor([901, 20]),
            "encoder_hidden_states": normal(7, 2, 5, 6),
        }
        out = motion(model, inputs)
        configs = {"unet": config_of(still), "motion_adapter": config_of(adapter)}
        # Tables of places follow from their size: one file has them, in f16 as everything, and one does not.
        weights = {key: value for key, value in state(model).items() if not (mid and key.endswith(".pe"))}
        write(name, weights, inputs, {"sample": out}, config_of(model), configs)
        if name == "motion_plain":
            joint(still, adapter, model, inputs, configs)


def motion(model, inputs):
    frames = inputs["sample"].shape[2]
    text = inputs["encoder_hidden_states"].repeat_interleave(frames, dim=0)
    return model(inputs["sample"], inputs["timestep"], text).sample


@contextlib.contextmanager
def authors_norms(model, clips, frames):
    """Norms of residual blocks and the last one over all frames, those of motion modules over one."""
    plain = torch.nn.GroupNorm.forward
    shared = {id(model.conv_norm_out)}
    for module in model.modules():
        if type(module).__name__ == "ResnetBlock2D":
            shared |= {id(module.norm1), id(module.norm2)}
    apart = {id(module.norm) for module in model.modules() if type(module).__name__ == "AnimateDiffTransformer3D"}

    def forward(self, x):
        if id(self) in shared:
            whole = x.reshape(clips, frames, *x.shape[1:]).transpose(1, 2)
            return plain(self, whole).transpose(1, 2).reshape(x.shape)
        if id(self) in apart:
            pictures = x.transpose(1, 2).reshape(clips * frames, x.shape[1], *x.shape[3:])
            return plain(self, pictures).reshape(clips, frames, *pictures.shape[1:]).transpose(1, 2)
        return plain(self, x)

    torch.nn.GroupNorm.forward = forward
    try:
        yield
    finally:
        torch.nn.GroupNorm.forward = plain


def animate_diff(key):
    if ".motion_modules." not in key:
        return key
    key = re.sub(r"(\.motion_modules\.\d+)\.", r"\1.temporal_transformer.", key)
    for old, new in [
        ("attn1.", "attention_blocks.0."), ("attn2.", "attention_blocks.1."), ("norm1.", "norms.0."), ("norm2.", "norms.1."),
        ("norm3.", "ff_norm."), ("pos_embed.pe", "attention_blocks.0.pos_encoder.pe"),
    ]:
        key = re.sub(rf"(transformer_blocks\.\d+\.){re.escape(old)}", rf"\g<1>{new}", key)
    return key


def joint(still, adapter, video, inputs, configs):
    """The authors' networks: a clip that reads a sound at the narrowest place."""
    settings = dict(still.config) | {"in_channels": 3, "out_channels": 3, "use_linear_projection": True, "attention_head_dim": (2, 4)}
    torch.manual_seed(8)
    kept = {key: settings[key] for key in settings if not key.startswith("_")}
    audio = randomise(diffusers.UNet2DConditionModel(**kept), 9)
    width = 16
    fusion = randomise(torch.nn.ModuleDict({
        name: torch.nn.Linear(width, width) for name in ("query", "key", "value", "output")
    }), 10)
    sound = normal(11, 2, 3, 10, 4)
    heard = []
    audio.mid_block.register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    audio_out = audio(sound, inputs["timestep"], inputs["encoder_hidden_states"]).sample
    clips, _, frames = inputs["sample"].shape[:3]

    def read(module, args, out):
        flat = lambda x: x.flatten(2).transpose(1, 2).reshape(clips, -1, width)
        split = lambda x: x.reshape(clips, -1, 8, width // 8).transpose(1, 2)
        x = flat(out)
        q, k, v = split(fusion["query"](x)), split(fusion["key"](flat(heard[0]))), split(fusion["value"](flat(heard[0])))
        weights = (q @ k.transpose(2, 3) / (width / 8) ** 0.5).softmax(-1)
        x = x + fusion["output"]((weights @ v).transpose(1, 2).reshape(x.shape))
        return x.reshape(clips * frames, -1, width).transpose(1, 2).reshape(out.shape)

    with authors_norms(video, clips, frames):
        alone = motion(video, inputs)
        hook = video.mid_block.register_forward_hook(read)
        together = motion(video, inputs)
        hook.remove()
    weights = {f"module.{animate_diff(key)}": value for key, value in state(video).items()}
    weights |= {f"module.audio_unet.{key}": value for key, value in state(audio).items()}
    weights |= {f"module.cross_attn.{key}": value for key, value in fusion.state_dict().items()}
    weights |= {f"module.linear_a.{key}": value for key, value in torch.nn.Linear(10, 3).state_dict().items()}
    config = {
        "_class_name": "TavDiffusionUnet", "video": configs["unet"], "audio": config_of(audio), "fuse": "v_from_a",
        "motion": configs["motion_adapter"] | {"resnet_norm_over_frames": True, "motion_norm_over_frames": False},
    }
    given = {"video": inputs["sample"], "audio": sound, "timestep": inputs["timestep"],
             "encoder_hidden_states": inputs["encoder_hidden_states"]}
    write("tav_joint", weights, given, {"video": together, "audio": audio_out, "video_alone": alone}, config)


def autoencoders():
    down, up = ("DownEncoderBlock2D",), ("UpDecoderBlock2D",)
    for name, sample, latent, settings in [
        ("vae_pictures", (2, 3, 21, 16), (2, 4, 3, 5), {
            "block_out_channels": (8, 12, 16), "layers_per_block": 2, "norm_num_groups": 4, "down_block_types": down * 3,
            "up_block_types": up * 3,
        }),
        ("vae_mel", (1, 1, 24, 8), (1, 8, 6, 2), {
            "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1, "latent_channels": 8,
            "norm_num_groups": 2, "down_block_types": down * 2, "up_block_types": up * 2, "scaling_factor": 0.9228,
        }),
        ("vae_bare", (1, 2, 6, 5), (1, 3, 4, 7), {
            "in_channels": 2, "out_channels": 1, "block_out_channels": (6, 9), "layers_per_block": 1, "latent_channels": 3,
            "norm_num_groups": 3, "down_block_types": down * 2, "up_block_types": up * 2, "use_quant_conv": False,
            "use_post_quant_conv": False, "mid_block_add_attention": False, "act_fn": "relu",
        }),
    ]:
        torch.manual_seed(1)
        model = randomise(diffusers.AutoencoderKL(**settings), 12)
        inputs = {"sample": normal(13, *sample), "latent": normal(14, *latent)}
        posterior = model.encode(inputs["sample"]).latent_dist
        outputs = {
            "mean": posterior.mean, "logvar": posterior.logvar, "sample": model.decode(inputs["latent"]).sample,
        }
        weights = state(model)
        if name == "vae_pictures":
            for new, old in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]:
                weights = {key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): value for key, value in weights.items()}
        write(name, weights, inputs, outputs, config_of(model))

    # Alone, as it lies in the file of a pipeline: groups are 32 there, and no configuration says so.
    torch.manual_seed(1)
    model = randomise(diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(32, 32), layers_per_block=1, latent_channels=8, down_block_types=down * 2,
        up_block_types=up * 2,
    ), 15)
    latent = normal(16, 1, 8, 5, 4)
    decoder = {key: value for key, value in state(model).items() if key.startswith(("decoder.", "post_quant_conv."))}
    write("vae_ldm", ldm_vae(model, decoder), {"latent": latent}, {"sample": model.decode(latent).sample})


def ldm_vae(model, wanted):
    """The weights by the names of latent diffusion, checked with the library's converter from them."""
    blocks = len(model.config.block_out_channels)
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

    def rename(key, value):
        key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        for old, new in attention.items():
            if f"mid_block.attentions.0.{old}." in key:
                key = key.replace(f"mid_block.attentions.0.{old}.", f"mid.attn_1.{new}.")
                return key, value[:, :, None, None] if value.dim() == 2 else value
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = re.sub(r"down_blocks\.(\d)", r"down.\1", key)
        key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}", key)
        key = key.replace(".resnets.", ".block.").replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        return key, value

    def all_of(weights):
        return {f"first_stage_model.{key}": value for key, value in (rename(*item) for item in weights.items())}

    back = single_file_utils.convert_ldm_vae_checkpoint(all_of(state(model)), dict(model.config))
    same(back, state(model))
    return all_of(wanted) | {"scale_factor": torch.tensor(0.9228), "first_stage_model.loss.logvar": torch.zeros(())}


def vocoders():
    for name, frames, settings in [
        ("vocoder_normed", 9, {
            "model_in_dim": 10, "upsample_initial_channel": 16, "upsample_rates": (4, 3), "upsample_kernel_sizes": (8, 6),
            "resblock_kernel_sizes": (3, 5), "resblock_dilation_sizes": ((1, 3), (1, 2)), "leaky_relu_slope": 0.2,
        }),
        ("vocoder_audioldm", 7, {
            "model_in_dim": 64, "upsample_initial_channel": 32, "upsample_rates": (5, 4, 2, 2, 2),
            "upsample_kernel_sizes": (16, 16, 8, 4, 4), "normalize_before": False,
        }),
    ]:
        torch.manual_seed(1)
        model = randomise(transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**settings)), 17)
        mel = normal(18, 2, frames, settings["model_in_dim"])
        hop = 1
        for rate in settings["upsample_rates"]:
            hop *= rate
        wave = model(mel)[:, :hop * frames]
        config = json.loads(model.config.to_json_string(use_diff=False))
        write(name, state(model), {"mel": mel}, {"waveform": wave}, config)
        if name == "vocoder_normed":
            # The same by lengths and directions, in names of the original.
            weights = {}
            for key, value in state(model).items():
                key = "vocoder." + key.replace("upsampler.", "ups.")
                if key.endswith(".weight"):
                    norm = value.flatten(1).norm(dim=1).reshape(-1, *[1] * (value.dim() - 1))
                    weights[key + "_g"], weights[key + "_v"] = norm.half().float(), value
                else:
                    weights[key] = value
            with torch.no_grad():
                for key, value in model.named_parameters():
                    if key.endswith("weight"):
                        name_g = "vocoder." + key.replace("upsampler.", "ups.") + "_g"
                        norm = value.flatten(1).norm(dim=1).reshape(-1, *[1] * (value.dim() - 1))
                        value.mul_(weights[name_g] / norm)
            weights = {key: value.clone() for key, value in weights.items()}
            for key in list(weights):
                if key.endswith("weight_v"):
                    weights[key] = weights[key].half().float()
            write("vocoder_parts", weights, {"mel": mel}, {"waveform": model(mel)[:, :hop * frames]}, config)


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    pictures()
    clips()
    autoencoders()
    vocoders()


if __name__ == "__main__":
    main()
