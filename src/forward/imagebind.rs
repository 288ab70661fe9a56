//! ImageBind, with the names of its published checkpoint: preprocessed pictures, sounds and texts to vectors of one space.

use candle_core::DType;
use fulgur_lightnet::encoders::imagebind::{ImageBind, Input, Modality, prefix};

use super::Dim::{Free, Size};
use super::{Content, Folder, Model, Network, NetworkError, Outputs, Part, Port};

/// Recognises the tensors of ImageBind, under any prefix, with a configuration or without.
pub(super) fn recognise(folder: &Folder) -> Result<Option<Model>, NetworkError> {
    if prefix(folder.names()).is_none() {
        return Ok(None);
    }
    let path = folder.path().to_owned();
    // The sizes of the towers that are there; nothing is loaded.
    let model = ImageBind::open(&path, DType::F32, &candle_core::Device::Cpu)?;
    let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
    for modality in Modality::ALL {
        let Some(sizes) = model.sizes(modality) else {
            continue;
        };
        let name = modality.name();
        // Absent inputs give no output, so each has a batch of its own.
        let (port, batch) = match sizes.input {
            Input::Pictures {
                side,
                patch: [frames, ..],
            } => {
                let (b, s) = (Free("B"), Free("S"));
                let [c, t, side] = [3, frames, side].map(Size);
                let port = Port::numbers(name, [b, c, side, side])
                    .or([b, c, t, side, side])
                    .or([b, s, c, side, side])
                    .or([b, s, c, t, side, side]);
                (port, "B")
            }
            Input::Sounds { bands, frames, .. } => {
                let [channel, bands, frames] = [1, bands, frames].map(Size);
                let port = Port::numbers(name, [Free("C"), channel, bands, frames]);
                (port.or([Free("C"), Free("K"), channel, bands, frames]), "C")
            }
            Input::Texts { vocabulary, context } => {
                let content = Content::Ids(vocabulary);
                (Port::new(name, content, [Free("T"), Size(context)]), "T")
            }
        };
        inputs.push(port.optional());
        outputs.push(Port::numbers(name, [Free(batch), Size(sizes.embedding)]).optional());
    }
    let dir = path.clone();
    let part = Part::new("encoder", inputs, outputs, move |device| {
        let model = ImageBind::open(&dir, DType::F32, device)?;
        let network: Network = Box::new(move |inputs| {
            let mut outputs = Outputs::new();
            for modality in Modality::ALL {
                let name = modality.name();
                if let Some(input) = inputs.find(name) {
                    let vectors = model.tower(modality)?.embed(input)?;
                    outputs.insert(name.to_owned(), vectors);
                }
            }
            Ok(outputs)
        });
        Ok(network)
    });
    Ok(Some(Model {
        path,
        kind: "ImageBind".to_owned(),
        parts: vec![part],
    }))
}
