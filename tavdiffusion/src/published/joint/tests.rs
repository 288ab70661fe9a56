use super::*;
use crate::testing::{apart, normal, perturb};
use fulgur_lightnet::params::Params;

fn json(fuse: &str) -> serde_json::Value {
    let unet = |channels: usize| {
        format!(
            r#"{{"in_channels": {channels}, "out_channels": {channels}, "block_out_channels": [8, 16], "norm_num_groups": 4,
            "layers_per_block": 1, "cross_attention_dim": 6, "attention_head_dim": 2,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}}"#
        )
    };
    let json = format!(
        r#"{{"_class_name": "TavDiffusionUnet", "video": {}, "audio": {}, "fuse": "{fuse}",
        "motion": {{"block_out_channels": [8, 16], "motion_layers_per_block": 1, "motion_norm_num_groups": 4,
        "motion_num_attention_heads": 2, "motion_max_seq_length": 5, "use_motion_mid_block": false}}}}"#,
        unet(4),
        unet(3)
    );
    serde_json::from_str(&json).unwrap()
}

fn config(fuse: &str) -> TavConfig {
    serde_json::from_value(json(fuse)).unwrap()
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

/// What a step of training makes small, in f64.
fn loss(network: &TavUnet) -> Result<Tensor> {
    let given = inputs()?;
    let wide = |x: &Tensor| x.to_dtype(DType::F64);
    let (Some(clips), Some(sounds)) = (network.video(), network.audio()) else {
        bail!("a network is missing");
    };
    let steps = given.time.to_vec1::<f32>()?;
    let waves = [clips.waves(&steps)?, sounds.waves(&steps)?];
    let made = network.forward_at(
        Some(&wide(&given.video)?),
        Some(&wide(&given.audio)?),
        [&waves[0], &waves[1]],
        Some(&given.text),
    )?;
    let (Some(video), Some(audio), Some((heard, seen))) = (made.video, made.audio, made.places) else {
        bail!("a stream is missing");
    };
    let mean = |x: &Tensor| x.mean(1)?.to_dtype(DType::F32);
    let aligned = crate::contrast::pooled(&mean(&heard)?, &mean(&seen)?)?;
    let away = |x: &Tensor, noise: &Tensor| (x - wide(noise)?)?.sqr()?.mean_all();
    away(&video, &given.video)? + away(&audio, &given.audio)? + (aligned.to_dtype(DType::F64)? * 0.1)?
}

/// Differences of the loss in f64 are the independent computation; what is made again on the way back changes nothing.
#[test]
fn gradients_are_those_of_differences() -> Result<()> {
    let params = Params::random(12, &Device::Cpu);
    let mut network = TavUnet::new(&config("both"), &params.builder())?;
    perturb(&params, 0.1)?;
    let plain = loss(&network)?.backward()?;
    let of_tape = |network: &TavUnet| {
        let (loss, tape) = fulgur_kernels::tape::record(|| loss(network));
        tape.backward(&loss?)
    };
    let noted = of_tape(&network)?;
    network.set_recompute(true);
    let again = of_tape(&network)?;
    let value = || loss(&network)?.to_scalar::<f64>();
    let mut checked = 0;
    // Each kind of layer is among every fifth of the parameters.
    for (name, var) in params.vars().into_iter().step_by(5) {
        let gradient = |found: &candle_core::backprop::GradStore| {
            let Some(gradient) = found.get(var.as_tensor()) else {
                bail!("no gradient of {name}");
            };
            gradient.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()
        };
        let (plain, noted, again) = (gradient(&plain)?, gradient(&noted)?, gradient(&again)?);
        assert_eq!(noted, again, "{name}");
        let values = var.flatten_all()?.to_vec1::<f32>()?;
        let place = (checked * 7) % values.len();
        let at = |shift: f32| {
            let mut moved = values.clone();
            moved[place] += shift;
            var.set(&Tensor::from_vec(moved.clone(), var.shape(), &Device::Cpu)?)?;
            Ok::<_, candle_core::Error>((f64::from(moved[place]), value()?))
        };
        let ((high, more), (low, less)) = (at(2e-3)?, at(-2e-3)?);
        at(0.0)?;
        let expected = (more - less) / (high - low);
        for found in [plain[place], noted[place]] {
            let far = (found - expected).abs();
            assert!(
                far < 2e-4 + 2e-3 * expected.abs(),
                "{name}[{place}]: {found} {expected}"
            );
        }
        checked += 1;
    }
    assert!(checked > 40, "{checked}");
    Ok(())
}

/// A folder with both networks, as `fulgur init` and training write it.
fn written(dir: &Path, params: &Params, fuse: &str) -> serde_json::Value {
    std::fs::create_dir_all(dir.join("unet")).unwrap();
    let config = json(fuse);
    std::fs::write(dir.join("unet/config.json"), config.to_string()).unwrap();
    let index = r#"{"_class_name": "TavDiffusionPipeline"}"#;
    std::fs::write(dir.join("model_index.json"), index).unwrap();
    let path = dir.join("unet/model.safetensors");
    let precision = fulgur_lightnet::params::Precision::F32;
    params.save(&path, &BTreeMap::new(), precision).unwrap();
    config
}

#[test]
fn parts_are_trained_and_others_stay() -> Result<()> {
    let root = tempfile::tempdir()?;
    let stored = Params::random(13, &Device::Cpu);
    TavUnet::new(&config("v_from_a"), &stored.builder())?;
    perturb(&stored, 0.1)?;
    written(root.path(), &stored, "v_from_a");
    let places = super::super::pipeline::Places::read(root.path()).unwrap();
    let params = Params::random(14, &Device::Cpu);
    let trained = [TavPart::Fusion, TavPart::Motion].into();
    let start = TavStart::read(&places).unwrap();
    assert_eq!(start.config()["fuse"], "v_from_a");
    // The recipe adds a direction that the folder does not have.
    let tav = TrainedTav::new(&config("both"), &trained, Some(start), &params, DType::F32)?;
    let names: Vec<String> = params.vars().into_keys().collect();
    assert!(names.iter().all(|name| trained.contains(&TavPart::of(name))));
    assert!(names.iter().any(|name| name == "cross_attn_audio.query.weight"));
    // A fresh direction changes nothing: the networks are those of the folder.
    let loaded = TavUnet::load(&root.path().join("unet"), DType::F32, &Device::Cpu).unwrap();
    let (found, expected) = (run(&tav.networks, true, true)?, run(&loaded, true, true)?);
    assert!(far(&found.video, &expected.video)? < 1e-5 && far(&found.audio, &expected.audio)? < 1e-5);
    let gradients = loss(&tav.networks)?.backward()?;
    for (name, var) in params.vars() {
        assert!(gradients.get(var.as_tensor()).is_some(), "{name}");
    }
    // Everything is written, what stays as it was and what has moved.
    let moved = &params.vars()["cross_attn.query.bias"];
    moved.set(&(moved.as_tensor() + 1.0)?)?;
    let tensors = tav.tensors(&params)?;
    for (name, var) in stored.vars() {
        let apart = apart(&tensors[&name], var.as_tensor())?;
        assert_eq!(apart > 0.0, name == "cross_attn.query.bias", "{name}");
    }
    assert_eq!(tensors.len(), stored.vars().len() + 8);
    // Without a folder there is nothing to keep.
    let line = TrainedTav::new(&config("both"), &trained, None, &params, DType::F32).unwrap_err();
    let line = line.to_string();
    assert!(
        line.contains("\"video\" among the parts that are trained"),
        "{line}"
    );
    Ok(())
}

/// Where streams read themselves there are as many parameters, no stream knows of the other, and each can be asked alone.
#[test]
fn a_stream_that_reads_itself_hears_nothing() -> Result<()> {
    let root = tempfile::tempdir()?;
    let own = TavConfig {
        reads: Reads::Itself,
        ..config("both")
    };
    let [params, other] = [15, 16].map(|seed| Params::random(seed, &Device::Cpu));
    let network = TavUnet::new(&own, &params.builder())?;
    TavUnet::new(&config("both"), &other.builder())?;
    assert_eq!(params.count(), other.count());
    assert!(!network.meet());
    perturb(&params, 0.1)?;
    let (both, video, audio) = (
        run(&network, true, true)?,
        run(&network, true, false)?,
        run(&network, false, true)?,
    );
    assert!(far(&both.video, &video.video)? == 0.0 && far(&both.audio, &audio.audio)? == 0.0);
    let mut config = written(root.path(), &params, "both");
    config["reads"] = "itself".into();
    let dir = root.path().join("unet");
    std::fs::write(dir.join("config.json"), config.to_string())?;
    let alone = TavUnet::load_streams(&dir, [true, false], DType::F32, &Device::Cpu).unwrap();
    // Nobody trains these: their operators are others.
    assert!(far(&run(&alone, true, false)?.video, &video.video)? < 1e-5);
    let alone = TavUnet::load_streams(&dir, [false, true], DType::F32, &Device::Cpu).unwrap();
    assert!(far(&run(&alone, false, true)?.audio, &audio.audio)? < 1e-5);
    Ok(())
}

/// Networks that lie in folders of their own, as diffusers saves them, are the same as those in one file.
#[test]
fn training_starts_from_parts_that_lie_apart() -> Result<()> {
    let root = tempfile::tempdir()?;
    let stored = Params::random(17, &Device::Cpu);
    let whole = TavUnet::new(&config("v_from_a"), &stored.builder())?;
    perturb(&stored, 0.1)?;
    let json = json("v_from_a");
    for (folder, part, field, class) in [
        ("unet", TavPart::Video, "video", "UNet2DConditionModel"),
        ("motion_adapter", TavPart::Motion, "motion", "MotionAdapter"),
        ("audio_unet", TavPart::Audio, "audio", "UNet2DConditionModel"),
        ("fusion", TavPart::Fusion, "", ""),
    ] {
        let dir = root.path().join(folder);
        std::fs::create_dir(&dir)?;
        let own = |name: &str| name.strip_prefix("audio_unet.").unwrap_or(name).to_owned();
        let tensors = stored
            .vars()
            .into_iter()
            .filter(|(name, _)| TavPart::of(name) == part)
            .map(|(name, var)| (own(&name), var.as_detached_tensor()));
        let precision = fulgur_lightnet::params::Precision::F32;
        let path = dir.join("model.safetensors");
        fulgur_lightnet::params::file::write(&path, &tensors.collect(), &BTreeMap::new(), precision).unwrap();
        if !class.is_empty() {
            let mut config = json[field].clone();
            config["_class_name"] = class.into();
            std::fs::write(dir.join("config.json"), config.to_string())?;
        }
    }
    let index = r#"{"_class_name": "AnimateDiffPipeline"}"#;
    std::fs::write(root.path().join("model_index.json"), index)?;
    let places = super::super::pipeline::Places::read(root.path()).unwrap();
    let start = TavStart::read(&places).unwrap();
    assert_eq!(start.config()["fuse"], "v_from_a");
    let own: TavConfig = serde_json::from_value(start.config().clone()).unwrap();
    let params = Params::random(18, &Device::Cpu);
    let tav = TrainedTav::new(&own, &[TavPart::Audio].into(), Some(start), &params, DType::F32)?;
    let (found, expected) = (run(&tav.networks, true, true)?, run(&whole, true, true)?);
    assert!(far(&found.video, &expected.video)? < 1e-5 && far(&found.audio, &expected.audio)? < 1e-5);
    assert_eq!(tav.tensors(&params)?.len(), stored.vars().len());
    // What is no network of pictures is named.
    let path = root.path().join("unet/config.json");
    std::fs::write(&path, r#"{"_class_name": "UNetMotionModel"}"#)?;
    let line = TavStart::config_in(&places).unwrap_err().to_string();
    assert!(
        line.contains("_class_name: found UNetMotionModel, expected UNet2DConditionModel"),
        "{line}"
    );
    Ok(())
}
