//! Models of other libraries.

use std::path::Path;

use candle_core::{DType, Device};
use fulgur_kernels::embedding::Ids;

use super::square;
use crate::lm::LanguageModel;
use crate::params::file;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden");

/// Logits of the libraries whose names we take (`tests/golden/*_logits.py`, `llama_variants.py`): a folder, the file and the
/// name of its logits, and another configuration, where there is one.
#[test]
fn logits_are_those_of_the_libraries() {
    let device = &Device::Cpu;
    let models = [
        ("llama_untied", "llama_logits", "untied", None),
        ("llama_tied", "llama_logits", "tied", None),
        (
            "llama_untied",
            "llama_logits",
            "theta_500000",
            Some("llama_theta_500000.json"),
        ),
        ("llama_scaled", "llama_variants", "llama3", None),
        (
            "llama_scaled",
            "llama_variants",
            "linear",
            Some("llama_linear.json"),
        ),
        ("hgrn2_bounded", "hgrn2_logits", "bounded", None),
        ("hgrn2_tied", "hgrn2_logits", "tied", None),
        ("hgrn2_plain", "hgrn2_logits", "plain", None),
        ("hgrn2_conv", "hgrn2_logits", "conv", None),
        ("hgrn2_hybrid", "hgrn2_logits", "hybrid", None),
        ("lightnet_hybrid", "lightnet_logits", "hybrid", None),
        ("lightnet_square", "lightnet_logits", "square", None),
        ("lightnet_narrow", "lightnet_logits", "narrow", None),
        ("lightnet_conv", "lightnet_logits", "conv", None),
        ("transnormer_mixed", "transnormer_logits", "mixed", None),
    ];
    for (folder, file, name, other) in models {
        let golden = Path::new(GOLDEN);
        let values = file::read(&golden.join(format!("{file}.safetensors")), device).unwrap();
        let mut dir = golden.join(folder);
        let copy = tempfile::tempdir().unwrap();
        if let Some(config) = other {
            for entry in std::fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
            }
            std::fs::copy(golden.join(config), copy.path().join("config.json")).unwrap();
            dir = copy.path().to_owned();
        }
        let model = LanguageModel::load(&dir, None, DType::F32, device).unwrap();
        let ids = values.tensors["input_ids"].to_dtype(DType::U32).unwrap();
        let ids = Ids::of(&ids, model.config().vocab_size).unwrap();
        let found = model.logits(&ids).unwrap();
        let wanted = &values.tensors[&format!("logits.{name}")];
        let error = (square(&(&found - wanted).unwrap()).unwrap() / square(wanted).unwrap()).sqrt();
        assert!(error < 4e-6, "{folder} {name}: {error:e}");
    }
}
