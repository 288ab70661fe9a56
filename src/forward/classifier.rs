//! Classifiers of pictures: `pixel_values` to `logits`.

use candle_core::DType;
use fulgur_lightnet::vision::{Classifier, Config};

use super::Dim::{Free, Size};
use super::{Folder, Model, Network, NetworkError, Part, Port, named};

/// What `config.json` calls them.
const KIND: &str = "vision_classifier";

/// Recognises a classifier of pictures.
pub(super) fn recognise(folder: &Folder) -> Result<Option<Model>, NetworkError> {
    if folder.class() != Some(KIND) {
        return Ok(None);
    }
    let dir = folder.path().to_owned();
    let config = Config::read(&dir.join("config.json"))?;
    let part = Part::new(
        "classifier",
        [Port::numbers(
            "pixel_values",
            [Free("B"), Size(config.num_channels), Free("H"), Free("W")],
        )],
        [Port::numbers("logits", [Free("B"), Size(config.classes())])],
        move |device| {
            let model = Classifier::load(&dir, DType::F32, device)?;
            let network: Network = Box::new(move |inputs| {
                let logits = model.logits(inputs.get("pixel_values")?, None)?;
                Ok(named([("logits", logits)]))
            });
            Ok(network)
        },
    );
    Ok(Some(Model {
        path: folder.path().to_owned(),
        kind: KIND.to_owned(),
        parts: vec![part],
    }))
}
