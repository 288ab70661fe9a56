//! Text encoder: bidirectional LightNet blocks over sub-word pieces.
//!
//! ```text
//! x = MD-TPE(W pieces)                     factorised embedding, both directions of one axis
//! L times: x = x + LightNet(Norm x);  x = x + GLU(Norm x)
//! states = Norm x                          what the generator reads by cross-attention
//! sentence = unit(W_s mean(states))        distilled from a larger encoder
//! ```
//!
//! Padding never reaches a real token: it is zero before every sum over tokens.
//! Shapes: B batch, L tokens, d model width, e width of the embedding, s width of the sentence vector.

use std::path::Path;

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use candle_nn::{Init, VarBuilder};
use fulgur_lightnet::block::{Block, BlockConfig, BlockContext};
use fulgur_lightnet::linear::{Linear, Start};
use fulgur_lightnet::norm::RmsNorm;
use fulgur_lightnet::params::Frozen;
use fulgur_lightnet::position::{Grid, MdTpe, TpeConfig};
use serde::{Deserialize, Serialize};

use super::tokenizer::{TextBatch, TextTokenizer};
use super::{Result, TextError};

/// `model_type` in the `config.json` of a text encoder.
pub const MODEL_TYPE: &str = "fulgur-text";
/// Limits of every size in a configuration, so that a damaged file cannot ask for absurd memory.
const LARGEST: usize = 1 << 20;

/// Shape of a [`TextEncoder`]: the contents of its `config.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextConfig {
    /// Always [`MODEL_TYPE`].
    pub model_type: String,
    /// Pieces in the vocabulary.
    pub vocab_size: usize,
    /// Width e of the factorised embedding.
    pub embedding_size: usize,
    /// Model width d.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Heads of the mixer.
    pub num_attention_heads: usize,
    /// Key width of a head.
    pub head_dim: usize,
    /// Hidden width of the gated linear units.
    pub intermediate_size: usize,
    /// Longest sequence in tokens, the start piece included.
    pub max_position_embeddings: usize,
    /// Width s of the sentence vector: that of the teacher.
    pub sentence_size: usize,
}

impl Default for TextConfig {
    /// 3.5 M parameters: 5,632 pieces, four blocks of width 256, 48 tokens, sentence vectors of MiniLM's width.
    fn default() -> Self {
        Self {
            model_type: MODEL_TYPE.into(),
            vocab_size: 5632,
            embedding_size: 128,
            hidden_size: 256,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            head_dim: 64,
            intermediate_size: 448,
            max_position_embeddings: 48,
            sentence_size: 384,
        }
    }
}

impl TextConfig {
    /// Reads `config.json` of `folder` and checks it.
    ///
    /// # Errors
    /// The file is unreadable, or describes no text encoder.
    pub fn read(folder: &Path) -> Result<Self> {
        let (path, bytes) = super::read(folder.join("config.json"))?;
        let broken = |field: &str, found: String, expected: String| TextError::Field {
            path: path.clone(),
            field: field.to_owned(),
            found,
            expected,
        };
        let config: Self = serde_json::from_slice(&bytes).map_err(|error| {
            broken(
                "configuration",
                error.to_string(),
                "that of a text encoder".to_owned(),
            )
        })?;
        match config.fault() {
            Some((field, found, expected)) => Err(broken(field, found, expected)),
            None => Ok(config),
        }
    }

    /// The first field that no encoder can have, with what it may be.
    fn fault(&self) -> Option<(&'static str, String, String)> {
        if self.model_type != MODEL_TYPE {
            return Some(("model_type", self.model_type.clone(), MODEL_TYPE.into()));
        }
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("embedding_size", self.embedding_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("head_dim", self.head_dim),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("sentence_size", self.sentence_size),
        ];
        let odd = sizes.into_iter().find(|(_, size)| !(1..=LARGEST).contains(size));
        if let Some((field, size)) = odd {
            return Some((field, size.to_string(), format!("1 to {LARGEST}")));
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            let expected = format!("a divisor of the hidden size {}", self.hidden_size);
            return Some((
                "num_attention_heads",
                self.num_attention_heads.to_string(),
                expected,
            ));
        }
        None
    }
}

/// What an encoder says about a batch of texts.
#[derive(Clone, Debug)]
pub struct TextStates {
    /// Token states `[B, L, d]`, zero at padding.
    pub states: Tensor,
    /// `[B, L]`: 1 for tokens, 0 for padding.
    pub mask: Tensor,
    /// Sentence vectors `[B, s]` of length one.
    pub sentence: Tensor,
}

/// The network.
#[derive(Clone, Debug)]
pub struct TextEncoder {
    config: TextConfig,
    pieces: Tensor,
    widen: Linear,
    position: MdTpe,
    blocks: Vec<Block>,
    norm: RmsNorm,
    sentence: Linear,
    recall: Linear,
}

impl TextEncoder {
    /// Takes `pieces.weight` `[V, e]`, `widen`, `position`, `blocks.{i}`, `norm`, `sentence` and `recall`.
    ///
    /// # Errors
    /// A configuration that no encoder can have; tensors that are missing or have another shape.
    pub fn new(config: &TextConfig, vb: &VarBuilder) -> CandleResult<Self> {
        if let Some((field, found, expected)) = config.fault() {
            candle_core::bail!("text encoder: {field}: found {found}, expected {expected}");
        }
        let TextConfig {
            embedding_size,
            hidden_size: dim,
            num_attention_heads: heads,
            ..
        } = *config;
        let block = BlockConfig {
            dim,
            heads,
            head_dim: config.head_dim,
            hidden: config.intermediate_size,
            lrpe: Some((1, config.max_position_embeddings)),
            // The shift does not know the mask: padding would reach the last real token.
            token_shift: false,
            context: None,
            modulated: false,
        };
        let position = TpeConfig {
            dim,
            heads,
            axes: 1,
            two_sided: true,
            residual: true,
        };
        let unit = Init::Randn {
            mean: 0.0,
            stdev: 1.0,
        };
        Ok(Self {
            pieces: vb
                .pp("pieces")
                .get_with_hints((config.vocab_size, embedding_size), "weight", unit)?,
            widen: Linear::new(embedding_size, dim, false, Start::FanIn, &vb.pp("widen"))?,
            position: MdTpe::new(position, &vb.pp("position"))?,
            blocks: (0..config.num_hidden_layers)
                .map(|i| Block::new(block, &vb.pp("blocks").pp(i)))
                .collect::<CandleResult<_>>()?,
            norm: RmsNorm::new(dim, &vb.pp("norm"))?,
            sentence: Linear::new(dim, config.sentence_size, true, Start::FanIn, &vb.pp("sentence"))?,
            recall: Linear::new(dim, embedding_size, true, Start::FanIn, &vb.pp("recall"))?,
            config: config.clone(),
        })
    }

    /// Reads `config.json` and `model.safetensors` of `folder`; the vocabulary is not needed.
    ///
    /// # Errors
    /// A file that is missing, damaged or of another model.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        Self::weighted(folder, &TextConfig::read(folder)?, device)
    }

    fn weighted(folder: &Path, config: &TextConfig, device: &Device) -> Result<Self> {
        let weights = Frozen::open(&folder.join("model.safetensors"), device)?;
        let encoder = Self::new(config, &weights.builder())?;
        weights.all_used()?;
        Ok(encoder)
    }

    /// The shape.
    pub fn config(&self) -> &TextConfig {
        &self.config
    }

    /// Encodes `ids` `[B, L]` `u32` with `mask` `[B, L]` (1 for tokens, 0 for padding, which comes last).
    ///
    /// `compute` is the dtype inside the branches, `BF16` on a GPU; everything else stays in the dtype of the weights.
    ///
    /// # Errors
    /// More tokens than the configuration says, an id outside the vocabulary, a mask of another shape.
    pub fn forward(&self, ids: &Tensor, mask: &Tensor, compute: Option<DType>) -> CandleResult<TextStates> {
        let (batch, tokens) = ids.dims2()?;
        let longest = self.config.max_position_embeddings;
        if batch == 0 || tokens == 0 || tokens > longest {
            candle_core::bail!(
                "text encoder: ids are {batch} x {tokens}, expected rows of 1 to {longest} tokens"
            );
        }
        if mask.dims() != [batch, tokens] {
            candle_core::bail!(
                "text encoder: mask is {:?}, expected [{batch}, {tokens}]",
                mask.dims()
            );
        }
        let mask = mask.to_dtype(self.pieces.dtype())?;
        let mask_bl1 = mask.unsqueeze(2)?;
        let grid = Grid::new(&[tokens]);
        let context = BlockContext {
            mask: Some(&mask),
            compute,
            ..BlockContext::on(&grid)
        };

        let pieces = self.pieces.index_select(&ids.flatten_all()?, 0)?;
        let x_bld = self
            .widen
            .forward(&pieces)?
            .reshape((batch, tokens, self.config.hidden_size))?;
        let x_bld = self
            .position
            .forward(&x_bld.broadcast_mul(&mask_bl1)?, &grid, None)?;
        let mut x_bld = x_bld.broadcast_mul(&mask_bl1)?;
        for block in &self.blocks {
            x_bld = block.forward(&x_bld, &context)?;
        }
        let states = self.norm.forward(&x_bld)?.broadcast_mul(&mask_bl1)?;
        let count = mask_bl1.sum(1)?.clamp(1.0, f64::from(f32::MAX))?;
        let sentence = self.sentence.forward(&states.sum(1)?.broadcast_div(&count)?)?;
        Ok(TextStates {
            states,
            mask,
            sentence: unit(&sentence)?,
        })
    }

    /// Logits `[M, V]` of the pieces that `states` `[M, d]` stand for: the training task that keeps words in them.
    ///
    /// # Errors
    /// States of another width.
    pub fn recall(&self, states: &Tensor) -> CandleResult<Tensor> {
        let scale = (self.config.embedding_size as f64).powf(-0.5);
        (self.recall.forward(states)? * scale)?.matmul(&self.pieces.t()?)
    }
}

/// Scales the rows of `x` `[B, s]` to length one; a zero row stays zero.
fn unit(x: &Tensor) -> CandleResult<Tensor> {
    let square = x.sqr()?.sum_keepdim(1)?;
    x.broadcast_div(&(square + 1e-12)?.sqrt()?)
}

/// A vocabulary and an encoder: prompts in, states out.
#[derive(Clone, Debug)]
pub struct TextModel {
    tokenizer: TextTokenizer,
    encoder: TextEncoder,
    device: Device,
}

impl TextModel {
    /// Reads `config.json`, `model.safetensors` and `tokenizer.json` of `folder`.
    ///
    /// # Errors
    /// A file that is missing, damaged or of another model.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        let config = TextConfig::read(folder)?;
        let tokenizer = TextTokenizer::load(&folder.join("tokenizer.json"))?;
        let pieces = tokenizer.vocabulary();
        if pieces > config.vocab_size {
            return Err(TextError::Field {
                path: folder.join("config.json"),
                field: "vocab_size".to_owned(),
                found: config.vocab_size.to_string(),
                expected: format!("at least the {pieces} pieces of tokenizer.json"),
            });
        }
        let encoder = TextEncoder::weighted(folder, &config, device)?;
        Ok(Self {
            tokenizer,
            encoder,
            device: device.clone(),
        })
    }

    /// Joins a vocabulary and a network that are in memory already.
    pub fn new(tokenizer: TextTokenizer, encoder: TextEncoder, device: &Device) -> Self {
        Self {
            tokenizer,
            encoder,
            device: device.clone(),
        }
    }

    /// The vocabulary.
    pub fn tokenizer(&self) -> &TextTokenizer {
        &self.tokenizer
    }

    /// The network.
    pub fn encoder(&self) -> &TextEncoder {
        &self.encoder
    }

    /// Pieces of `texts`, cut to the longest sequence that the network takes.
    ///
    /// # Errors
    /// No texts.
    pub fn tokenize<S: AsRef<str>>(&self, texts: &[S]) -> Result<TextBatch> {
        self.tokenizer
            .batch(texts, self.encoder.config.max_position_embeddings, &self.device)
    }

    /// States and sentence vectors of `texts`; the empty text is a valid one.
    ///
    /// # Errors
    /// No texts.
    pub fn encode<S: AsRef<str>>(&self, texts: &[S]) -> Result<TextStates> {
        let batch = self.tokenize(texts)?;
        Ok(self.encoder.forward(&batch.ids, &batch.mask, None)?)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use fulgur_kernels::philox::Philox;
    use fulgur_lightnet::params::{Params, Precision};

    use super::*;

    fn small() -> TextConfig {
        TextConfig {
            vocab_size: 300,
            embedding_size: 12,
            hidden_size: 24,
            num_hidden_layers: 2,
            num_attention_heads: 3,
            head_dim: 5,
            intermediate_size: 20,
            max_position_embeddings: 9,
            sentence_size: 10,
            ..TextConfig::default()
        }
    }

    /// An encoder none of whose branches is silent: a fresh one starts with zero outputs.
    fn awake(params: &Params) -> CandleResult<TextEncoder> {
        let encoder = TextEncoder::new(&small(), &params.builder())?;
        for (name, var) in params.vars() {
            let mut noise = Philox::named(1, &name);
            let values: Vec<f32> = (0..var.elem_count()).map(|_| 0.2 * noise.normal()).collect();
            let noise = Tensor::from_vec(values, var.shape(), &Device::Cpu)?;
            var.set(&(var.as_tensor() + noise)?)?;
        }
        Ok(encoder)
    }

    fn tokenizer() -> TextTokenizer {
        TextTokenizer::train(&["a dog barks", "a dog barks twice"], 300).unwrap()
    }

    fn difference(a: &Tensor, b: &Tensor) -> f32 {
        (a - b)
            .unwrap()
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar()
            .unwrap()
    }

    #[test]
    fn batch_equals_single_and_padding_changes_nothing() -> Result<()> {
        let model = TextModel::new(
            tokenizer(),
            awake(&Params::random(3, &Device::Cpu))?,
            &Device::Cpu,
        );
        let texts = [
            "a dog barks twice",
            "",
            "a crow",
            "a dog barks and barks and barks and barks and barks",
        ];
        let together = model.encode(&texts)?;
        for (row, text) in texts.iter().enumerate() {
            let alone = model.encode(&[text])?;
            let tokens = alone.states.dims()[1];
            let same = together.states.narrow(0, row, 1)?;
            assert!(
                difference(&alone.states, &same.narrow(1, 0, tokens)?) < 1e-5,
                "{text:?}"
            );
            assert!(
                difference(&alone.sentence, &together.sentence.narrow(0, row, 1)?) < 1e-5,
                "{text:?}"
            );
            let padding = same.narrow(1, tokens, same.dims()[1] - tokens)?;
            assert_eq!(padding.abs()?.sum_all()?.to_scalar::<f32>()?, 0.0);
        }
        // What stands at padding is never looked at.
        let batch = model.tokenize(&texts)?;
        let noise = ((&batch.mask - 1.0)?.abs()? * 77.0)?.to_dtype(DType::U32)?;
        let other = model
            .encoder()
            .forward(&(&batch.ids + noise)?, &batch.mask, None)?;
        assert_eq!(difference(&other.states, &together.states), 0.0);
        Ok(())
    }

    #[test]
    fn order_of_words_matters_and_vectors_have_length_one() -> Result<()> {
        let model = TextModel::new(
            tokenizer(),
            awake(&Params::random(3, &Device::Cpu))?,
            &Device::Cpu,
        );
        let vectors = model.encode(&["a dog barks", "dog a barks"])?.sentence;
        assert!(difference(&vectors.get(0)?, &vectors.get(1)?) > 1e-3);
        for length in vectors.sqr()?.sum(1)?.to_vec1::<f32>()? {
            assert!((length - 1.0).abs() < 1e-5);
        }
        Ok(())
    }

    #[test]
    fn the_default_has_the_promised_size_and_every_weight_gets_a_gradient() -> Result<()> {
        let params = Params::random(0, &Device::Cpu);
        TextEncoder::new(&TextConfig::default(), &params.builder())?;
        assert!(
            (2_500_000..=3_600_000).contains(&params.count()),
            "{}",
            params.count()
        );

        let params = Params::random(3, &Device::Cpu);
        let model = TextModel::new(tokenizer(), awake(&params)?, &Device::Cpu);
        let output = model.encode(&["a dog barks", "a crow"])?;
        let recalled = model.encoder().recall(&output.states.flatten(0, 1)?)?;
        let probe = Tensor::arange(0f32, 10.0, &Device::Cpu)?;
        let loss = (output.sentence.broadcast_mul(&probe)?.sum_all()? + recalled.sqr()?.mean_all()?)?;
        let gradients = loss.backward()?;
        for (name, var) in params.vars() {
            let gradient = gradients
                .get(&var)
                .unwrap_or_else(|| panic!("{name} has no gradient"));
            let size = gradient.abs()?.sum_all()?.to_scalar::<f32>()?;
            assert!(size.is_finite() && size > 0.0, "{name}: {size}");
        }
        Ok(())
    }

    #[test]
    fn folders_come_back_and_broken_ones_are_named() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let params = Params::random(3, &Device::Cpu);
        let model = TextModel::new(tokenizer(), awake(&params)?, &Device::Cpu);
        params.save(&at("model.safetensors"), &BTreeMap::new(), Precision::F32)?;
        std::fs::write(at("tokenizer.json"), model.tokenizer().to_json()?).unwrap();
        std::fs::write(at("config.json"), serde_json::to_string(&small()).unwrap()).unwrap();
        let loaded = TextModel::load(folder.path(), &Device::Cpu)?;
        let text = ["a dog barks at a crow"];
        assert_eq!(
            difference(&loaded.encode(&text)?.states, &model.encode(&text)?.states),
            0.0
        );

        let named = |name: &str, contents: &[u8]| {
            let kept = std::fs::read(at(name)).unwrap();
            std::fs::write(at(name), contents).unwrap();
            let message = TextModel::load(folder.path(), &Device::Cpu)
                .unwrap_err()
                .to_string();
            assert!(message.contains(name) && !message.contains('\n'), "{message}");
            std::fs::write(at(name), kept).unwrap();
        };
        let config = |change: fn(&mut TextConfig)| {
            let mut config = small();
            change(&mut config);
            serde_json::to_vec(&config).unwrap()
        };
        named("config.json", b"{}");
        named("config.json", &config(|config| config.model_type = "bert".into()));
        named("config.json", &config(|config| config.num_attention_heads = 7));
        named("config.json", &config(|config| config.head_dim = usize::MAX));
        named("config.json", &config(|config| config.vocab_size = 10));
        named("model.safetensors", b"\x10\0\0\0\0\0\0\0{}");
        named("tokenizer.json", b"[]");
        Ok(())
    }

    #[test]
    fn refuses_inputs_that_do_not_fit() -> Result<()> {
        let encoder = awake(&Params::random(3, &Device::Cpu))?;
        let ids = |rows, tokens, id: u32| Tensor::full(id, (rows, tokens), &Device::Cpu).unwrap();
        let mask = |rows, tokens| Tensor::ones((rows, tokens), DType::F32, &Device::Cpu).unwrap();
        assert!(encoder.forward(&ids(1, 10, 0), &mask(1, 10), None).is_err());
        assert!(encoder.forward(&ids(1, 3, 300), &mask(1, 3), None).is_err());
        assert!(encoder.forward(&ids(2, 3, 0), &mask(1, 3), None).is_err());
        let blank = encoder.forward(&ids(1, 3, 1), &mask(1, 3).zeros_like()?, None)?;
        assert!(blank.sentence.sum_all()?.to_scalar::<f32>()?.is_finite());
        Ok(())
    }
}
