//! Annotation of audible video with the backends of a configuration: those of [`fulgur_benchmark::annotate`], and our own
//! language models.
//!
//! Networks are opened by their folders' names and named in the settings by the hash of their weights.

mod local;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context as _, bail};
use candle_core::Device;
use fulgur_benchmark::annotate::backend::Backend;
use fulgur_benchmark::annotate::blip::BlipCaptioner;
use fulgur_benchmark::annotate::config::Config;
use fulgur_benchmark::annotate::filter::Agreement;
use fulgur_benchmark::annotate::openai::{Remote, Server, Task};
use fulgur_benchmark::annotate::pipeline::Stages;
use fulgur_benchmark::annotate::precomputed::Precomputed;
use fulgur_benchmark::annotate::tags::TagCaptioner;
use fulgur_benchmark::annotate::template::Template;
use fulgur_benchmark::annotate::{AudioCaptioner, FrameCaptioner, Merger, Rewriter, filter, prompts};
use fulgur_benchmark::checkpoint;
use fulgur_benchmark::encoder::AnyEncoder;
#[cfg(feature = "media")]
use fulgur_benchmark::encoder::Sense;
use fulgur_datasets::media::{MediaError, Sound};
use fulgur_datasets::things::THINGS_FILE;
use fulgur_lightnet::params::folder::Weights;
use sha2::{Digest, Sha256};

use crate::device::compute_dtype;
use crate::models;

pub use local::Local;

/// Opens the language model in a folder.
pub type OpenModel<'a> = &'a dyn Fn(&Path) -> anyhow::Result<Local>;
/// Opens the device that networks compute on.
pub type OpenDevice<'a> = &'a dyn Fn() -> anyhow::Result<Device>;

/// Where and how the stages work.
pub struct Surroundings<'a> {
    /// Folder of the clips, where they are to be looked at.
    pub media: Option<&'a Path>,
    /// Folder of answers that are kept.
    pub cache: Option<&'a Path>,
    /// Whether servers are not to be asked.
    pub dry_run: bool,
    /// Raised to end.
    pub stop: Arc<AtomicBool>,
    /// Opens language models.
    pub language_model: OpenModel<'a>,
    /// Opens the device of all other networks.
    pub device: OpenDevice<'a>,
}

/// Stages that are ready, and the server behind them.
pub struct Opened {
    /// The stages.
    pub stages: Stages,
    /// The server, where one is asked.
    pub server: Option<Arc<Server>>,
}

/// Opens everything that a configuration names.
///
/// # Errors
/// A setting is out of range, a stage cannot be done by its backend, a file or a model cannot be read, or media are needed and
/// not there.
pub fn open(config: &Config, around: &Surroundings<'_>) -> anyhow::Result<Opened> {
    config.check()?;
    let remote = |backend: &Backend| matches!(backend, Backend::OpenaiHttp(_));
    if around.media.is_none() {
        for (name, backend) in [("frames", &config.frames), ("audio", &config.audio)] {
            if remote(backend) || matches!(backend, Backend::Blip(_) | Backend::Tags(_)) {
                bail!("{name}: {backend} looks at the clips, expected --media with their folder");
            }
        }
        if !config.filters.agreement.is_empty() {
            bail!(
                "filters.agreement: found {:?}, which looks at the clips, expected --media with their folder",
                config.filters.agreement
            );
        }
    }
    let any_remote = config.stages().iter().any(|(_, backend)| remote(backend));
    let server = match any_remote {
        true => Some(Arc::new(Server::open(
            &config.http,
            around.cache,
            around.dry_run,
            Arc::clone(&around.stop),
        )?)),
        false => None,
    };
    let mut writers = Writers {
        config,
        server: server.as_ref(),
        language_model: around.language_model,
        models: BTreeMap::new(),
    };
    let frames: Option<Arc<dyn FrameCaptioner>> = match &config.frames {
        Backend::None => None,
        Backend::Precomputed(file) => Some(Arc::new(precomputed(file.as_deref())?)),
        Backend::OpenaiHttp(model) => Some(Arc::new(writers.remote(
            "frames",
            model.as_deref(),
            Task::Frames,
        )?)),
        Backend::Blip(dir) => {
            let device = (around.device)()?;
            let compute = compute_dtype(&device);
            let stop = Arc::clone(&around.stop);
            Some(Arc::new(BlipCaptioner::open(
                dir,
                &config.blip,
                compute,
                &device,
                stop,
            )?))
        }
        other => bail!(
            "frames: found {other}, expected none, precomputed, precomputed:FILE, candle-blip:DIR, openai-http or openai-http:MODEL"
        ),
    };
    let audio: Option<Arc<dyn AudioCaptioner>> = match &config.audio {
        Backend::None => None,
        Backend::Precomputed(file) => Some(Arc::new(precomputed(file.as_deref())?)),
        Backend::OpenaiHttp(model) => Some(Arc::new(writers.remote(
            "audio",
            model.as_deref(),
            Task::Audio,
        )?)),
        Backend::Tags(name) => {
            let encoder = encoder(name, around)?;
            Some(Arc::new(TagCaptioner::new(encoder, &config.tags, &read_sound)?))
        }
        other => bail!(
            "audio: found {other}, expected none, precomputed, precomputed:FILE, tags:ENCODER, openai-http or openai-http:MODEL"
        ),
    };
    let rewrite: Option<Arc<dyn Rewriter>> = match &config.rewrite {
        Backend::None => None,
        Backend::Precomputed(file) => Some(Arc::new(precomputed(file.as_deref())?)),
        Backend::Template => Some(Arc::new(Template)),
        Backend::OpenaiHttp(model) => Some(Arc::new(writers.remote(
            "rewrite",
            model.as_deref(),
            Task::Rewrite,
        )?)),
        Backend::Lm(dir) => Some(writers.local(dir)?),
        other => bail!(
            "rewrite: found {other}, expected none, template, precomputed, precomputed:FILE, openai-http, openai-http:MODEL or lm:DIR"
        ),
    };
    let merge: Option<Arc<dyn Merger>> = match &config.merge {
        Backend::None => None,
        Backend::Precomputed(file) => Some(Arc::new(precomputed(file.as_deref())?)),
        Backend::Template => Some(Arc::new(Template)),
        Backend::OpenaiHttp(model) => Some(Arc::new(writers.remote(
            "merge",
            model.as_deref(),
            Task::Merge,
        )?)),
        Backend::Lm(dir) => Some(writers.local(dir)?),
        other => bail!(
            "merge: found {other}, expected none, template, precomputed, precomputed:FILE, openai-http, openai-http:MODEL or lm:DIR"
        ),
    };
    let agreement = match config.filters.agreement.as_str() {
        "" => None,
        name => Some(Agreement::new(
            encoder(Path::new(name), around)?,
            &config.filters,
        )?),
    };
    let mut stages = Stages {
        filters: filter::of(&config.filters),
        media: None,
        frames,
        audio,
        rewrite,
        merge,
    };
    if let Some(folder) = around.media {
        look(&mut stages, config, folder, agreement.as_ref(), around)?;
    }
    if let Some(agreement) = agreement {
        stages.filters.push(Box::new(agreement));
    }
    Ok(Opened { stages, server })
}

/// The encoder of this name, `builtin` or a folder.
fn encoder(name: &Path, around: &Surroundings<'_>) -> anyhow::Result<AnyEncoder> {
    let device = (around.device)()?;
    Ok(AnyEncoder::open(
        &models::encoder_named(name)?,
        compute_dtype(&device),
        &device,
    )?)
}

/// The sound of a file: of a clip, where clips can be read.
#[cfg(feature = "media")]
fn read_sound(path: &Path) -> Result<Sound, MediaError> {
    fulgur_datasets::media::read_sound(path, None)
}

#[cfg(not(feature = "media"))]
fn read_sound(path: &Path) -> Result<Sound, MediaError> {
    fulgur_datasets::media::read_wav(path)
}

fn precomputed(file: Option<&Path>) -> anyhow::Result<Precomputed> {
    Ok(match file {
        Some(file) => Precomputed::open(file)?,
        None => Precomputed::of_manifest(),
    })
}

/// Opens models that write.
struct Writers<'a> {
    config: &'a Config,
    server: Option<&'a Arc<Server>>,
    language_model: OpenModel<'a>,
    models: BTreeMap<&'a Path, Arc<Local>>,
}

impl<'a> Writers<'a> {
    fn remote(&self, stage: &str, model: Option<&str>, task: Task) -> anyhow::Result<Remote> {
        let model = model.unwrap_or(&self.config.http.model);
        let (Some(server), false) = (self.server, model.is_empty()) else {
            bail!("{stage}: found openai-http without a model, expected openai-http:MODEL or http.model");
        };
        Ok(Remote::new(Arc::clone(server), model, task))
    }

    /// The model of a folder, which several stages share.
    fn local(&mut self, dir: &'a Path) -> anyhow::Result<Arc<Local>> {
        if let Some(model) = self.models.get(dir) {
            return Ok(Arc::clone(model));
        }
        let model = Arc::new((self.language_model)(dir)?);
        self.models.insert(dir, Arc::clone(&model));
        Ok(model)
    }
}

#[cfg(feature = "media")]
fn look(
    stages: &mut Stages,
    config: &Config,
    folder: &Path,
    agreement: Option<&Agreement>,
    around: &Surroundings<'_>,
) -> anyhow::Result<()> {
    if !folder.is_dir() {
        bail!("{}: no such folder, expected that of the clips", folder.display());
    }
    let filters = &config.filters;
    let seen = stages
        .frames
        .as_ref()
        .is_some_and(|captioner| captioner.needs_frames());
    let heard = stages
        .audio
        .as_ref()
        .is_some_and(|captioner| captioner.needs_sound());
    let compared = |sense: Sense| agreement.is_some_and(|agreement| agreement.needs(sense));
    let mut looking = config.media.clone();
    // Who can hear more is given more.
    let rates = [
        stages.audio.as_ref().map_or(0, |captioner| captioner.rate()),
        agreement.map_or(0, Agreement::rate),
    ];
    looking.sample_rate = rates.into_iter().fold(looking.sample_rate, u32::max);
    stages.media = Some(Box::new(fulgur_benchmark::annotate::media::Folder {
        root: folder.to_owned(),
        looking,
        silence_db: filters.silence_db,
        frames: seen || filters.still || compared(Sense::Frames),
        sound: heard || filters.silence || filters.speech || compared(Sense::Sounds),
        cancel: Some(Arc::clone(&around.stop)),
    }));
    Ok(())
}

#[cfg(not(feature = "media"))]
fn look(
    _: &mut Stages,
    _: &Config,
    folder: &Path,
    _: Option<&Agreement>,
    _: &Surroundings<'_>,
) -> anyhow::Result<()> {
    bail!(
        "{}: found a program that was built without the feature `media`, expected one with it",
        folder.display()
    );
}

/// What the results of a run depend on, by name: the input and tables by their bytes, all settings but those that say how fast
/// and how often servers are asked.
///
/// # Errors
/// A file cannot be read, or the user stopped it.
pub fn settings(
    config: &Config,
    input: &Path,
    media: Option<&Path>,
    times: bool,
    go_on: &dyn Fn() -> bool,
) -> anyhow::Result<BTreeMap<String, String>> {
    const SPEED: [&str; 8] = [
        "key_env",
        "timeout_s",
        "tries",
        "backoff_s",
        "most_backoff_s",
        "concurrency",
        "requests_per_minute",
        "tokens_per_minute",
    ];
    let mut all = BTreeMap::new();
    let mut put = |name: &str, value: String| all.insert(name.to_owned(), value);
    put("input", sha256_of(input, go_on)?);
    put("times", times.to_string());
    put(
        "media",
        media
            .map(|folder| folder.display().to_string())
            .unwrap_or_default(),
    );
    for version in [prompts::FRAMES, prompts::AUDIO, prompts::REWRITE, prompts::MERGE] {
        let name = version.split('-').next().unwrap_or_default();
        put(&format!("prompt.{name}"), version.to_owned());
    }
    let mut used = vec!["filters"];
    for (stage, backend) in config.stages() {
        put(stage, backend.to_string());
        match backend {
            Backend::Precomputed(Some(file)) => {
                put(&format!("{stage}.sha256"), sha256_of(file, go_on)?);
            }
            Backend::OpenaiHttp(_) => used.push("http"),
            Backend::Lm(_) => used.push("lm"),
            Backend::Blip(dir) => {
                used.push("blip");
                put(&format!("{stage}.weights"), weights(dir)?);
            }
            Backend::Tags(name) => {
                used.push("tags");
                put(
                    &format!("{stage}.weights"),
                    weights(&models::encoder_named(name)?)?,
                );
                let list = Path::new(&config.tags.list);
                let hash = if list.is_dir() {
                    sha256_of(&list.join(THINGS_FILE), go_on)?
                } else if config.tags.list.is_empty() {
                    String::new()
                } else {
                    sha256_of(list, go_on)?
                };
                put("tags.sha256", hash);
            }
            _ => {}
        }
    }
    if !config.filters.agreement.is_empty() {
        let dir = models::encoder_named(Path::new(&config.filters.agreement))?;
        put("filters.agreement.weights", weights(&dir)?);
    }
    if media.is_some() {
        used.push("media");
    }
    let value = serde_json::to_value(config)?;
    for table in used {
        for (name, value) in value[table].as_object().into_iter().flatten() {
            if table != "http" || !SPEED.contains(&name.as_str()) {
                put(&format!("{table}.{name}"), value.to_string());
            }
        }
    }
    Ok(all)
}

/// The hash of the weights of a network.
fn weights(dir: &Path) -> anyhow::Result<String> {
    let found = Weights::find(dir)?;
    let files = found.as_ref().map(Weights::files).unwrap_or_default();
    checkpoint::of_files(files).with_context(|| dir.display().to_string())
}

fn sha256_of(path: &Path, go_on: &dyn Fn() -> bool) -> anyhow::Result<String> {
    let name = || path.display().to_string();
    let mut file = File::open(path).with_context(name)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        if !go_on() {
            bail!("{}: stopped", path.display());
        }
        match file.read(&mut buffer).with_context(name)? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            n => hash.update(&buffer[..n]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open_with(config: &Config, media: Option<&Path>) -> Result<Opened, String> {
        let around = Surroundings {
            media,
            cache: None,
            dry_run: true,
            stop: Arc::default(),
            language_model: &|dir| bail!("{}: no model", dir.display()),
            device: &|| Ok(Device::Cpu),
        };
        open(config, &around).map_err(|error| error.to_string())
    }

    fn config(change: impl FnOnce(&mut Config)) -> Config {
        let mut config = Config::default();
        change(&mut config);
        config
    }

    #[test]
    fn stages_that_cannot_be_are_refused_in_one_line() {
        let remote = || Backend::OpenaiHttp(None);
        for (config, words) in [
            (
                config(|c| c.frames = Backend::Template),
                "frames: found template, expected none, precomputed",
            ),
            (
                config(|c| c.audio = Backend::Lm("x".into())),
                "audio: found lm:x, expected none, precomputed",
            ),
            (
                config(|c| c.frames = remote()),
                "frames: openai-http looks at the clips, expected --media",
            ),
            (
                config(|c| c.frames = Backend::Blip("x".into())),
                "frames: candle-blip:x looks at the clips, expected --media",
            ),
            (
                config(|c| c.audio = Backend::Tags("builtin".into())),
                "audio: tags:builtin looks at the clips, expected --media",
            ),
            (
                config(|c| c.merge = Backend::Tags("builtin".into())),
                "merge: found tags:builtin, expected none, template",
            ),
            (
                config(|c| {
                    c.filters.agreement = "builtin".to_owned();
                    c.filters.least_audio_video = Some(0.1);
                }),
                "filters.agreement: found \"builtin\", which looks at the clips",
            ),
            (
                config(|c| c.merge = remote()),
                "merge: found openai-http without a model",
            ),
            (
                config(|c| c.rewrite = Backend::Lm("absent".into())),
                "absent: no model",
            ),
            (
                config(|c| c.frames = Backend::Precomputed(Some("absent.csv".into()))),
                "absent.csv: cannot open",
            ),
            (
                config(|c| c.filters.min_fps = f64::NAN),
                "filters.min_fps: found NaN",
            ),
        ] {
            let Err(line) = open_with(&config, None) else {
                panic!("{words}: expected an error")
            };
            assert!(line.contains(words) && line.lines().count() == 1, "{line}");
        }
        assert!(open_with(&Config::default(), None).is_ok());
    }

    #[test]
    fn settings_are_what_results_depend_on() {
        let folder = tempfile::tempdir().unwrap();
        let input = folder.path().join("m.jsonl");
        std::fs::write(&input, "{\"id\":\"a\"}\n").unwrap();
        let of = |config: &Config| settings(config, &input, None, false, &|| true).unwrap();
        let base = of(&Config::default());
        assert!(!base.contains_key("http.model") && base["filters.min_words"] == "5");
        assert_ne!(of(&config(|c| c.filters.min_words = 6)), base);
        let remote = |tries: u32, model: &str| {
            of(&config(|c| {
                c.merge = Backend::OpenaiHttp(None);
                c.http.model = model.to_owned();
                c.http.tries = tries;
            }))
        };
        assert_eq!(remote(1, "a"), remote(9, "a"));
        assert_ne!(remote(1, "a"), remote(1, "b"));
        std::fs::write(&input, "{\"id\":\"b\"}\n").unwrap();
        assert_ne!(of(&Config::default())["input"], base["input"]);
    }
}
