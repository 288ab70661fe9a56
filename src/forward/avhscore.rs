//! The builtin AVHScore encoder: frames and windows of sound to unit vectors of one space.

use fulgur_benchmark::encoder::{BuiltinConfig, BuiltinEncoder};

use super::Dim::{Free, Size};
use super::{Folder, Model, Network, NetworkError, Outputs, Part, Port};

/// Samples per second that the encoder hears.
const SAMPLE_RATE: f64 = 16_000.0;

/// Recognises an encoder by its temperature, which no other folder has beside two towers.
pub(super) fn recognise(folder: &Folder) -> Result<Option<Model>, NetworkError> {
    let towers = folder.has_below("picture.") && folder.has_below("sound.");
    if folder.class().is_some() || !towers || folder.shape("log_temperature").is_none() {
        return Ok(None);
    }
    let config: BuiltinConfig = folder.config()?;
    let window = (config.window_s * SAMPLE_RATE).round() as usize;
    let dir = folder.path().to_owned();
    // Absent inputs give no output, so each stream has a batch of its own.
    let part = Part::new(
        "encoder",
        [
            Port::numbers(
                "vision",
                [Free("B"), Size(config.size), Size(config.size), Size(3)],
            )
            .optional(),
            Port::numbers("audio", [Free("C"), Size(window)]).optional(),
        ],
        [
            Port::numbers("vision", [Free("B"), Size(config.embedding)]).optional(),
            Port::numbers("audio", [Free("C"), Size(config.embedding)]).optional(),
        ],
        move |device| {
            let encoder = BuiltinEncoder::load(&dir, device)?;
            let network: Network = Box::new(move |inputs| {
                let mut outputs = Outputs::new();
                if let Some(frames) = inputs.find("vision") {
                    outputs.insert("vision".to_owned(), encoder.embed_frames(frames)?);
                }
                if let Some(waves) = inputs.find("audio") {
                    outputs.insert("audio".to_owned(), encoder.embed_sound(waves)?);
                }
                Ok(outputs)
            });
            Ok(network)
        },
    );
    Ok(Some(Model {
        path: folder.path().to_owned(),
        kind: "fulgur-avhscore".to_owned(),
        parts: vec![part],
    }))
}
