//! How good language models are: figures with standard errors, of texts and questions in local files.
//!
//! | module | asks | gives |
//! |---|---|---|
//! | [`perplexity`] | how likely texts are | nats a token, bits a byte |
//! | [`choice`] | which of several continuations is the likeliest | accuracy, also by bytes |
//! | [`needle`] | for a fact hidden in a long text | accuracy by length and depth |
//! | [`recall`] | for the values of keys (MQAR) | accuracy |
//! | [`answers`] | for answers in words | F1, exact match, ROUGE |
//!
//! Whatever is asked, texts are read once: what several questions begin with is read into a state, and they go on from its forks.

pub mod answers;
pub mod choice;
pub mod figures;
pub mod needle;
pub mod perplexity;
pub mod recall;

use std::path::PathBuf;

use anyhow::bail;
use candle_core::{D, DType, Tensor};
use fulgur_lightnet::lm::LanguageModel;
use fulgur_lightnet::lm::likelihood::Continuation;
use fulgur_lightnet::lm::tokenizer::LmTokenizer;

use crate::doctor::available_memory;

/// A causal model that is judged.
#[derive(Debug)]
pub struct Subject {
    /// Where it is from, for the errors.
    pub folder: PathBuf,
    /// The model.
    pub model: LanguageModel,
    /// Its tokenizer, where it has one.
    pub tokenizer: Option<LmTokenizer>,
    /// Most tokens of a text that are read at once.
    pub chunk: usize,
}

impl Subject {
    /// Rows of its embedding.
    pub fn vocabulary(&self) -> usize {
        self.model.config().vocab_size
    }

    /// The tokenizer, for what cannot do without.
    ///
    /// # Errors
    /// There is none.
    pub fn tokenizer(&self) -> anyhow::Result<&LmTokenizer> {
        let Some(tokenizer) = &self.tokenizer else {
            bail!(
                "{}: found no tokenizer.json and a vocabulary of {}, expected --tokenizer",
                self.folder.display(),
                self.vocabulary()
            );
        };
        Ok(tokenizer)
    }

    /// Refuses what keys and values of softmax attention would not fit into the memory for: so many `tokens` in all.
    fn check_memory(&self, tokens: usize) -> anyhow::Result<()> {
        let growth = self.model.config().growth(DType::F32);
        // What was there is copied when more is kept.
        let bytes = growth.saturating_mul(tokens as u64).saturating_mul(2);
        if let Some(available) = available_memory()
            && bytes > available
        {
            bail!(
                "{}: keys and values of {tokens} tokens need {:.1} GB, expected at most the {:.1} GB that are free",
                self.folder.display(),
                bytes as f64 / 1e9,
                available as f64 / 1e9
            );
        }
        Ok(())
    }
}

/// `continuation` behind `context` in tokens, as the standard harness has them: spaces at the end of the context go to the
/// continuation, which is what the tokens of both together have beyond those of the context.
///
/// # Errors
/// One of them has no tokens, or the tokenizer cannot express the text.
fn tokens_behind(tokenizer: &LmTokenizer, context: &str, continuation: &str) -> anyhow::Result<Continuation> {
    let trimmed = context.trim_end();
    let both = [context, continuation].concat();
    let context = tokenizer.encode(trimmed, false)?;
    let mut whole = tokenizer.encode(&both, false)?;
    let continuation = whole.split_off(context.len().min(whole.len()));
    if context.is_empty() {
        bail!("found a context without tokens, expected text");
    }
    if continuation.is_empty() {
        bail!("found a choice without tokens of its own behind its context, expected text");
    }
    Ok(Continuation {
        context,
        continuation,
    })
}

/// The likeliest of the first `vocabulary` tokens, of each row of `logits` `[B, V]`; of equal ones the first.
///
/// # Errors
/// Logits that are no numbers, or a failing operation.
fn likeliest(logits: &Tensor, vocabulary: usize) -> anyhow::Result<Vec<u32>> {
    let rows = logits.dim(D::Minus1)?.min(vocabulary);
    let logits: Vec<Vec<f32>> = logits
        .narrow(D::Minus1, 0, rows)?
        .to_dtype(DType::F32)?
        .to_vec2()?;
    let mut best = Vec::with_capacity(logits.len());
    for row in logits {
        if let Some(at) = row.iter().position(|logit| !logit.is_finite()) {
            bail!("the logit of token {at} is {}, expected a finite number", row[at]);
        }
        best.push(first_largest(&row) as u32);
    }
    Ok(best)
}

/// Where the largest value is; of equal ones the first.
fn first_largest<T: PartialOrd>(values: &[T]) -> usize {
    let mut best = 0;
    for (at, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = at;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use candle_core::Device;
    use candle_nn::VarBuilder;
    use fulgur_lightnet::lm::{Architecture, Config};
    use fulgur_lightnet::params::Params;

    /// A model of bytes with random weights.
    pub(super) fn random(seed: u64) -> Subject {
        let config = Config {
            hidden_size: 16,
            intermediate_size: 16,
            num_attention_heads: 2,
            num_hidden_layers: 2,
            vocab_size: 256,
            initializer_range: 0.4,
            ..Config::of(Architecture::Hgrn2)
        };
        let params = Params::random(seed, &Device::Cpu);
        subject(LanguageModel::new(&config, DType::F32, &params.builder()).unwrap())
    }

    /// A model of bytes whose logits are `score(last, next)`: nothing of what it has read but the last byte counts.
    pub(super) fn scored(score: impl Fn(usize, usize) -> f32) -> Subject {
        const V: usize = 256;
        let config = Config {
            hidden_size: V,
            intermediate_size: 16,
            num_attention_heads: 2,
            num_hidden_layers: 1,
            vocab_size: V,
            ..Config::of(Architecture::Llama)
        };
        let params = Params::random(1, &Device::Cpu);
        LanguageModel::new(&config, DType::F32, &params.builder()).unwrap();
        let rigged = params.vars().into_iter().map(|(name, var)| {
            let tensor = match name.as_str() {
                "model.embed_tokens.weight" => Tensor::eye(V, DType::F32, &Device::Cpu).unwrap(),
                // The norm makes 16 of the one channel of 256.
                "lm_head.weight" => {
                    let values: Vec<f32> = (0..V * V).map(|at| score(at % V, at / V) / 16.0).collect();
                    Tensor::from_vec(values, (V, V), &Device::Cpu).unwrap()
                }
                name if name.contains("norm") => var.as_tensor().clone(),
                _ => var.zeros_like().unwrap(),
            };
            (name, tensor)
        });
        let rigged: HashMap<String, Tensor> = rigged.collect();
        let builder = VarBuilder::from_tensors(rigged, DType::F32, &Device::Cpu);
        subject(LanguageModel::new(&config, DType::F32, &builder).unwrap())
    }

    /// A model of bytes that goes on with the byte that follows the last one in `text`.
    pub(super) fn following(text: &str) -> Subject {
        let pairs: Vec<&[u8]> = text.as_bytes().windows(2).collect();
        scored(
            |last, next| match pairs.contains(&&[last as u8, next as u8][..]) {
                true => 30.0,
                false => 0.0,
            },
        )
    }

    fn subject(model: LanguageModel) -> Subject {
        Subject {
            folder: "model".into(),
            model,
            tokenizer: Some(LmTokenizer::bytes()),
            chunk: 37,
        }
    }

    #[test]
    fn continuations_are_what_both_have_beyond_the_context() {
        let bytes = LmTokenizer::bytes();
        let pair = |context: &str, continuation: &str| {
            tokens_behind(&bytes, context, continuation).map_err(|error| error.to_string())
        };
        let ids = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
        let found = pair("Answer: \n", "yes").unwrap();
        assert_eq!(
            (found.context, found.continuation),
            (ids("Answer:"), ids(" \nyes"))
        );
        assert!(pair(" ", "yes").unwrap_err().contains("a context without tokens"));
        assert!(
            pair("Answer:", "")
                .unwrap_err()
                .contains("a choice without tokens")
        );
        // Letters that grow together with the context.
        let text = "the bells ring and the bell rings ".repeat(30);
        let trained = LmTokenizer::train([text.as_str()].into_iter(), 300).unwrap();
        let whole = trained.encode("the bells", false).unwrap();
        let context = trained.encode("the bell", false).unwrap();
        let found = tokens_behind(&trained, "the bell", "s").map_err(|error| error.to_string());
        match whole.len() > context.len() {
            true => assert_eq!(found.unwrap().continuation, whole[context.len()..]),
            false => assert!(found.unwrap_err().contains("a choice without tokens")),
        }
    }

    #[test]
    fn of_equal_ones_the_first_is_the_largest() {
        assert_eq!(first_largest(&[1.0, 3.0, 3.0, 2.0]), 1);
        assert_eq!(first_largest::<f64>(&[]), 0);
        let logits = Tensor::new(&[[0f32, 2.0, 5.0], [1.0, 1.0, 5.0]], &Device::Cpu).unwrap();
        assert_eq!(likeliest(&logits, 2).unwrap(), [1, 0]);
        assert_eq!(likeliest(&logits, 9).unwrap(), [2, 2]);
        let broken = (logits * f64::NAN).unwrap();
        assert!(likeliest(&broken, 3).unwrap_err().to_string().contains("is NaN"));
    }
}
