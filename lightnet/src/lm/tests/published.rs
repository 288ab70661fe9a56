//! Models of other libraries.

use candle_core::{DType, Device};
use fulgur_kernels::embedding::Ids;

use super::square;
use crate::lm::LanguageModel;
use crate::testing;

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
        let values = testing::tensors(file);
        let root = tempfile::tempdir().unwrap();
        let dir = testing::model(folder, root.path());
        if let Some(config) = other {
            std::fs::copy(testing::golden(config), dir.join("config.json")).unwrap();
        }
        let model = LanguageModel::load(&dir, None, DType::F32, device).unwrap();
        let ids = values["input_ids"].to_dtype(DType::U32).unwrap();
        let ids = Ids::of(&ids, model.config().vocab_size).unwrap();
        let found = model.logits(&ids).unwrap();
        let wanted = &values[&format!("logits.{name}")];
        // Every third value, where the file is flat.
        let found = match wanted.rank() {
            1 => testing::thinned(&found, 3),
            _ => found,
        };
        let error = (square(&(&found - wanted).unwrap()).unwrap() / square(wanted).unwrap()).sqrt();
        assert!(error < 4e-6, "{folder} {name}: {error:e}");
    }
}
