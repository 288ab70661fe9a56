//! BERT encoders, such as the sentence encoder MiniLM, with the names of Hugging Face transformers.

use fulgur_lightnet::encoders::bert::Bert;

use super::Dim::{Free, Size};
use super::{Content, Folder, Model, Network, NetworkError, Part, Port, named};

const MODEL_TYPE: &str = "bert";
/// Names of the table of words, with and without the prefix of a larger model.
const WORDS: [&str; 2] = [
    "embeddings.word_embeddings.weight",
    "bert.embeddings.word_embeddings.weight",
];

/// Recognises `model_type` `bert`, or the embeddings of one where the configuration does not say what it is.
pub(super) fn recognise(folder: &Folder) -> Result<Option<Model>, NetworkError> {
    let words = WORDS.iter().find_map(|name| folder.shape(name));
    match (folder.class(), words) {
        (Some(MODEL_TYPE), _) | (None, Some(_)) => {}
        _ => return Ok(None),
    }
    let Some(&[vocabulary, hidden]) = words else {
        let path = folder.path().join("model.safetensors");
        return Err(format!(
            "{}: found no matrix `{}`, expected the weights of a BERT encoder",
            path.display(),
            WORDS[0]
        )
        .into());
    };
    let dir = folder.path().to_owned();
    let part = Part::new(
        "encoder",
        [
            Port::new("input_ids", Content::Ids(vocabulary), [Free("B"), Free("L")]),
            Port::new("attention_mask", Content::Mask, [Free("B"), Free("L")]).optional(),
        ],
        [Port::numbers(
            "last_hidden_state",
            [Free("B"), Free("L"), Size(hidden)],
        )],
        move |device| {
            let bert = Bert::load(&dir, device)?;
            let network: Network = Box::new(move |inputs| {
                let states = bert.forward(inputs.get("input_ids")?, inputs.find("attention_mask"))?;
                Ok(named([("last_hidden_state", states)]))
            });
            Ok(network)
        },
    );
    Ok(Some(Model {
        path: folder.path().to_owned(),
        kind: MODEL_TYPE.to_owned(),
        parts: vec![part],
    }))
}
