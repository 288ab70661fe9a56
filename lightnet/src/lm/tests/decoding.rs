//! Prompts, single tokens and the states between them.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::embedding::Ids;

use super::{draw, square, variants};
use crate::lm::{Architecture, Config, LanguageModel};
use crate::params::Params;

/// A prompt in pieces of any length, then token by token: the logits of all at once. With it the forms for decoding and for
/// training agree.
#[test]
fn prefill_and_steps_are_the_whole() -> Result<()> {
    const TOKENS: usize = 83;
    for (name, config) in variants() {
        let model = LanguageModel::new(&config, DType::F32, &Params::random(3, &Device::Cpu).builder())?;
        let ids = draw(2 * TOKENS, 31, "ids");
        let whole = model.logits(&Ids::new(&ids, &[2, TOKENS], 31)?)?;
        let piece = |from: usize, count: usize| -> Vec<u32> {
            let row = |batch: usize| &ids[batch * TOKENS + from..][..count];
            [row(0), row(1)].concat()
        };
        for cuts in [vec![TOKENS - 9], vec![0], vec![64, 67, 68]] {
            let (mut state, mut found, mut from) = (model.start(), Vec::new(), 0);
            for cut in cuts.into_iter().filter(|&cut| cut > 0) {
                let part = Ids::new(&piece(from, cut - from), &[2, cut - from], 31)?;
                found.push(model.extend(&part, &mut state)?);
                from = cut;
            }
            // A fork goes its own way.
            let mut fork = state.clone();
            if from > 0 {
                model.step(&[1, 2], &mut fork)?;
            }
            for at in from..TOKENS {
                found.push(model.step(&piece(at, 1), &mut state)?.unsqueeze(1)?);
            }
            let found = Tensor::cat(&found, 1)?;
            let error = (square(&(&found - &whole)?)? / square(&whole)?).sqrt();
            assert!(error < 1e-5, "{name}, from {from}: {error:e}");
            assert_eq!(state.tokens(), TOKENS);
        }
    }
    Ok(())
}

/// A step that finds ids and position in tensors and writes states over those before it is the ordinary one, bit for bit.
#[test]
fn steps_that_read_their_tokens_late_are_steps() -> Result<()> {
    let cpu = &Device::Cpu;
    let bits = |tensor: &Tensor| -> Result<Vec<u32>> {
        let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
        Ok(values.into_iter().map(f32::to_bits).collect())
    };
    let (mut models, mut written_over) = (0, 0);
    for (name, config) in variants() {
        // Keys and values grow, so that no step of theirs is recorded.
        if config.growth(DType::F32) > 0 {
            continue;
        }
        let params = Params::random(3, cpu);
        let model = LanguageModel::new(&config, DType::F32, &params.builder())?.rounded(DType::F32)?;
        let mut state = model.start();
        model.prefill(&Ids::new(&draw(14, 31, "prompt"), &[2, 7], 31)?, &mut state)?;
        let mut places = state.copied()?;
        for token in 0..4u32 {
            let chosen = [3 * token + 1, 30 - token];
            let wanted = model.step(&chosen, &mut state)?;
            let input = Tensor::new(&[chosen[0], chosen[1], 7 + token], cpu)?;
            // What the host counts is wrong, and must not be seen.
            let mut next = places.clone().at(1000).in_place();
            let found = model.step_at(&input.narrow(0, 0, 2)?, &input.narrow(0, 2, 1)?, &mut next)?;
            assert_eq!(bits(&found)?, bits(&wanted)?, "{name}");
            let (next, before) = (next.copied()?, places.tensors());
            for (tensor, wanted) in state.tensors() {
                let found = bits(&next.tensors()[&tensor])?;
                assert_eq!(found, bits(&wanted)?, "{name}: {tensor}");
                written_over += usize::from(bits(&before[&tensor])? == found);
            }
            places = next;
        }
        models += 1;
    }
    assert!(models > 15 && written_over > 100, "{models}, {written_over}");
    Ok(())
}

/// A model for decoding is the model: with weights of 32 bits, and with 16 one whose weights had been rounded before.
#[test]
fn rounded_models_are_the_models_of_rounded_weights() -> Result<()> {
    const TOKENS: usize = 40;
    let cpu = &Device::Cpu;
    for (name, config) in variants() {
        let params = Params::random(3, cpu);
        let model = LanguageModel::new(&config, DType::F32, &params.builder())?;
        let rounded: HashMap<String, Tensor> = params
            .vars()
            .into_iter()
            .map(|(name, weight)| {
                // Maps and heads are the matrices, but for the embedding, the map of TPE behind it, and steps of state spaces.
                let is_exact = ["embed", "tpe.", "dt_proj."]
                    .iter()
                    .any(|part| name.contains(part));
                let is_map = weight.rank() == 2 && name.ends_with(".weight") && !is_exact;
                let exact = weight.as_detached_tensor();
                let weight = match is_map {
                    true => exact.to_dtype(DType::BF16)?.to_dtype(DType::F32)?,
                    false => exact,
                };
                Ok((name, weight))
            })
            .collect::<Result<_>>()?;
        // A head that is the embedding is rounded, and the embedding is not.
        let head = rounded.iter().find(|(name, _)| name.contains("embed"));
        let head = head.map(|(_, table)| table.to_dtype(DType::BF16)?.to_dtype(DType::F32));
        let mut rounded = rounded.clone();
        if let Some(head) = head.filter(|_| config.tie_word_embeddings) {
            rounded.insert("lm_head.weight".to_owned(), head?);
        }
        let untied = Config {
            tie_word_embeddings: false,
            ..config.clone()
        };
        let builder = VarBuilder::from_tensors(rounded, DType::F32, cpu);
        let wanted = [model.clone(), LanguageModel::new(&untied, DType::F32, &builder)?];
        let ids = draw(TOKENS, 31, "ids");
        for (weights, wanted) in [DType::F32, DType::BF16].into_iter().zip(wanted) {
            let whole = wanted.logits(&Ids::new(&ids, &[1, TOKENS], 31)?)?;
            let model = model.clone().rounded(weights)?;
            let mut state = model.start();
            let mut found = vec![model.extend(&Ids::new(&ids[..23], &[1, 23], 31)?, &mut state)?];
            for id in &ids[23..] {
                found.push(model.step(&[*id], &mut state)?.unsqueeze(1)?);
            }
            let found = Tensor::cat(&found, 1)?;
            let error = (square(&(&found - &whole)?)? / square(&whole)?).sqrt();
            assert!(error < 1e-5, "{name}, {weights:?}: {error:e}");
        }
    }
    Ok(())
}

#[test]
fn states_do_not_grow_but_for_softmax_attention() -> Result<()> {
    for (name, config) in variants() {
        let model = LanguageModel::new(&config, DType::F32, &Params::random(3, &Device::Cpu).builder())?;
        let mut state = model.start();
        let mut bytes = |tokens: usize| {
            model.prefill(&Ids::new(&draw(tokens, 31, "ids"), &[1, tokens], 31)?, &mut state)?;
            Ok::<_, candle_core::Error>(state.bytes())
        };
        let (first, second) = (bytes(5)?, bytes(11)?);
        let softmax = config.architecture == Architecture::Llama || !config.attn.is_empty();
        assert_eq!(second > first, softmax, "{name}: {first} {second}");
        assert_eq!(config.growth(DType::F32), (second - first) as u64 / 11, "{name}");
        assert!(first > 0, "{name}");
        let line = model.step(&[1, 2], &mut state).unwrap_err().to_string();
        assert!(line.starts_with("2 sequences, expected 1"), "{line}");
        assert!(model.step(&[31], &mut state).is_err());
        assert_eq!((state.tokens(), state.bytes()), (16, second));
    }
    Ok(())
}
