//! The builtin generator, part by part, and the folder of each part on its own (as training exports it).

use candle_core::DType;
use fulgur_tavdiffusion::codec::{
    MelCodec, MelCodecConfig, VideoCodec, VideoCodecConfig, Vocoder, VocoderConfig,
};
use fulgur_tavdiffusion::denoiser::{Denoiser, Latents, TextCondition};
use fulgur_tavdiffusion::pipeline::{CLASS_NAME, Part as Place};
use fulgur_tavdiffusion::streams::{TwoStream, TwoStreamConfig};
use fulgur_tavdiffusion::text::encoder::MODEL_TYPE;
use fulgur_tavdiffusion::text::{TextConfig, TextEncoder};

use super::Dim::{Free, Size};
use super::{Content, Folder, Inputs, Model, Network, NetworkError, Part, Port, named};

/// Recognises a generator by its class, a text encoder by its `model_type` and the other parts by their tensors.
pub(super) fn recognise(folder: &Folder) -> Result<Option<Model>, NetworkError> {
    let (kind, parts) = if folder.class() == Some(CLASS_NAME) {
        let mut parts = Vec::new();
        for place in Place::ALL {
            let part = Folder::open(&folder.path().join(place.folder()))?;
            parts.extend(describe(place, &part)?.into_iter().map(|part| below(place, part)));
        }
        (CLASS_NAME, parts)
    } else if let Some(place) = alone(folder) {
        (place.folder(), describe(place, folder)?)
    } else {
        return Ok(None);
    };
    Ok(Some(Model {
        path: folder.path().to_owned(),
        kind: kind.to_owned(),
        parts,
    }))
}

/// Which part of a generator lies in this folder.
fn alone(folder: &Folder) -> Option<Place> {
    let has = |prefixes: &[&str]| prefixes.iter().all(|prefix| folder.has_below(prefix));
    match folder.class() {
        Some(MODEL_TYPE) => Some(Place::TextEncoder),
        Some(_) => None,
        None if has(&["condition.", "video.", "audio."]) => Some(Place::Denoiser),
        None if has(&["decoder.coarse.", "latent."]) => Some(Place::VideoCodec),
        None if has(&["decoder.stack.", "latent."]) => Some(Place::MelCodec),
        None if has(&["input.", "stack.", "output."]) => Some(Place::Vocoder),
        None => None,
    }
}

/// Names a part within the whole: `vocoder`, or `video_codec.decoder` where a folder holds two.
fn below(place: Place, part: Part) -> Part {
    let name = if part.name == place.folder() {
        part.name
    } else {
        format!("{}.{}", place.folder(), part.name)
    };
    Part { name, ..part }
}

/// The parts of one folder, described by its configuration.
fn describe(place: Place, folder: &Folder) -> Result<Vec<Part>, NetworkError> {
    Ok(match place {
        Place::TextEncoder => vec![text_encoder(folder)?],
        Place::Denoiser => vec![denoiser(folder)?],
        Place::VideoCodec => video_codec(folder)?,
        Place::MelCodec => mel_codec(folder)?,
        Place::Vocoder => vec![vocoder(folder)?],
    })
}

fn text_encoder(folder: &Folder) -> Result<Part, NetworkError> {
    let dir = folder.path().to_owned();
    let config = TextConfig::read(&dir)?;
    Ok(Part::new(
        Place::TextEncoder.folder(),
        [
            Port::new(
                "input_ids",
                Content::Ids(config.vocab_size),
                [Free("B"), Free("L")],
            ),
            Port::new("attention_mask", Content::Mask, [Free("B"), Free("L")]).optional(),
        ],
        [
            Port::numbers(
                "last_hidden_state",
                [Free("B"), Free("L"), Size(config.hidden_size)],
            ),
            Port::numbers("sentence_embedding", [Free("B"), Size(config.sentence_size)]),
        ],
        move |device| {
            let encoder = TextEncoder::load(&dir, device)?;
            let network: Network = Box::new(move |inputs| {
                let ids = inputs.get("input_ids")?;
                let mask = match inputs.find("attention_mask") {
                    Some(mask) => mask.clone(),
                    None => ids.ones_like()?.to_dtype(DType::F32)?,
                };
                let states = encoder.forward(ids, &mask, None)?;
                Ok(named([
                    ("last_hidden_state", states.states),
                    ("sentence_embedding", states.sentence),
                ]))
            });
            Ok(network)
        },
    ))
}

fn denoiser(folder: &Folder) -> Result<Part, NetworkError> {
    let dir = folder.path().to_owned();
    let config: TwoStreamConfig = folder.config()?;
    let video = [
        Free("B"),
        Free("F"),
        Free("H"),
        Free("W"),
        Size(config.video.channels),
    ];
    let audio = [Free("B"), Free("T"), Free("M"), Size(config.audio.channels)];
    let ports = [Port::numbers("video", video), Port::numbers("audio", audio)];
    let conditions = [
        Port::new("timestep", Content::Fractions, [Free("B")]),
        Port::numbers(
            "encoder_hidden_states",
            [Free("B"), Free("L"), Size(config.text_dim)],
        ),
        Port::new("encoder_attention_mask", Content::Mask, [Free("B"), Free("L")]).optional(),
    ];
    Ok(Part::new(
        Place::Denoiser.folder(),
        [&ports[..], &conditions].concat(),
        ports,
        move |device| {
            let denoiser = TwoStream::load(&dir, DType::F32, device)?;
            let network: Network = Box::new(move |inputs| {
                let latents = Latents {
                    video: inputs.get("video")?.clone(),
                    audio: inputs.get("audio")?.clone(),
                };
                let made = denoiser.predict(&latents, inputs.get("timestep")?, &condition(inputs)?)?;
                Ok(named([("video", made.video), ("audio", made.audio)]))
            });
            Ok(network)
        },
    ))
}

fn condition(inputs: &Inputs) -> Result<TextCondition, NetworkError> {
    let states = inputs.get("encoder_hidden_states")?.clone();
    let mask = match inputs.find("encoder_attention_mask") {
        Some(mask) => mask.clone(),
        None => states.narrow(2, 0, 1)?.squeeze(2)?.ones_like()?,
    };
    Ok(TextCondition { states, mask })
}

/// Latents are standardised, as the denoiser takes and gives them; frames are in [-1, 1] and come out without a clamp.
fn video_codec(folder: &Folder) -> Result<Vec<Part>, NetworkError> {
    let config: VideoCodecConfig = folder.config()?;
    let frames = Port::numbers("sample", [Free("B"), Free("F"), Free("H"), Free("W"), Size(3)]);
    let latent = Port::numbers(
        "latent",
        [
            Free("B"),
            Free("f"),
            Free("h"),
            Free("w"),
            Size(config.latent_channels),
        ],
    );
    let mut parts = Vec::new();
    if folder.has_below("encoder.") {
        let dir = folder.path().to_owned();
        parts.push(Part::new(
            "encoder",
            [frames.clone()],
            [latent.clone()],
            move |device| {
                let codec = VideoCodec::load(&dir, device)?;
                let network: Network = Box::new(move |inputs| {
                    let frames = inputs.get("sample")?;
                    let (_, count, height, width, _) = frames.dims5()?;
                    codec.grid(count, height, width)?;
                    Ok(named([("latent", codec.encode(frames)?)]))
                });
                Ok(network)
            },
        ));
    }
    let dir = folder.path().to_owned();
    parts.push(Part::new("decoder", [latent], [frames], move |device| {
        let codec = VideoCodec::load(&dir, device)?;
        let network: Network = Box::new(move |inputs| {
            let raw = codec.norm().restore(inputs.get("latent")?)?;
            Ok(named([("sample", codec.decode_raw(&raw)?)]))
        });
        Ok(network)
    }));
    Ok(parts)
}

/// Latents and log-mel are standardised, as the denoiser and the vocoder take them.
fn mel_codec(folder: &Folder) -> Result<Vec<Part>, NetworkError> {
    let config: MelCodecConfig = folder.config()?;
    let [_, bands] = config.patch;
    let mel = Port::numbers("mel", [Free("B"), Free("T"), Size(config.bands)]);
    let groups = config.bands.checked_div(bands).unwrap_or(0);
    let latent = Port::numbers(
        "latent",
        [Free("B"), Free("t"), Size(groups), Size(config.latent_channels)],
    );
    let mut parts = Vec::new();
    if folder.has_below("encoder.") {
        let dir = folder.path().to_owned();
        parts.push(Part::new(
            "encoder",
            [mel.clone()],
            [latent.clone()],
            move |device| {
                let codec = MelCodec::load(&dir, device)?;
                let network: Network = Box::new(move |inputs| {
                    let mel = inputs.get("mel")?;
                    codec.grid(mel.dim(1)?)?;
                    Ok(named([("latent", codec.encode(mel)?)]))
                });
                Ok(network)
            },
        ));
    }
    let dir = folder.path().to_owned();
    parts.push(Part::new("decoder", [latent], [mel], move |device| {
        let codec = MelCodec::load(&dir, device)?;
        let network: Network =
            Box::new(move |inputs| Ok(named([("mel", codec.decode(inputs.get("latent")?)?)])));
        Ok(network)
    }));
    Ok(parts)
}

fn vocoder(folder: &Folder) -> Result<Part, NetworkError> {
    let dir = folder.path().to_owned();
    let config: VocoderConfig = folder.config()?;
    Ok(Part::new(
        Place::Vocoder.folder(),
        [Port::numbers("mel", [Free("B"), Free("T"), Size(config.bands)])],
        [Port::numbers("waveform", [Free("B"), Free("160 T")])],
        move |device| {
            let vocoder = Vocoder::load(&dir, device)?;
            let network: Network =
                Box::new(move |inputs| Ok(named([("waveform", vocoder.forward(inputs.get("mel")?)?)])));
            Ok(network)
        },
    ))
}
