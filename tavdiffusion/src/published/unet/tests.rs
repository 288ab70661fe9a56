use super::*;
use crate::testing::{apart, normal, perturb};
use candle_core::Device;
use fulgur_lightnet::params::Params;

fn pictures() -> UnetConfig {
    let json = r#"{"block_out_channels": [8, 12, 16], "norm_num_groups": 4, "layers_per_block": [1, 2, 1], "cross_attention_dim": 6,
        "attention_head_dim": [2, 3, 4], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}"#;
    serde_json::from_str(json).unwrap()
}

fn adapter(more: &str) -> MotionAdapterConfig {
    let json = format!(
        r#"{{"block_out_channels": [8, 12, 16], "motion_layers_per_block": [1, 2, 1], "motion_norm_num_groups": 4,
        "motion_num_attention_heads": 2, "motion_max_seq_length": 4{more}}}"#
    );
    serde_json::from_str(&json).unwrap()
}

fn text() -> Result<Tensor> {
    normal("text", &[2, 5, 6])
}

fn steps() -> Result<Tensor> {
    Tensor::new(&[3f32, 500.0], &Device::Cpu)
}

#[test]
fn a_sample_does_not_depend_on_its_batch() -> Result<()> {
    let params = Params::random(1, &Device::Cpu);
    let unet = Unet::new(&pictures(), &params.builder())?;
    perturb(&params, 0.05)?;
    let x = normal("x", &[2, 4, 7, 10])?;
    let both = unet.forward(&x, &steps()?, Some(&text()?))?;
    assert_eq!(both.dims(), x.dims());
    let alone = unet.forward(
        &x.narrow(0, 1, 1)?,
        &steps()?.narrow(0, 1, 1)?,
        Some(&text()?.narrow(0, 1, 1)?),
    )?;
    assert!(apart(&alone, &both.narrow(0, 1, 1)?)? < 1e-5);
    Ok(())
}

/// Modules whose last map is zero change nothing: then frames are pictures, unless norms take them together.
#[test]
fn without_motion_frames_are_pictures() -> Result<()> {
    for (more, same) in [("", true), (r#", "resnet_norm_over_frames": true"#, false)] {
        let params = Params::random(2, &Device::Cpu);
        let clips = Unet::with_motion(&pictures(), &adapter(more), &params.builder())?;
        let still = Unet::new(&pictures(), &params.builder())?;
        let x = normal("x", &[2, 4, 3, 5, 6])?;
        let (steps, text) = (steps()?, text()?);
        let moved = clips.forward(&x, &steps, Some(&text))?;
        for frame in 0..3 {
            let picture = x.narrow(2, frame, 1)?.squeeze(2)?.contiguous()?;
            let expected = still.forward(&picture, &steps, Some(&text))?;
            let found = moved.narrow(2, frame, 1)?.squeeze(2)?.contiguous()?;
            assert_eq!(apart(&found, &expected)? < 1e-5, same, "{more}");
        }
        // One frame shares its statistics with itself.
        let first = x.narrow(2, 0, 1)?.contiguous()?;
        let alone = clips.forward(&first, &steps, Some(&text))?.squeeze(2)?;
        let expected = still.forward(&first.squeeze(2)?, &steps, Some(&text))?;
        assert!(apart(&alone, &expected)? < 1e-5);
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_in_words() -> Result<()> {
    let params = Params::random(3, &Device::Cpu);
    let unet = Unet::with_motion(&pictures(), &adapter(""), &params.builder())?;
    let (steps, text) = (steps()?, text()?);
    let line = |sample: &[usize], steps: &Tensor, text: Option<&Tensor>| {
        let result = normal("x", sample).and_then(|x| unet.forward(&x, steps, text));
        let words = result.unwrap_err().to_string();
        words.lines().next().unwrap_or_default().to_owned()
    };
    for (found, words) in [
        (
            line(&[2, 4, 5, 4, 4], &steps, Some(&text)),
            "sample has 5 frames, expected at most 4",
        ),
        (
            line(&[2, 3, 4, 4], &steps, Some(&text)),
            "sample is [2, 3, 4, 4], expected [B, 4, H, W]",
        ),
        (
            line(&[1, 4, 4, 4], &steps, Some(&text)),
            "timestep is [2], expected [1]",
        ),
        (
            line(&[2, 4, 4, 4], &steps, None),
            "encoder_hidden_states is missing, expected [2, L, 6]",
        ),
        (
            line(&[2, 4, 4, 4], &steps, Some(&text.narrow(2, 0, 5)?)),
            "encoder_hidden_states is [2, 5, 5], expected [2, L, 6]",
        ),
    ] {
        assert!(found.contains(words), "{words}: {found}");
    }
    Ok(())
}

/// A training step reaches every parameter.
#[test]
fn gradients_reach_all_parameters() -> Result<()> {
    let params = Params::random(4, &Device::Cpu);
    let build = || Unet::with_motion(&pictures(), &adapter(""), &params.builder());
    build()?;
    perturb(&params, 0.05)?;
    let x = normal("x", &[2, 4, 2, 4, 5])?;
    let loss = build()?
        .forward(&x, &steps()?, Some(&text()?))?
        .sqr()?
        .mean_all()?;
    let gradients = loss.backward()?;
    for (name, var) in params.vars() {
        let Some(gradient) = gradients.get(var.as_tensor()) else {
            bail!("no gradient of {name}");
        };
        let size = gradient.abs()?.max_all()?.to_scalar::<f32>()?;
        // The bias of keys moves all scores alike: there is none in these networks.
        assert!(size > 0.0 && size.is_finite(), "{name}: {size}");
    }
    Ok(())
}
