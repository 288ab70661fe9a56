//! CLIP with the names of Hugging Face transformers: whole models and single towers.

use candle_core::{DType, Device};
use fulgur_lightnet::encoders::clip::{Clip, Encoded, Side};

use super::Dim::{Free, Size};
use super::{Content, Folder, Model, Network, NetworkError, Outputs, Part, Port};

/// What `model_type` says of a whole model, and of a tower of texts or of pictures.
const MODEL_TYPES: [&str; 3] = ["clip", "clip_text_model", "clip_vision_model"];
/// Tensors by which a model without a type is known.
const MARKS: [&str; 2] = [
    "text_model.embeddings.token_embedding.weight",
    "vision_model.embeddings.class_embedding",
];

/// Recognises the types of CLIP, and its tensors where a configuration says nothing.
pub(super) fn recognise(folder: &Folder) -> Result<Option<Model>, NetworkError> {
    let known = match folder.class() {
        Some(class) => MODEL_TYPES.contains(&class),
        None => MARKS.iter().any(|mark| folder.shape(mark).is_some()),
    };
    if !known {
        return Ok(None);
    }
    let path = folder.path().to_owned();
    let model = Clip::open(&path, DType::F32, &Device::Cpu)?;
    let size = |side: Side| model.sizes(side);
    let part = match (size(Side::Vision), size(Side::Text)) {
        (Some(_), Some(_)) => whole(&model, folder),
        (Some(_), None) => tower(&model, folder, Side::Vision),
        _ => tower(&model, folder, Side::Text),
    };
    Ok(Some(Model {
        path,
        kind: folder.class().unwrap_or(MODEL_TYPES[0]).to_owned(),
        parts: vec![part],
    }))
}

/// The texts in a file of latent diffusion.
pub(super) fn texts_in(folder: &Folder) -> Result<Part, NetworkError> {
    let model = Clip::open(folder.path(), DType::F32, &Device::Cpu)?;
    Ok(tower(&model, folder, Side::Text))
}

/// Inputs of a tower; each side has a batch of its own.
fn inputs(model: &Clip, side: Side) -> Vec<Port> {
    let Some(sizes) = model.sizes(side) else {
        return Vec::new();
    };
    match side {
        Side::Vision => {
            let pixels = [Free("B"), Size(3), Size(sizes.length), Size(sizes.length)];
            vec![Port::numbers("pixel_values", pixels)]
        }
        Side::Text => vec![
            Port::new("input_ids", Content::Ids(sizes.pieces), [Free("T"), Free("L")]),
            Port::new("attention_mask", Content::Mask, [Free("T"), Free("L")]).optional(),
        ],
    }
}

fn embeds(side: Side) -> &'static str {
    match side {
        Side::Vision => "image_embeds",
        Side::Text => "text_embeds",
    }
}

fn batch(side: Side) -> &'static str {
    match side {
        Side::Vision => "B",
        Side::Text => "T",
    }
}

/// A whole model gives vectors of length one, of what it is given.
fn whole(model: &Clip, folder: &Folder) -> Part {
    let ports = Side::BOTH.into_iter().flat_map(|side| inputs(model, side));
    let ports: Vec<Port> = ports.map(Port::optional).collect();
    let outputs = Side::BOTH.into_iter().filter_map(|side| {
        let width = model.sizes(side)?.projection?;
        Some(Port::numbers(embeds(side), [Free(batch(side)), Size(width)]).optional())
    });
    let outputs: Vec<Port> = outputs.collect();
    let dir = folder.path().to_owned();
    Part::new("model", ports, outputs, move |device| {
        let model = Clip::open(&dir, DType::F32, device)?;
        let network: Network = Box::new(move |inputs| {
            let mut outputs = Outputs::new();
            if let Some(pixels) = inputs.find("pixel_values") {
                outputs.insert(embeds(Side::Vision).to_owned(), model.image_embeds(pixels)?);
            }
            match (inputs.find("input_ids"), inputs.find("attention_mask")) {
                (Some(ids), mask) => {
                    outputs.insert(embeds(Side::Text).to_owned(), model.text_embeds(ids, mask)?);
                }
                (None, Some(_)) => return Err("attention_mask is of input_ids, which are missing".into()),
                (None, None) => {}
            }
            Ok(outputs)
        });
        Ok(network)
    })
}

/// A tower alone gives its states too, and a projection that is not of length one.
fn tower(model: &Clip, folder: &Folder, side: Side) -> Part {
    let (letter, mut outputs) = (Free(batch(side)), Vec::new());
    if let Some(sizes) = model.sizes(side) {
        let width = Size(sizes.trunk.width);
        outputs.push(Port::numbers("last_hidden_state", [letter, Free("N"), width]));
        outputs.push(Port::numbers("pooler_output", [letter, width]));
        if let Some(projection) = sizes.projection {
            outputs.push(Port::numbers(embeds(side), [letter, Size(projection)]));
        }
    }
    let name = match side {
        Side::Vision => "vision_model",
        Side::Text => "text_model",
    };
    let dir = folder.path().to_owned();
    Part::new(name, inputs(model, side), outputs, move |device| {
        let tower = Clip::open(&dir, DType::F32, device)?.tower(side)?;
        let network: Network = Box::new(move |inputs| {
            let Encoded {
                states,
                pooled,
                projected,
            } = match side {
                Side::Vision => tower.pictures(inputs.get("pixel_values")?)?,
                Side::Text => tower.texts(inputs.get("input_ids")?, inputs.find("attention_mask"))?,
            };
            let mut outputs = Outputs::from([
                ("last_hidden_state".to_owned(), states),
                ("pooler_output".to_owned(), pooled),
            ]);
            if let Some(projected) = projected {
                outputs.insert(embeds(side).to_owned(), projected);
            }
            Ok(outputs)
        });
        Ok(network)
    })
}
