//! Recipe of the task `tav-published`, and the networks that it asks for.

use std::collections::BTreeSet;
use std::path::PathBuf;

use fulgur_tavdiffusion::published::{Encoders, Piece, Places, TavConfig, TavPart, Words};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::super::clips::ClipOptions;
use super::super::tav;
use crate::train::TaskResult;

/// Most frames and sides of clips, and most clips of a pool: beyond all reason.
const MOST_FRAMES: usize = 1 << 10;
const LONGEST_SIDE: usize = 1 << 11;
const MOST_CLIPS: usize = 1 << 24;
/// Values of a token of the alignment, as in the authors' checkpoint.
const ALIGNED: usize = 32;

/// What brings the streams of one clip together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Contrast {
    /// Nothing.
    Off,
    /// Cosines of the means over the narrowest places.
    #[default]
    Pooled,
    /// Weighted interaction of tokens, by the heads of the authors' checkpoint: as many products as there are pairs in a batch.
    Wti,
}

/// Recipe of the task.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Options {
    /// Composed clips, where there is no manifest.
    pub clips: ClipOptions,
    /// A manifest of clips to train on, as `fulgur annotate` and `fulgur tavgbench` write it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manifest: Option<PathBuf>,
    /// The folder that the media of the manifest lie in; that of the manifest if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub media: Option<PathBuf>,
    /// Frames of a clip.
    pub frames: usize,
    /// Frames a second.
    pub fps: f64,
    /// Width of a clip in pixels.
    pub width: usize,
    /// Its height.
    pub height: usize,
    /// Folder of a published generator to start from: its networks, and its codecs unless others are named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<PathBuf>,
    /// Folder of a generator of either kind whose codecs and text encoder are used; they stay as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub codecs: Option<PathBuf>,
    /// Folder of a codec of pictures, instead of that of `codecs`: the builtin generator is there without encoders.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub video_codec: Option<PathBuf>,
    /// The same of a codec of spectrograms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mel_codec: Option<PathBuf>,
    /// Whether the folder that is written holds copies of codecs and text encoder, or names their places.
    pub copy_codecs: bool,
    /// What is trained; the rest stays as it is in `start`.
    pub trained: BTreeSet<TavPart>,
    /// The networks, as the `config.json` of both has them; laid over what `start` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unet: Option<toml::Table>,
    /// Whether a step keeps the results of layers alone, and makes what lies within them again on its way back.
    pub recompute: bool,
    /// Clips in a batch.
    pub batch: usize,
    /// Clips whose latents are kept on the device; of a manifest, its first ones.
    pub pool: usize,
    /// Held-out clips of a validation.
    pub validation: usize,
    /// Share of clips that read the empty text instead of their own.
    pub text_dropout: f32,
    /// Weight of the sound's loss over the picture's.
    pub audio_weight: f64,
    /// What brings the streams of one clip together.
    pub contrast: Contrast,
    /// Weight of that.
    pub contrast_weight: f64,
    /// Clips that are made to be looked at; 0 makes none.
    pub samples: usize,
    /// Steps of the sampler, for those clips and for the folder that is written.
    pub sample_steps: usize,
    /// Guidance of both streams, as before.
    pub sample_guidance: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            clips: tav::clip_options(),
            manifest: None,
            media: None,
            frames: 48,
            fps: 12.0,
            width: 96,
            height: 96,
            start: None,
            codecs: None,
            video_codec: None,
            mel_codec: None,
            copy_codecs: true,
            trained: TavPart::ALL.into(),
            unet: None,
            recompute: false,
            batch: 64,
            pool: 8000,
            validation: 128,
            text_dropout: 0.1,
            audio_weight: 1.0,
            contrast: Contrast::default(),
            contrast_weight: 0.1,
            samples: 6,
            sample_steps: 25,
            sample_guidance: 4.0,
        }
    }
}

impl Options {
    /// Refuses settings that cannot be.
    pub(crate) fn check(&self) -> TaskResult<()> {
        let refuse = |field: &str, found: &dyn std::fmt::Display, expected: &str| {
            Err(format!("[tav-published]: {field} is {found}, expected {expected}").into())
        };
        for (field, found, least, most) in [
            ("frames", self.frames, 1, MOST_FRAMES),
            ("width", self.width, 1, LONGEST_SIDE),
            ("height", self.height, 1, LONGEST_SIDE),
            ("batch", self.batch, 1, MOST_CLIPS),
            ("pool", self.pool, 1, MOST_CLIPS),
            ("validation", self.validation, 1, MOST_CLIPS),
            ("samples", self.samples, 0, 64),
            ("sample_steps", self.sample_steps, 1, 1000),
        ] {
            if !(least..=most).contains(&found) {
                return refuse(field, &found, &format!("{least} to {most}"));
            }
        }
        for (field, found, least, most) in [
            ("fps", self.fps, 1.0, 120.0),
            ("text_dropout", f64::from(self.text_dropout), 0.0, 1.0),
            ("audio_weight", self.audio_weight, 0.0, 1e6),
            ("contrast_weight", self.contrast_weight, 0.0, 1e6),
            ("sample_guidance", self.sample_guidance, 0.0, 100.0),
        ] {
            // NaN is in no range.
            if !(least..=most).contains(&found) {
                return refuse(field, &found, &format!("{least} to {most}"));
            }
        }
        if self.trained.is_empty() {
            let words: Vec<_> = TavPart::ALL.iter().map(|part| part.word()).collect();
            return refuse("trained", &"empty", &format!("some of {}", words.join(", ")));
        }
        if self.start.is_none() && self.unet.is_none() {
            return refuse("unet", &"absent", "the networks, or start with a folder of them");
        }
        if self.start.is_none() && self.codecs.is_none() {
            return refuse("codecs", &"absent", "the folder of a generator");
        }
        if self.start.is_none()
            && let Some(part) = TavPart::ALL.iter().find(|part| !self.trained.contains(part))
        {
            let found = format!("without {}", part.word());
            return refuse(
                "trained",
                &found,
                "all parts, or start with a folder that has the others",
            );
        }
        Ok(())
    }

    /// The folder whose codecs and text encoder are used.
    pub(crate) fn codec_places(&self) -> TaskResult<Places> {
        let Some(dir) = self.codecs.as_ref().or(self.start.as_ref()) else {
            return Err("[tav-published]: codecs is absent, expected the folder of a generator".into());
        };
        let mut places = Places::of_codecs(dir)?;
        for (piece, own) in [
            (Piece::Vae, &self.video_codec),
            (Piece::AudioVae, &self.mel_codec),
        ] {
            if let Some(own) = own {
                places.take(piece, own)?;
            }
        }
        Ok(places)
    }

    /// What both networks are like: what `start` says, if there is one, then what the recipe says, then what follows from codecs and text
    /// encoder.
    ///
    /// # Errors
    /// Networks that cannot be, or that are not for these codecs.
    pub(crate) fn network(&self, start: Option<&Value>, codecs: &Places) -> TaskResult<(Value, TavConfig)> {
        let mut whole = start.cloned().unwrap_or_else(|| json!({}));
        if let Some(own) = &self.unet {
            lay_over(&mut whole, &serde_json::to_value(own)?);
        }
        let Value::Object(map) = &mut whole else {
            return Err("[tav-published]: unet is no table".into());
        };
        map.insert("_class_name".to_owned(), json!("TavDiffusionUnet"));
        let width = Words::width_in(codecs)?;
        for (stream, channels) in ["video", "audio"].into_iter().zip(Encoders::channels_in(codecs)?) {
            let unet = map.entry(stream).or_insert_with(|| json!({}));
            let Value::Object(unet) = unet else {
                return Err(format!("[tav-published]: unet.{stream} is {unet}, expected a table").into());
            };
            for (field, expected, from) in [
                ("in_channels", channels, "the codec"),
                ("out_channels", channels, "the codec"),
                ("cross_attention_dim", width, "the text encoder"),
            ] {
                let found = unet.entry(field).or_insert_with(|| json!(expected));
                if *found != json!(expected) {
                    return Err(format!(
                        "[tav-published]: unet.{stream}.{field} is {found}, expected {expected} as {from} has"
                    )
                    .into());
                }
            }
        }
        map.entry("motion").or_insert_with(|| json!({}));
        if self.contrast == Contrast::Wti && map.get("alignment").is_none_or(Value::is_null) {
            map.insert("alignment".to_owned(), self.alignment(map, codecs)?);
        }
        let config = parsed(&whole)?;
        Ok((whole, config))
    }

    /// Heads of an alignment for clips of this size.
    fn alignment(&self, unet: &Map<String, Value>, codecs: &Places) -> TaskResult<Value> {
        let sizes = Encoders::sizes_in(codecs, self.frames, self.fps, [self.height, self.width])
            .map_err(|error| format!("[tav-published]: {error}"))?;
        let halvings = |stream: &str| {
            let blocks = unet[stream]["block_out_channels"].as_array();
            blocks.map_or(4, Vec::len).saturating_sub(1)
        };
        let narrow = |side: usize, times: usize| (0..times).fold(side, |side, _| side.div_ceil(2));
        let ([_, frames, h, w], [_, steps, bands]) = (sizes.video, sizes.audio);
        let (seen, heard) = (halvings("video"), halvings("audio"));
        Ok(json!({
            "video": frames * narrow(h, seen) * narrow(w, seen),
            "audio": narrow(steps, heard) * narrow(bands, heard),
            "width": ALIGNED,
        }))
    }
}

/// Both networks as a configuration describes them.
fn parsed(whole: &Value) -> TaskResult<TavConfig> {
    let refuse = |error: &dyn std::fmt::Display| {
        let words = error.to_string();
        format!(
            "[tav-published]: unet: {}",
            words.lines().next().unwrap_or_default()
        )
    };
    let config: TavConfig = serde_json::from_value(whole.clone()).map_err(|error| refuse(&error))?;
    config.check().map_err(|error| refuse(&error))?;
    Ok(config)
}

/// Puts the values of `own` over those of `to`, table by table.
fn lay_over(to: &mut Value, own: &Value) {
    match (to, own) {
        (Value::Object(to), Value::Object(own)) => {
            for (key, value) in own {
                lay_over(to.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (to, own) => *to = own.clone(),
    }
}
