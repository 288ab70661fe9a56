"""Writes published/*.safetensors: what diffusers and transformers make of inputs with tiny published networks of random weights.

Run: pip install torch diffusers transformers safetensors && python published.py
Reference: UNet2DConditionModel, UNetMotionModel and AutoencoderKL of diffusers, SpeechT5HifiGan of transformers, f32, one thread on a CPU;
versions in the metadata. Names of first releases go through the library's own converters, which have to give the weights back.

Weights and inputs are drawn from their names (drawn.py): weights by `plain`, inputs from NAME.INPUT with a deviation of 1. A file holds
the outputs; its metadata has the text of config.json, a digest of the names and shapes of all weights, the shapes of the inputs or their
whole numbers, and the configurations of a UNet and a MotionAdapter that hold the same weights in two folders. NAME.drawn.json, where
there is one, lists the weights by the names of a first release.
"""

import contextlib
import copy
import json
import pathlib
import re

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file

import drawn

FOLDER = pathlib.Path(__file__).parent / "published"
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"


def own(model, tables=False, first=""):
    """The tensors of a model that are drawn: its parameters, the statistics of a vocoder, and where asked its tables of places."""
    tensors = dict(model.named_parameters())
    kept = ("mean", "scale", *([".pe"] if tables else []))
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name.endswith(kept)}
    return {first + name: tensor for name, tensor in tensors.items()}


def randomise(tensors):
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(drawn.draw(name, tensor.shape, *drawn.plain(name, tensor.shape))))


def ready(model, tables=False):
    randomise(own(model, tables))
    return model.eval()


def unit(name, *shape):
    return torch.from_numpy(drawn.draw(name, shape, drawn.exponent(1.0)))


def given(name, **inputs):
    """Inputs of a golden file: tuples are shapes, lists whole numbers."""
    tensor = lambda key, how: torch.tensor(how) if isinstance(how, list) else unit(f"{name}.{key}", *how)
    return {key: tensor(key, how) for key, how in inputs.items()}, {key: list(how) for key, how in inputs.items()}


def write(name, weights, inputs, outputs, config=None, pair=None, tables=False):
    """`weights` by their names in the file, `inputs` as they were `given`."""
    versions = f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    digest = drawn.digest({key: tuple(value.shape) for key, value in weights.items()})
    # One entry: the order of several would differ from run to run.
    text = json.dumps({"versions": versions, "config": config, "pair": pair, "inputs": inputs, "digest": digest, "tables": tables})
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.safetensors"
    save_file({key: value.float().contiguous().clone() for key, value in outputs.items()}, path, metadata={"golden": text})
    path.chmod(0o644)
    rms = {key: round(float(value.square().mean().sqrt()), 3) for key, value in outputs.items()}
    print(f"{name}: {path.stat().st_size} bytes, {rms}")
    assert all(0.01 < value < 1e3 for value in rms.values()), rms


def config_of(model):
    return dict(model.config) | {"_class_name": type(model).__name__, "_diffusers_version": diffusers.__version__}


def exact(model, tensors):
    """The sample in f64: norms of a handful of values leave f32 of the reference itself 2e-5 apart from it."""
    wide = {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}
    with torch.no_grad():
        return copy.deepcopy(model).double()(**wide).sample


def unet(name, sample, text, timesteps, write_it=True, **settings):
    model = ready(diffusers.UNet2DConditionModel(**settings))
    tensors, inputs = given(name, sample=sample, timestep=timesteps, encoder_hidden_states=text)
    out = exact(model, tensors)
    if write_it:
        write(name, own(model), inputs, {"sample": out}, config_of(model))
    return model, tensors, inputs


def pictures():
    small = {"block_out_channels": (4, 8, 8, 12), "norm_num_groups": 2}
    unet("unet_sd", (2, 4, 8, 16), (2, 7, 12), [981, 3], cross_attention_dim=12, attention_head_dim=2, **small)
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
    unet(
        "unet_readers", (2, 4, 6, 9), (2, 5, 6), [321, 12], down_block_types=(CROSS, PLAIN), up_block_types=(PLAIN_UP, CROSS_UP),
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=6, attention_head_dim=2,
        only_cross_attention=(True, False),
    )
    # By the names of latent diffusion.
    name = "unet_ldm"
    model, tensors, inputs = unet(
        name, (1, 4, 8, 6), (1, 7, 12), [250], write_it=False, down_block_types=(CROSS, CROSS, PLAIN),
        up_block_types=(PLAIN_UP, CROSS_UP, CROSS_UP), block_out_channels=(4, 8, 8), layers_per_block=1, norm_num_groups=2,
        cross_attention_dim=12, attention_head_dim=2,
    )
    first = ldm_unet(model)
    redraw(name, first)
    out = exact(model, tensors)
    back = single_file_utils.convert_ldm_unet_checkpoint(dict(first), dict(model.config))
    same(back, model.state_dict())
    write(name, first, inputs, {"sample": out}, config_of(model))


def redraw(name, tensors):
    """Draws tensors by the names that they have here, and lists them beside the golden file."""
    remembered = drawn.Drawn()
    with torch.no_grad():
        for key, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(remembered(key, tensor.shape, *drawn.plain(key, tensor.shape))))
    FOLDER.mkdir(exist_ok=True)
    remembered.save(FOLDER / f"{name}.drawn.json")


def ldm_unet(model):
    """The parameters by the names of latent diffusion."""
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

    return {f"model.diffusion_model.{rename(key)}": value for key, value in own(model).items()}


def same(found, expected):
    assert sorted(found) == sorted(expected), set(found) ^ set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key].reshape(value.shape), value), key


def clips():
    small = {
        "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 6,
        "down_block_types": (CROSS, PLAIN), "up_block_types": (PLAIN_UP, CROSS_UP), "attention_head_dim": 2,
    }
    for name, heads, mid, frames, size, linear in [
        ("motion_mid", 4, True, 5, (7, 6), True), ("motion_plain", (2, 8), False, 3, (8, 4), False),
    ]:
        still = diffusers.UNet2DConditionModel(**small, use_linear_projection=linear)
        adapter = diffusers.MotionAdapter(
            block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=heads, motion_norm_num_groups=4,
            motion_max_seq_length=6, use_motion_mid_block=mid,
        )
        # Tables of places follow from their size: one file has them, and not as they would be, and one has none.
        model = ready(diffusers.UNetMotionModel.from_unet2d(still, adapter), tables=not mid)
        tensors, inputs = given(name, sample=(2, 4, frames, *size), timestep=[901, 20], encoder_hidden_states=(2, 5, 6))
        configs = {"unet": config_of(still), "motion_adapter": config_of(adapter)}
        out = motion(model, tensors)
        write(name, own(model, tables=not mid), inputs, {"sample": out}, config_of(model), configs, tables=not mid)
        if mid:
            continue
        # The library's own converter undoes the names of AnimateDiff.
        modules = {key: value for key, value in model.state_dict().items() if ".motion_modules." in key}
        first = {animate_diff(key): value for key, value in modules.items()}
        back = single_file_utils.convert_animatediff_checkpoint_to_diffusers(first)
        for key, value in back.items():
            assert torch.equal(modules[key], value), key
        still = diffusers.UNet2DConditionModel(**small)
        joint(still, diffusers.UNetMotionModel.from_unet2d(still, adapter), configs)


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


def joint(still, video, configs):
    """The authors' networks: a clip that reads a sound at the narrowest place."""
    settings = dict(still.config) | {"in_channels": 3, "out_channels": 3, "use_linear_projection": True, "attention_head_dim": (2, 4)}
    audio = diffusers.UNet2DConditionModel(**{key: settings[key] for key in settings if not key.startswith("_")}).eval()
    width = 16
    fusion = torch.nn.ModuleDict({name: torch.nn.Linear(width, width) for name in ("query", "key", "value", "output")})
    weights = own(video.eval()) | own(audio, first="audio_unet.") | own(fusion, first="cross_attn.")
    randomise(weights)
    name = "tav_joint"
    tensors, inputs = given(
        name, video=(2, 4, 3, 8, 4), audio=(2, 3, 10, 4), timestep=[901, 20], encoder_hidden_states=(2, 5, 6),
    )
    of_clip = {key: value for key, value in tensors.items() if key not in ("video", "audio")} | {"sample": tensors["video"]}
    heard = []
    audio.mid_block.register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    audio_out = audio(tensors["audio"], tensors["timestep"], tensors["encoder_hidden_states"]).sample
    clips, _, frames = tensors["video"].shape[:3]

    def read(module, args, out):
        flat = lambda x: x.flatten(2).transpose(1, 2).reshape(clips, -1, width)
        split = lambda x: x.reshape(clips, -1, 8, width // 8).transpose(1, 2)
        x = flat(out.reshape(clips, frames, *out.shape[1:]).transpose(1, 2))
        q, k, v = split(fusion["query"](x)), split(fusion["key"](flat(heard[0]))), split(fusion["value"](flat(heard[0])))
        weights = (q @ k.transpose(2, 3) / (width / 8) ** 0.5).softmax(-1)
        x = x + fusion["output"]((weights @ v).transpose(1, 2).reshape(x.shape))
        return x.reshape(clips, frames, -1, width).transpose(2, 3).reshape(out.shape)

    with authors_norms(video, clips, frames):
        alone = motion(video, of_clip)
        hook = video.mid_block.register_forward_hook(read)
        together = motion(video, of_clip)
        hook.remove()
    config = {
        "_class_name": "TavDiffusionUnet", "video": configs["unet"], "audio": config_of(audio), "fuse": "v_from_a",
        "motion": configs["motion_adapter"] | {"resnet_norm_over_frames": True, "motion_norm_over_frames": False},
    }
    write(name, weights, inputs, {"video": together, "audio": audio_out, "video_alone": alone}, config)


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
        model = ready(diffusers.AutoencoderKL(**settings))
        tensors, inputs = given(name, sample=sample, latent=latent)
        posterior = model.encode(tensors["sample"]).latent_dist
        outputs = {"mean": posterior.mean, "logvar": posterior.logvar, "sample": model.decode(tensors["latent"]).sample}
        write(name, own(model), inputs, outputs, config_of(model))

    # Alone, as it lies in the file of a pipeline: groups are 32 there, and no configuration says so.
    name = "vae_ldm"
    model = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(32, 32), layers_per_block=1, latent_channels=8, down_block_types=down * 2,
        up_block_types=up * 2,
    ).eval()
    first = ldm_vae(model)
    wanted = {key: value for key, value in first.items() if key.split(".")[1] in ("decoder", "post_quant_conv")}
    redraw(name, wanted)
    back = single_file_utils.convert_ldm_vae_checkpoint(dict(first), dict(model.config))
    same(back, model.state_dict())
    tensors, inputs = given(name, latent=(1, 8, 5, 4))
    write(name, wanted, inputs, {"sample": model.decode(tensors["latent"]).sample})


def ldm_vae(model):
    """The parameters by the names of latent diffusion."""
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

    renamed = (rename(key, value.detach()) for key, value in own(model).items())
    return {f"first_stage_model.{key}": value for key, value in renamed}


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
        model = ready(transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**settings)))
        tensors, inputs = given(name, mel=(2, frames, settings["model_in_dim"]))
        hop = 1
        for rate in settings["upsample_rates"]:
            hop *= rate
        config = json.loads(model.config.to_json_string(use_diff=False))
        write(name, own(model), inputs, {"waveform": model(tensors["mel"])[:, :hop * frames]}, config)
        if name == "vocoder_normed":
            parts(model, config, hop * frames, settings["model_in_dim"], frames)


def parts(model, config, samples, bands, frames):
    """A vocoder by lengths and directions, in names of the original."""
    name, weights = "vocoder_parts", {}
    with torch.no_grad():
        for key, value in own(model).items():
            key = "vocoder." + key.replace("upsampler.", "ups.")
            if not key.endswith(".weight"):
                weights[key] = value
                continue
            # A length for each slice of the first axis, of a transposed convolution too.
            length, direction = torch.zeros(len(value), *[1] * (value.dim() - 1)), value.clone()
            weights[key + "_g"], weights[key + "_v"] = length, direction
        randomise(weights)
        for key, value in own(model).items():
            key = "vocoder." + key.replace("upsampler.", "ups.")
            if key.endswith(".weight"):
                length, direction = weights[key + "_g"], weights[key + "_v"]
                norm = direction.flatten(1).norm(dim=1).reshape(length.shape)
                value.copy_(direction * length / norm)
    tensors, inputs = given(name, mel=(2, frames, bands))
    write(name, weights, inputs, {"waveform": model(tensors["mel"])[:, :samples]}, config)


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    pictures()
    clips()
    autoencoders()
    vocoders()


if __name__ == "__main__":
    main()
