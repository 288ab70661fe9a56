//! Networks that metrics look and listen through: I3D, VGGish, PANNs and CLAP, with the names of their published checkpoints.

use fulgur_benchmark::features::clap::{AudioConfig, Clap, ClapConfig, MODEL_TYPE};
use fulgur_benchmark::features::i3d::{self, I3d, I3dConfig};
use fulgur_benchmark::features::panns::{self, Panns, PannsConfig};
use fulgur_benchmark::features::vggish::{self, Vggish, VggishConfig};

use super::Dim::{Free, Size};
use super::{Content, Folder, Model, Network, NetworkError, Outputs, Part, Port, named};

fn model(folder: &Folder, kind: &str, part: Part) -> Model {
    Model {
        path: folder.path().to_owned(),
        kind: kind.to_owned(),
        parts: vec![part],
    }
}

/// Recognises each by a tensor that no other has.
pub(super) fn recognise(folder: &Folder) -> Result<Option<Model>, NetworkError> {
    if folder.class() == Some(MODEL_TYPE) {
        return Ok(Some(clap(folder)?));
    }
    if folder.class().is_some() {
        return Ok(None);
    }
    let has = |name: &str| folder.shape(name).is_some();
    Ok(if has(i3d::MARK) {
        Some(i3d(folder))
    } else if has(vggish::MARK) && has(vggish::MARK_END) {
        Some(vggish(folder))
    } else if has(panns::MARK) && has("conv_block1.conv1.weight") {
        Some(panns(folder))
    } else {
        None
    })
}

fn i3d(folder: &Folder) -> Model {
    let classes = I3dConfig::of(folder.shapes()).classes;
    let dir = folder.path().to_owned();
    let part = Part::new(
        "i3d",
        [Port::numbers(
            "sample",
            [Free("B"), Size(3), Free("F"), Size(i3d::SIZE), Size(i3d::SIZE)],
        )],
        [Port::numbers("logits", [Free("B"), Size(classes)])],
        move |device| {
            let network = I3d::load(&dir, device)?;
            let network: Network =
                Box::new(move |inputs| Ok(named([("logits", network.forward(inputs.get("sample")?)?)])));
            Ok(network)
        },
    );
    model(folder, "i3d", part)
}

fn vggish(folder: &Folder) -> Model {
    let [.., width] = VggishConfig::of(folder.shapes()).linear;
    let [frames, bands] = vggish::PATCH;
    let dir = folder.path().to_owned();
    let part = Part::new(
        "vggish",
        [Port::numbers("patches", [Free("B"), Size(frames), Size(bands)])],
        [Port::numbers("embedding", [Free("B"), Size(width)])],
        move |device| {
            let network = Vggish::load(&dir, device)?;
            let network: Network =
                Box::new(move |inputs| Ok(named([("embedding", network.forward(inputs.get("patches")?)?)])));
            Ok(network)
        },
    );
    model(folder, "vggish", part)
}

fn panns(folder: &Folder) -> Model {
    let config = PannsConfig::of(folder.shapes());
    let dir = folder.path().to_owned();
    let part = Part::new(
        "panns",
        [Port::numbers("mel", [Free("B"), Free("T"), Size(panns::BANDS)])],
        [
            Port::numbers("embedding", [Free("B"), Size(config.embedding)]),
            Port::numbers("logits", [Free("B"), Size(config.classes)]),
        ],
        move |device| {
            let network = Panns::load(&dir, device)?;
            let network: Network = Box::new(move |inputs| {
                let heard = network.forward(inputs.get("mel")?)?;
                Ok(named([("embedding", heard.embedding), ("logits", heard.logits)]))
            });
            Ok(network)
        },
    );
    model(folder, "panns", part)
}

fn clap(folder: &Folder) -> Result<Model, NetworkError> {
    let config: ClapConfig = folder.config()?;
    let AudioConfig { num_mel_bins, .. } = config.audio_config;
    let word = |name: &str| {
        format!(
            "{}: found no matrix `{name}`, expected the weights of a CLAP",
            folder.path().display()
        )
    };
    let rows = |name: &str| match folder.shape(name) {
        Some(&[rows, _]) => Ok(rows),
        _ => Err(word(name)),
    };
    let vocabulary = rows("text_model.embeddings.word_embeddings.weight")?;
    let text = rows("text_projection.linear2.weight")?;
    let audio = rows("audio_projection.linear2.weight")?;
    let dir = folder.path().to_owned();
    // Absent inputs give no output, so each tower has a batch of its own.
    let part = Part::new(
        "clap",
        [
            Port::new("input_ids", Content::Ids(vocabulary), [Free("B"), Free("L")]).optional(),
            Port::new("attention_mask", Content::Mask, [Free("B"), Free("L")]).optional(),
            Port::numbers(
                "input_features",
                [Free("A"), Size(1), Free("T"), Size(num_mel_bins)],
            )
            .optional(),
        ],
        [
            Port::numbers("text_embeds", [Free("B"), Size(text)]).optional(),
            Port::numbers("audio_embeds", [Free("A"), Size(audio)]).optional(),
        ],
        move |device| {
            let clap = Clap::load(&dir, device)?;
            let network: Network = Box::new(move |inputs| {
                let mut outputs = Outputs::new();
                if let Some(ids) = inputs.find("input_ids") {
                    let embeds = clap.text(ids, inputs.find("attention_mask"))?;
                    outputs.insert("text_embeds".to_owned(), embeds);
                }
                if let Some(features) = inputs.find("input_features") {
                    outputs.insert("audio_embeds".to_owned(), clap.audio(features)?);
                }
                Ok(outputs)
            });
            Ok(network)
        },
    );
    Ok(model(folder, MODEL_TYPE, part))
}
