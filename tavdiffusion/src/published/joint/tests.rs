use super::*;
use crate::testing::{apart, normal, perturb};
use fulgur_lightnet::params::Params;

fn config(fuse: &str) -> TavConfig {
    let unet = |channels: usize| {
        format!(
            r#"{{"in_channels": {channels}, "out_channels": {channels}, "block_out_channels": [8, 16], "norm_num_groups": 4,
            "layers_per_block": 1, "cross_attention_dim": 6, "attention_head_dim": 2,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}}"#
        )
    };
    let json = format!(
        r#"{{"video": {}, "audio": {}, "fuse": "{fuse}",
        "motion": {{"block_out_channels": [8, 16], "motion_layers_per_block": 1, "motion_norm_num_groups": 4,
        "motion_num_attention_heads": 2, "motion_max_seq_length": 5, "use_motion_mid_block": false}}}}"#,
        unet(4),
        unet(3)
    );
    serde_json::from_str(&json).unwrap()
}

struct Inputs {
    video: Tensor,
    audio: Tensor,
    time: Tensor,
    text: Tensor,
}

fn inputs() -> Result<Inputs> {
    Ok(Inputs {
        video: normal("video", &[2, 4, 3, 4, 6])?,
        audio: normal("audio", &[2, 3, 8, 4])?,
        time: Tensor::new(&[7f32, 901.0], &Device::Cpu)?,
        text: normal("text", &[2, 5, 6])?,
    })
}

fn run(network: &TavUnet, video: bool, audio: bool) -> Result<Predicted> {
    let given = inputs()?;
    network.forward(
        video.then_some(&given.video),
        audio.then_some(&given.audio),
        &given.time,
        Some(&given.text),
    )
}

fn far(a: &Option<Tensor>, b: &Option<Tensor>) -> Result<f32> {
    match (a, b) {
        (Some(a), Some(b)) => apart(a, b),
        _ => bail!("a stream is missing"),
    }
}

#[test]
fn streams_that_are_apart_are_two_networks() -> Result<()> {
    for (fuse, video_changes, audio_changes) in [
        ("apart", false, false),
        ("v_from_a", true, false),
        ("a_from_v", false, true),
        ("both", true, true),
    ] {
        let params = Params::random(10, &Device::Cpu);
        let network = TavUnet::new(&config(fuse), &params.builder())?;
        // A fresh fusion has an output of zeros: joint is as apart.
        let (both, video, audio) = (
            run(&network, true, true)?,
            run(&network, true, false)?,
            run(&network, false, true)?,
        );
        assert!(far(&both.video, &video.video)? < 1e-6 && far(&both.audio, &audio.audio)? < 1e-6);
        assert!(video.audio.is_none() && audio.video.is_none() && audio.places.is_none());
        perturb(&params, 0.1)?;
        let network = TavUnet::new(&config(fuse), &params.builder())?;
        let (both, video, audio) = (
            run(&network, true, true)?,
            run(&network, true, false)?,
            run(&network, false, true)?,
        );
        assert_eq!(far(&both.video, &video.video)? > 1e-5, video_changes, "{fuse}");
        assert_eq!(far(&both.audio, &audio.audio)? > 1e-5, audio_changes, "{fuse}");
        let Some((heard, seen)) = both.places else {
            bail!("no places");
        };
        // 8 x 4 and 3 x 4 x 6 places, at half the sides.
        assert_eq!((heard.dims(), seen.dims()), (&[2, 8, 16][..], &[2, 18, 16][..]));
        assert!(run(&network, false, false).is_err());
    }
    Ok(())
}

#[test]
fn generators_ask_in_fractions_of_the_schedule() -> Result<()> {
    let params = Params::random(11, &Device::Cpu);
    let network = TavUnet::new(&config("v_from_a"), &params.builder())?;
    perturb(&params, 0.1)?;
    let given = inputs()?;
    let latents = Latents {
        video: given.video.permute((0, 2, 3, 4, 1))?.contiguous()?,
        audio: given.audio.permute((0, 2, 3, 1))?.contiguous()?,
    };
    let text = TextCondition {
        states: given.text.clone(),
        mask: Tensor::ones((2, 5), DType::F32, &Device::Cpu)?,
    };
    let time = (given.time.clone() / 999.0)?;
    let found = network.predict(&latents, &time, &text)?;
    let expected = run(&network, true, true)?;
    assert!(
        far(
            &Some(found.video.permute((0, 4, 1, 2, 3))?.contiguous()?),
            &expected.video
        )? < 1e-6
    );
    assert!(
        far(
            &Some(found.audio.permute((0, 3, 1, 2))?.contiguous()?),
            &expected.audio
        )? < 1e-6
    );
    Ok(())
}

#[test]
fn the_authors_names_are_understood() -> Result<()> {
    let translation = translation(&config("v_from_a"), WRAPPER, UnetNames::AnimateDiff)?;
    for (name, expected) in [
        ("conv_in.weight", "module.conv_in.weight"),
        (
            "down_blocks.0.motion_modules.0.transformer_blocks.0.norm3.bias",
            "module.down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.ff_norm.bias",
        ),
        ("audio_unet.conv_in.bias", "module.audio_unet.conv_in.bias"),
        ("cross_attn.query.bias", "module.cross_attn.query.bias"),
    ] {
        assert_eq!(translation(name), Stored::As(expected.to_owned()));
    }
    Ok(())
}
