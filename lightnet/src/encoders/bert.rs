//! BERT text encoder (Devlin et al., 2018) and the sentence vectors of MiniLM (Wang et al., 2020).
//!
//! Reference: `BertModel` of Hugging Face transformers; tensor names are its own, with or without the prefix `bert.`.
//!
//! ```text
//! x = LayerNorm(word + position + type)
//! L times: x = LayerNorm(x + W_o softmax(q k^T / sqrt(d/H) + mask) v)
//!          x = LayerNorm(x + W_2 act(W_1 x))
//! sentence = mean of x over real tokens, scaled to length one
//! ```
//!
//! The network serves as a frozen teacher or feature extractor: its softmax and norms are candle's fused kernels,
//! which have no backward, so no gradient passes through it.
//!
//! Shapes: B batch, N tokens, d hidden width, H heads.

use std::path::{Path, PathBuf};

use candle_core::{D, DType, Device, Tensor};
use candle_nn::{Activation, Embedding, LayerNorm, Module, VarBuilder};
use serde::Deserialize;
use tokenizers::{Tokenizer, TruncationParams};

use crate::linear::{Linear, Start};

/// What can go wrong while loading or running a BERT encoder.
#[derive(Debug, thiserror::Error)]
pub enum BertError {
    /// A file of the model folder cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// `config.json` is not a BERT configuration.
    #[error("{}: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The weights do not have the size that the configuration names.
    #[error("config field {field} is {config}, but tensor {tensor} says {found}")]
    Size {
        /// Field of the configuration.
        field: &'static str,
        /// Its value.
        config: usize,
        /// The tensor that disagrees.
        tensor: &'static str,
        /// The size found there.
        found: usize,
    },
    /// A configuration that this encoder does not implement or that contradicts itself.
    #[error("config field {field}: found {found}, expected {expected}")]
    Field {
        /// Field of the configuration.
        field: &'static str,
        /// Its value.
        found: String,
        /// What would be accepted.
        expected: String,
    },
    /// An input that the encoder cannot take.
    #[error("{input}: found {found}, expected {expected}")]
    Input {
        /// Name of the input.
        input: &'static str,
        /// What was given.
        found: String,
        /// What would be accepted.
        expected: String,
    },
    /// `tokenizer.json` is broken or cannot encode a text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A missing tensor or a failed operation.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, BertError>;

/// Configuration with the names of the published `config.json`; unknown keys are ignored.
///
/// Sizes are read from the weights; where the file names one, the two have to agree.
#[derive(Clone, Debug, Deserialize)]
pub struct BertConfig {
    /// Pieces in the vocabulary.
    pub vocab_size: Option<usize>,
    /// Model width d.
    pub hidden_size: Option<usize>,
    /// Number of layers.
    pub num_hidden_layers: Option<usize>,
    /// Heads H; d is a multiple of it.
    #[serde(default = "default_heads")]
    pub num_attention_heads: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: Option<usize>,
    /// Longest input in tokens.
    pub max_position_embeddings: Option<usize>,
    /// Kinds of segments.
    pub type_vocab_size: Option<usize>,
    /// Activation of the feed-forward layers.
    #[serde(default = "default_activation")]
    pub hidden_act: Activation,
    /// Added to the variance in every layer norm.
    #[serde(default = "default_epsilon")]
    pub layer_norm_eps: f64,
    /// Only `absolute` is implemented.
    #[serde(default = "default_positions")]
    pub position_embedding_type: String,
}

fn default_heads() -> usize {
    12
}

fn default_activation() -> Activation {
    Activation::Gelu
}

fn default_epsilon() -> f64 {
    1e-12
}

fn default_positions() -> String {
    "absolute".into()
}

/// The sizes that the weights have.
struct Sizes {
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    eps: f64,
    activation: Activation,
}

struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attention_output: Linear,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output: Linear,
    output_norm: LayerNorm,
    activation: Activation,
    heads: usize,
}

impl Layer {
    fn new(sizes: &Sizes, vb: &VarBuilder) -> Result<Self> {
        let Sizes {
            hidden,
            intermediate,
            eps,
            ..
        } = *sizes;
        let linear = |input, output, name: &str| Linear::new(input, output, true, Start::FanIn, &vb.pp(name));
        Ok(Self {
            query: linear(hidden, hidden, "attention.self.query")?,
            key: linear(hidden, hidden, "attention.self.key")?,
            value: linear(hidden, hidden, "attention.self.value")?,
            attention_output: linear(hidden, hidden, "attention.output.dense")?,
            attention_norm: layer_norm(hidden, eps, &vb.pp("attention.output.LayerNorm"))?,
            intermediate: linear(hidden, intermediate, "intermediate.dense")?,
            output: linear(intermediate, hidden, "output.dense")?,
            output_norm: layer_norm(hidden, eps, &vb.pp("output.LayerNorm"))?,
            activation: sizes.activation,
            heads: sizes.heads,
        })
    }

    /// `bias_b11n` is zero on real tokens and hugely negative on padding.
    fn forward(&self, x_bnd: &Tensor, bias_b11n: &Tensor) -> Result<Tensor> {
        let (batch, tokens, hidden) = x_bnd.dims3()?;
        let width = hidden / self.heads;
        let split = |map: &Linear| -> Result<Tensor> {
            let y = map.forward(x_bnd)?.reshape((batch, tokens, self.heads, width))?;
            Ok(y.transpose(1, 2)?.contiguous()?)
        };
        let q_bhnd = (split(&self.query)? * (width as f64).powf(-0.5))?;
        let (k_bhnd, v_bhnd) = (split(&self.key)?, split(&self.value)?);
        let scores_bhnn = q_bhnd.matmul(&k_bhnd.t()?)?.broadcast_add(bias_b11n)?;
        let weights_bhnn = candle_nn::ops::softmax_last_dim(&scores_bhnn)?;
        let mixed_bnd = weights_bhnn
            .matmul(&v_bhnd)?
            .transpose(1, 2)?
            .reshape((batch, tokens, hidden))?;
        let x_bnd = self
            .attention_norm
            .forward(&(self.attention_output.forward(&mixed_bnd)? + x_bnd)?)?;
        let inner = self.intermediate.forward(&x_bnd)?.apply(&self.activation)?;
        Ok(self
            .output_norm
            .forward(&(self.output.forward(&inner)? + &x_bnd)?)?)
    }
}

/// The encoder: token ids in, token states out.
pub struct Bert {
    words: Embedding,
    positions: Tensor,
    types: Embedding,
    norm: LayerNorm,
    layers: Vec<Layer>,
    vocabulary: usize,
}

impl Bert {
    /// Takes the tensors of `vb`, below `bert.` when they are there.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape; a configuration that disagrees with the weights or is not
    /// implemented.
    pub fn new(config: &BertConfig, vb: &VarBuilder) -> Result<Self> {
        const WORDS: &str = "embeddings.word_embeddings.weight";
        const POSITIONS: &str = "embeddings.position_embeddings.weight";
        const TYPES: &str = "embeddings.token_type_embeddings.weight";
        const INNER: &str = "encoder.layer.0.intermediate.dense.weight";
        let below = vb.pp("bert");
        let vb = if !vb.contains_tensor(WORDS) && below.contains_tensor(WORDS) {
            &below
        } else {
            vb
        };
        if config.position_embedding_type != "absolute" {
            return Err(BertError::Field {
                field: "position_embedding_type",
                found: config.position_embedding_type.clone(),
                expected: "absolute".into(),
            });
        }

        let words = vb.get_unchecked(WORDS)?;
        let (vocabulary, hidden) = words.dims2()?;
        let positions = vb.get_unchecked(POSITIONS)?;
        let types = vb.get_unchecked(TYPES)?;
        let longest = positions.dims2()?.0;
        let intermediate = vb.get_unchecked(INNER)?.dims2()?.0;
        let layers = (0..)
            .take_while(|i| vb.contains_tensor(&format!("encoder.layer.{i}.attention.self.query.weight")))
            .count();
        for (field, given, tensor, found) in [
            ("vocab_size", config.vocab_size, WORDS, vocabulary),
            ("hidden_size", config.hidden_size, WORDS, hidden),
            (
                "max_position_embeddings",
                config.max_position_embeddings,
                POSITIONS,
                longest,
            ),
            ("type_vocab_size", config.type_vocab_size, TYPES, types.dims2()?.0),
            ("intermediate_size", config.intermediate_size, INNER, intermediate),
            (
                "num_hidden_layers",
                config.num_hidden_layers,
                "encoder.layer.*",
                layers,
            ),
        ] {
            if let Some(given) = given.filter(|&given| given != found) {
                return Err(BertError::Size {
                    field,
                    config: given,
                    tensor,
                    found,
                });
            }
        }
        let heads = config.num_attention_heads;
        if heads == 0 || hidden % heads != 0 {
            return Err(BertError::Field {
                field: "num_attention_heads",
                found: heads.to_string(),
                expected: format!("a divisor of the hidden size {hidden}"),
            });
        }

        let (eps, activation) = (config.layer_norm_eps, config.hidden_act);
        let sizes = Sizes {
            hidden,
            intermediate,
            layers,
            heads,
            eps,
            activation,
        };
        Ok(Self {
            words: Embedding::new(words, hidden),
            positions: vb.get((longest, hidden), POSITIONS)?,
            types: Embedding::new(vb.get((types.dims2()?.0, hidden), TYPES)?, hidden),
            norm: layer_norm(hidden, eps, &vb.pp("embeddings.LayerNorm"))?,
            layers: (0..sizes.layers)
                .map(|i| Layer::new(&sizes, &vb.pp(format!("encoder.layer.{i}"))))
                .collect::<Result<_>>()?,
            vocabulary,
        })
    }

    /// Reads `config.json` and `model.safetensors` of `folder`.
    ///
    /// # Errors
    /// A file that is missing or broken; weights that do not fit the configuration.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        let (path, bytes) = read(folder, "config.json")?;
        let config: BertConfig =
            serde_json::from_slice(&bytes).map_err(|source| BertError::Config { path, source })?;
        let (path, bytes) = read(folder, "model.safetensors")?;
        let vb = VarBuilder::from_buffered_safetensors(bytes, DType::F32, device)
            .map_err(|error| candle_core::Error::Msg(format!("{}: {error}", path.display())))?;
        Self::new(&config, &vb)
    }

    /// Longest input in tokens.
    pub fn longest(&self) -> usize {
        self.positions.dims()[0]
    }

    /// Width d of the states.
    pub fn width(&self) -> usize {
        self.positions.dims()[1]
    }

    /// Last hidden state `[B, N, d]` of `input_ids` `[B, N]` (any integer dtype).
    ///
    /// `attention_mask` `[B, N]` is 1 on real tokens and 0 on padding; without it all tokens are real. States at
    /// padding are computed too and mean nothing. Segment type 0 is used throughout.
    ///
    /// # Errors
    /// No tokens, more than [`Bert::longest`], an id outside the vocabulary, a mask of another shape.
    pub fn forward(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Tensor> {
        self.run(input_ids, None, attention_mask)
    }

    /// As [`Bert::forward`] with a position `[B, N]` (u32) for each token, as RoBERTa counts them.
    ///
    /// # Errors
    /// As [`Bert::forward`], and positions that there are not, or of another shape.
    pub fn forward_at(
        &self,
        input_ids: &Tensor,
        positions: &Tensor,
        attention_mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        let fits = positions.dims() == input_ids.dims()
            && positions.elem_count() > 0
            && (positions.flatten_all()?.max(0)?.to_scalar::<u32>()? as usize) < self.longest();
        if !fits {
            return Err(BertError::Input {
                input: "positions",
                found: format!("{:?}", positions.dims()),
                expected: format!("{:?} below {}", input_ids.dims(), self.longest()),
            });
        }
        self.run(input_ids, Some(positions), attention_mask)
    }

    fn run(
        &self,
        input_ids: &Tensor,
        positions: Option<&Tensor>,
        attention_mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (batch, tokens) = input_ids.dims2()?;
        if batch == 0 || tokens == 0 || tokens > self.longest() {
            return Err(BertError::Input {
                input: "input_ids",
                found: format!("{batch} x {tokens}"),
                expected: format!("at least one row of 1 to {} tokens", self.longest()),
            });
        }
        let ids = input_ids.to_dtype(DType::I64)?.contiguous()?;
        let (low, high) = (
            ids.min_all()?.to_scalar::<i64>()?,
            ids.max_all()?.to_scalar::<i64>()?,
        );
        if low < 0 || high >= self.vocabulary as i64 {
            return Err(BertError::Input {
                input: "input_ids",
                found: format!("ids from {low} to {high}"),
                expected: format!("0 to {}", self.vocabulary - 1),
            });
        }
        let bias_b11n = match attention_mask {
            Some(mask) if mask.dims() != [batch, tokens] => {
                return Err(BertError::Input {
                    input: "attention_mask",
                    found: format!("{:?}", mask.dims()),
                    expected: format!("[{batch}, {tokens}]"),
                });
            }
            Some(mask) => {
                let mask = mask.to_dtype(DType::F32)?.reshape((batch, 1, 1, tokens))?;
                // Finite, so that a row without any real token stays free of NaN.
                ((mask - 1.0)? * f64::from(f32::MAX))?
            }
            None => Tensor::zeros((batch, 1, 1, tokens), DType::F32, ids.device())?,
        };

        let kind = self.types.forward(&Tensor::zeros(1, DType::U32, ids.device())?)?;
        let places = match positions {
            None => self.positions.narrow(0, 0, tokens)?,
            Some(places) => {
                self.positions
                    .index_select(&places.flatten_all()?, 0)?
                    .reshape((batch, tokens, ()))?
            }
        };
        let x_bnd = self.words.forward(&ids)?.broadcast_add(&places)?;
        let mut x_bnd = self.norm.forward(&x_bnd.broadcast_add(&kind)?)?;
        let bias_b11n = bias_b11n.to_dtype(x_bnd.dtype())?;
        for layer in &self.layers {
            x_bnd = layer.forward(&x_bnd, &bias_b11n)?;
        }
        Ok(x_bnd)
    }
}

/// A whole file of a model folder, with its path for errors.
fn read(folder: &Path, name: &str) -> Result<(PathBuf, Vec<u8>)> {
    let path = folder.join(name);
    match std::fs::read(&path) {
        Ok(bytes) => Ok((path, bytes)),
        Err(source) => Err(BertError::Read { path, source }),
    }
}

/// Reads `weight` and `bias`, or the names `gamma` and `beta` of checkpoints converted from TensorFlow.
fn layer_norm(width: usize, eps: f64, vb: &VarBuilder) -> Result<LayerNorm> {
    let old = vb.contains_tensor("gamma");
    let (weight, bias) = if old {
        ("gamma", "beta")
    } else {
        ("weight", "bias")
    };
    Ok(LayerNorm::new(vb.get(width, weight)?, vb.get(width, bias)?, eps))
}

/// Mean of `states_bnd` `[B, N, d]` over the tokens that `mask_bn` `[B, N]` marks, scaled to length one: `[B, d]`.
pub fn mean_pool(states_bnd: &Tensor, mask_bn: &Tensor) -> candle_core::Result<Tensor> {
    let mask_bn1 = mask_bn.to_dtype(states_bnd.dtype())?.unsqueeze(2)?;
    let count_b1 = mask_bn1.sum(1)?.clamp(1e-9, f64::MAX)?;
    let mean_bd = states_bnd
        .broadcast_mul(&mask_bn1)?
        .sum(1)?
        .broadcast_div(&count_b1)?;
    let norm_b1 = mean_bd
        .sqr()?
        .sum_keepdim(D::Minus1)?
        .sqrt()?
        .clamp(1e-12, f64::MAX)?;
    mean_bd.broadcast_div(&norm_b1)
}

/// A tokenizer and a BERT that turn sentences into unit vectors, from a folder as sentence-transformers writes it.
pub struct SentenceEncoder {
    bert: Bert,
    tokenizer: Tokenizer,
    device: Device,
}

impl SentenceEncoder {
    /// Reads `config.json`, `model.safetensors` and `tokenizer.json` of `folder`.
    ///
    /// # Errors
    /// A file that is missing or broken; weights that do not fit the configuration.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        let bert = Bert::load(folder, device)?;
        let (path, bytes) = read(folder, "tokenizer.json")?;
        let mut tokenizer = Tokenizer::from_bytes(&bytes)
            .map_err(|error| BertError::Tokenizer(format!("{}: {error}", path.display())))?;
        let given = tokenizer
            .get_truncation()
            .map_or(usize::MAX, |truncation| truncation.max_length);
        let max_length = given.min(bert.longest());
        tokenizer
            .with_truncation(Some(TruncationParams {
                max_length,
                ..Default::default()
            }))
            .map_err(|error| BertError::Tokenizer(error.to_string()))?;
        // Padding follows the longest sentence of a batch, not the fixed length of the file.
        tokenizer.with_padding(None);
        Ok(Self {
            bert,
            tokenizer,
            device: device.clone(),
        })
    }

    /// The network behind the tokenizer.
    pub fn bert(&self) -> &Bert {
        &self.bert
    }

    /// Ids and mask, both `[B, N]` `u32`, padded with id 0 to the longest sentence.
    ///
    /// # Errors
    /// No sentences, or one that the tokenizer refuses.
    pub fn tokenize<S: AsRef<str>>(&self, sentences: &[S]) -> Result<(Tensor, Tensor)> {
        let mut rows = Vec::with_capacity(sentences.len());
        for sentence in sentences {
            let encoding = self
                .tokenizer
                .encode_fast(sentence.as_ref(), true)
                .map_err(|error| BertError::Tokenizer(error.to_string()))?;
            rows.push(encoding.get_ids().to_vec());
        }
        let tokens = rows.iter().map(Vec::len).max().unwrap_or(0);
        let mask = rows
            .iter()
            .flat_map(|row| (0..tokens).map(|i| u32::from(i < row.len())));
        let mask = Tensor::from_iter(mask, &self.device)?.reshape((rows.len(), tokens))?;
        rows.iter_mut().for_each(|row| row.resize(tokens, 0));
        let ids = Tensor::from_vec(rows.concat(), (rows.len(), tokens), &self.device)?;
        Ok((ids, mask))
    }

    /// Unit vectors `[B, d]` in `f32`: the mean of the token states.
    ///
    /// # Errors
    /// As [`SentenceEncoder::tokenize`].
    pub fn encode<S: AsRef<str>>(&self, sentences: &[S]) -> Result<Tensor> {
        let (ids, mask) = self.tokenize(sentences)?;
        Ok(mean_pool(&self.bert.forward(&ids, Some(&mask))?, &mask)?)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const GOLDEN: &[u8] = include_bytes!("../../goldens/bert.safetensors");

    fn golden() -> HashMap<String, Tensor> {
        candle_core::safetensors::load_buffer(GOLDEN, &Device::Cpu).unwrap()
    }

    fn tiny(tensors: HashMap<String, Tensor>) -> Result<Bert> {
        let config = serde_json::from_str(r#"{"num_attention_heads": 3, "model_type": "bert"}"#).unwrap();
        Bert::new(
            &config,
            &VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu),
        )
    }

    fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
        (a - b)
            .unwrap()
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar()
            .unwrap()
    }

    /// Rows of states at real tokens.
    fn real(states: &Tensor, mask: &Tensor) -> Tensor {
        let mask = mask.to_dtype(DType::F32).unwrap().unsqueeze(2).unwrap();
        states.broadcast_mul(&mask).unwrap()
    }

    #[test]
    fn equals_transformers_with_and_without_prefix() -> Result<()> {
        let mut tensors = golden();
        let (ids, mask) = (
            tensors.remove("input_ids").unwrap(),
            tensors.remove("attention_mask").unwrap(),
        );
        let expected = tensors.remove("last_hidden_state").unwrap();
        let bare: HashMap<_, _> = tensors
            .iter()
            .map(|(name, t)| (name.trim_start_matches("bert.").to_owned(), t.clone()))
            .collect();
        for tensors in [tensors, bare] {
            let states = tiny(tensors)?.forward(&ids, Some(&mask))?;
            let error = largest_difference(&real(&states, &mask), &real(&expected, &mask));
            assert!(error < 2e-5, "largest difference {error}");
        }
        Ok(())
    }

    #[test]
    fn padding_does_not_change_a_sentence() -> Result<()> {
        let mut tensors = golden();
        let (ids, mask) = (
            tensors.remove("input_ids").unwrap(),
            tensors.remove("attention_mask").unwrap(),
        );
        let bert = tiny(tensors)?;
        let batch = mean_pool(&bert.forward(&ids, Some(&mask))?, &mask)?;
        for (row, tokens) in [(0, 9), (1, 5), (2, 1)] {
            let ids = ids.narrow(0, row, 1)?.narrow(1, 0, tokens)?;
            let alone = mean_pool(
                &bert.forward(&ids, None)?,
                &Tensor::ones((1, tokens), DType::F32, &Device::Cpu)?,
            )?;
            let error = largest_difference(&alone, &batch.narrow(0, row, 1)?);
            assert!(error < 1e-5, "row {row}: largest difference {error}");
        }
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let bert = tiny(golden()).unwrap();
        let ids = |rows, tokens, id: i64| Tensor::full(id, (rows, tokens), &Device::Cpu).unwrap();
        for bad in [ids(1, 0, 0), ids(1, 18, 0), ids(1, 3, 61), ids(1, 3, -1)] {
            assert!(matches!(
                bert.forward(&bad, None),
                Err(BertError::Input {
                    input: "input_ids",
                    ..
                })
            ));
        }
        assert!(bert.forward(&ids(1, 17, 60), None).is_ok());
        let refused = bert.forward(&ids(2, 3, 1), Some(&ids(1, 3, 1)));
        assert!(matches!(
            refused,
            Err(BertError::Input {
                input: "attention_mask",
                ..
            })
        ));

        let mut missing = golden();
        missing.remove("bert.encoder.layer.1.output.dense.bias");
        let message = tiny(missing)
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default();
        assert!(message.contains("encoder.layer.1.output.dense.bias"), "{message}");

        let vb = VarBuilder::from_tensors(golden(), DType::F32, &Device::Cpu);
        for (config, field) in [
            (r#"{"num_attention_heads": 5}"#, "num_attention_heads"),
            (
                r#"{"num_attention_heads": 3, "num_hidden_layers": 3}"#,
                "num_hidden_layers",
            ),
            (
                r#"{"num_attention_heads": 3, "position_embedding_type": "relative_key"}"#,
                "relative_key",
            ),
        ] {
            let config = serde_json::from_str(config).unwrap();
            let message = Bert::new(&config, &vb)
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default();
            assert!(message.contains(field), "{message}");
        }
    }

    #[test]
    fn minilm_gives_the_published_numbers() -> Result<()> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/minilm");
        if !folder.join("model.safetensors").exists() {
            eprintln!(
                "skipped: {} is absent (fulgur data fetch minilm)",
                folder.display()
            );
            return Ok(());
        }
        let encoder = SentenceEncoder::load(&folder, &Device::Cpu)?;
        let sentences = [
            "a dog barking",
            "a puppy woofs loudly",
            "a violin playing a melody",
            "rain on a tin roof",
        ];
        let (ids, _) = encoder.tokenize(&sentences[..1])?;
        assert_eq!(ids.to_vec2::<u32>()?, [[101, 1037, 3899, 19372, 102]]);
        let vectors = encoder.encode(&sentences)?.to_vec2::<f32>()?;
        for (found, expected) in vectors[0]
            .iter()
            .zip([0.02320, -0.01596, 0.04317, 0.07652, 0.00217, 0.00506])
        {
            assert!(
                (found - expected).abs() < 2e-5,
                "found {found}, expected {expected}"
            );
        }
        for (other, expected) in [(1, 0.544), (2, 0.222), (3, 0.180)] {
            let cosine: f32 = vectors[0].iter().zip(&vectors[other]).map(|(a, b)| a * b).sum();
            assert!(
                (cosine - expected).abs() < 1e-3,
                "{}: cosine {cosine}",
                sentences[other]
            );
        }
        Ok(())
    }
}
