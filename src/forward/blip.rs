//! BLIP captioners with the names of Hugging Face transformers.

use candle_core::{DType, Tensor};
use fulgur_lightnet::encoders::blip::search::Options;
use fulgur_lightnet::encoders::blip::{Blip, MARK, MODEL_TYPE};

use super::Dim::{Free, Size};
use super::{Content, Folder, Model, Network, NetworkError, Outputs, Part, Port};

/// As `generate` has it: a beginning and 19 tokens, the likeliest of each.
const GREEDY: Options = Options {
    most: 19,
    beams: 1,
    length_penalty: 1.0,
};

/// Recognises the type of BLIP, and a captioner's tensors where a configuration says nothing.
pub(super) fn recognise(folder: &Folder) -> Result<Option<Model>, NetworkError> {
    let known = match folder.class() {
        Some(class) => class == MODEL_TYPE,
        None => folder.shape(MARK).is_some(),
    };
    if !known {
        return Ok(None);
    }
    let sizes = Blip::sizes_in(folder.path())?;
    let pixels = [Free("B"), Size(3), Size(sizes.side), Size(sizes.side)];
    let places = (sizes.side / sizes.patch).pow(2) + 1;
    let inputs = [
        Port::numbers("pixel_values", pixels),
        Port::new(
            "input_ids",
            Content::Ids(sizes.vocabulary),
            [Free("B"), Free("L")],
        )
        .optional(),
        Port::new("attention_mask", Content::Mask, [Free("B"), Free("L")]).optional(),
    ];
    // Without a text one is written: its tokens, the beginning first, and padding behind the end of shorter ones.
    let outputs = [
        Port::numbers(
            "image_embeds",
            [Free("B"), Size(places), Size(sizes.vision.width)],
        ),
        Port::numbers("logits", [Free("B"), Free("L"), Size(sizes.vocabulary)]).optional(),
        Port::new(
            "sequences",
            Content::Ids(sizes.vocabulary),
            [Free("B"), Free("N")],
        )
        .optional(),
    ];
    let dir = folder.path().to_owned();
    let part = Part::new("model", inputs, outputs, move |device| {
        let blip = Blip::load(&dir, DType::F32, device)?;
        let network: Network = Box::new(move |inputs| {
            let states = blip.states(inputs.get("pixel_values")?)?;
            let mut outputs = Outputs::from([("image_embeds".to_owned(), states.clone())]);
            match (inputs.find("input_ids"), inputs.find("attention_mask")) {
                (Some(ids), mask) => {
                    outputs.insert("logits".to_owned(), blip.logits(&states, ids, mask)?);
                }
                (None, Some(_)) => return Err("attention_mask is of input_ids, which are missing".into()),
                (None, None) => {
                    outputs.insert("sequences".to_owned(), written(&blip, &states)?);
                }
            }
            Ok(outputs)
        });
        Ok(network)
    });
    Ok(Some(Model {
        path: folder.path().to_owned(),
        kind: MODEL_TYPE.to_owned(),
        parts: vec![part],
    }))
}

/// Tokens `[B, N]` of the likeliest texts.
fn written(blip: &Blip, states: &Tensor) -> candle_core::Result<Tensor> {
    let (begin, end, pad) = (blip.sizes().begin, blip.sizes().end, blip.sizes().pad);
    let batch = states.dim(0)?;
    let mut rows = Vec::with_capacity(batch);
    for row in 0..batch {
        let found = blip.caption(&states.narrow(0, row, 1)?, &[begin], &GREEDY, &|| true)?;
        let mut tokens = vec![begin];
        tokens.extend(found.tokens);
        if found.ended {
            tokens.push(end);
        }
        rows.push(tokens);
    }
    let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
    rows.iter_mut().for_each(|row| row.resize(longest, pad));
    Tensor::from_vec(rows.concat(), (batch, longest), states.device())
}
