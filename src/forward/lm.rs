//! Language models: those of Hugging Face (LLaMA), flash-linear-attention (HGRN2, LightNet), TransNormerLLM, and those that were
//! trained here, by their `model_type`, else by the names of their tensors.

use candle_core::DType;
use fulgur_kernels::embedding::Ids;
use fulgur_lightnet::lm::{Architecture, Config, LanguageModel};

use super::Dim::{Free, Size};
use super::{Content, Folder, Model, Network, NetworkError, Part, Port, named};

/// Tensors of the first layer that only models of one kind have.
const MARKS: [(&str, Architecture); 4] = [
    ("model.layers.0.self_attn.q_proj.weight", Architecture::Llama),
    (
        "model.layers.0.token_mixer.qkvu_proj.weight",
        Architecture::Transnormer,
    ),
    ("model.layers.0.attn.f_proj.weight", Architecture::Hgrn2),
    ("model.layers.0.attn.g_proj.0.weight", Architecture::Lightnet),
];

/// Recognises a language model.
pub(super) fn recognise(folder: &Folder) -> Result<Option<Model>, NetworkError> {
    let fallback = match folder.class() {
        Some(class) if Architecture::ALL.iter().any(|kind| kind.name() == class) => None,
        Some(_) => return Ok(None),
        None => match MARKS.iter().find(|(name, _)| folder.shape(name).is_some()) {
            Some((_, kind)) => Some(*kind),
            None => return Ok(None),
        },
    };
    let dir = folder.path().to_owned();
    let config = Config::read(&dir.join("config.json"), fallback)?;
    let (vocabulary, masked) = (config.vocab_size, config.bidirectional);
    let mut inputs = vec![Port::new(
        "input_ids",
        Content::Ids(vocabulary),
        [Free("B"), Free("N")],
    )];
    if masked {
        inputs.push(Port::new("attention_mask", Content::Mask, [Free("B"), Free("N")]).optional());
    }
    let part = Part::new(
        "language_model",
        inputs,
        [Port::numbers("logits", [Free("B"), Free("N"), Size(vocabulary)])],
        move |device| {
            let model = LanguageModel::load(&dir, fallback, DType::F32, device)?;
            let network: Network = Box::new(move |inputs| {
                let ids = Ids::of(inputs.get("input_ids")?, vocabulary)?;
                let logits = match inputs.find("attention_mask") {
                    Some(mask) => model.masked_logits(&ids, mask)?,
                    None => model.logits(&ids)?,
                };
                Ok(named([("logits", logits)]))
            });
            Ok(network)
        },
    );
    Ok(Some(Model {
        path: folder.path().to_owned(),
        kind: config.architecture.name().to_owned(),
        parts: vec![part],
    }))
}
